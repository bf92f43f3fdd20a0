#!/usr/bin/env bash
# Trains on a TPU pod slice by queued resources: the same command on all its hosts, and again after a preemption.
# Needs an installed and authenticated gcloud; see docs/hosts.md.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/tpu_pod.sh COMMAND --name NAME --zone ZONE [options] [-- arguments of tghmoe_jax.main]

Commands
  create   queue the request for a pod slice
  setup    wait until it is there, then install the project on all its hosts (again: brings them up to date)
  train    start python -m tghmoe_jax.main on all hosts and follow process 0 to its end; what is preempted is created,
           set up and started again. The run continues when this command ends; the same command follows it again
  status   the state of the request and of the slice
  logs     follow process 0 without starting anything
  delete   give the slice back (it costs money until then)

Options
  --type TYPE        v5e-64 (or v5litepod-64), v5p-32, v6e-16, ...: chips (v5e, v6e) or TensorCores (v5p); create, and
                     train to create again
  --runtime VERSION  runtime version; default by the type
  --project PROJECT  default: gcloud's own
  --spot             spot capacity, which is cheaper and can be preempted
  --dry-run          print the commands and run none

  launch/tpu_pod.sh create --name pod --type v5e-64 --zone us-west4-a --spot
  launch/tpu_pod.sh setup --name pod --zone us-west4-a
  launch/tpu_pod.sh train --name pod --type v5e-64 --zone us-west4-a --spot -- --config configs/stage1.py:phi3v,pod=v5e-64 \
    --workdir gs://bucket/runs/stage1 --config.base=gs://bucket/phi3v --config.data.root=gs://bucket/m3d
TEXT
}

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# ---- the command line ----------------------------------------------------------------------------------------------

command=${1:-help} name="" type="" runtime="" zone="" project="" spot="" dry=""
case $command in
  create | setup | train | status | logs | delete) shift ;;
  -h | --help | help) usage; exit 0 ;;
  *) fail "'$command' is unknown; use create, setup, train, status, logs or delete." ;;
esac
while [ $# -gt 0 ]; do
  case $1 in
    --name | --type | --runtime | --zone | --project)
      [ -n "${2:-}" ] || fail "$1 needs a value."
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --spot) spot=yes; shift ;;
    --dry-run) dry=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "'$1' is unknown; arguments of tghmoe_jax.main come after --." ;;
  esac
done
[ -n "$name" ] || fail "name the slice with --name."
[ -n "$zone" ] || fail "name the zone with --zone, e.g. --zone us-west4-a."
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || fail "--name $name must be lower-case letters, digits and hyphens."
case $type in
  "") ;;
  v5e-* | v5litepod-*) accelerator=v5litepod-${type#*-} runtime=${runtime:-v2-alpha-tpuv5-lite} ;;
  v5p-*) accelerator=$type runtime=${runtime:-v2-alpha-tpuv5} ;;
  v6e-*) accelerator=$type runtime=${runtime:-v2-alpha-tpuv6e} ;;
  *) accelerator=$type; [ -n "$runtime" ] || fail "--type $type is not known here; name its --runtime as well." ;;
esac
[ "$command" = train ] || [ $# -eq 0 ] || fail "arguments after -- belong to train alone."
[ "$command" != create ] || [ -n "$type" ] || fail "name the type with --type, e.g. --type v5e-64."
[ "$command" != train ] || [ $# -gt 0 ] ||
  fail "name what to run, e.g. -- --config configs/stage1.py:phi3v,pod=v5e-64 --workdir gs://bucket/runs/stage1."

# ---- pieces --------------------------------------------------------------------------------------------------------

tpu() { # tpu GROUP VERB ARGUMENTS...: one gcloud command in this zone and project
  local line=(gcloud compute tpus "$@" --zone "$zone")
  [ -z "$project" ] || line+=(--project "$project")
  if [ -n "$dry" ]; then
    printf '%q ' "${line[@]}" >&3
    printf '\n' >&3
  else
    "${line[@]}"
  fi
}
exec 3>&1 # what a dry run prints, also where the output of a command is read

on_all() { tpu tpu-vm ssh "$name" --worker=all --command "$1"; }
on_first() { tpu tpu-vm ssh "$name" --worker=0 --command "$1"; }

create() {
  tpu queued-resources create "$name" --node-id "$name" --accelerator-type "$accelerator" --runtime-version "$runtime" \
    ${spot:+--spot}
}

state() { # of the request: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; empty where it does not exist
  tpu queued-resources describe "$name" --format "value(state.state)" || true
}

wait_until_active() { # train creates again what was preempted
  local now fresh=""
  while now=$(state); [ -z "$dry" ] && [ "$now" != ACTIVE ]; do
    case $now in
      "") fail "there is no slice $name in $zone; create it first." ;;
      FAILED | SUSPENDED)
        [ "$command" = train ] || fail "the slice $name is $now; delete it, then create it again."
        [ -n "$type" ] || fail "the slice $name is $now; with --type it is created again."
        printf '%s is %s and is created again\n' "$name" "$now" >&2
        tpu queued-resources delete "$name" --force --quiet
        create
        fresh=yes
        ;;
      *)
        printf '%s is %s\n' "$name" "$now" >&2
        sleep "${POLL:-30}"
        ;;
    esac
  done
  [ -z "$fresh" ] || install_project
}

# Runs on each host, in its home folder, after the archive has arrived there.
install=$(
  cat <<'REMOTE'
set -e
rm -rf tghmoe && mkdir tghmoe && tar -C tghmoe -xzf tghmoe.tar.gz && rm tghmoe.tar.gz
cd tghmoe
if [ ! -x ~/tghmoe-venv/bin/python ]; then # the system's Python may be too old
  python3 -m pip install --quiet --user uv
  ~/.local/bin/uv venv --quiet --seed --python 3.11 ~/tghmoe-venv
fi
~/tghmoe-venv/bin/pip install --quiet -r requirements.txt
~/tghmoe-venv/bin/pip install --quiet -e ".[tpu]"
REMOTE
)

install_project() { # packs all files that git does not ignore, unpacks and installs them on every host
  local root archive=/tmp/tghmoe.tar.gz # the name that a dry run shows: nothing is written there
  root=$(cd "$(dirname "$0")/.." && pwd)
  if [ -z "$dry" ]; then
    archive=$(mktemp -d)/tghmoe.tar.gz
    git -C "$root" ls-files -z --cached --others --exclude-standard |
      tar -C "$root" --null --files-from=- -czf "$archive"
  fi
  tpu tpu-vm scp "$archive" "$name:tghmoe.tar.gz" --worker=all
  on_all "$install"
  [ -n "$dry" ] || rm -r "$(dirname "$archive")"
}

# The run continues without the connection that started it, and holds a lock: a second start finds it and does nothing.
# Its log and its exit code are left in the home folder of each host.
start() {
  local arguments
  printf -v arguments ' %q' "$@"
  on_all "cd tghmoe && flock -n ~/tghmoe.lock rm -f ~/tghmoe.exit; (setsid nohup flock -n ~/tghmoe.lock sh -c \
'~/tghmoe-venv/bin/python -m tghmoe_jax.main \"\$@\"; echo \$? > ~/tghmoe.exit' tghmoe$arguments \
>> ~/tghmoe.log 2>&1 < /dev/null &)"
}

follow='tail -n 50 -F tghmoe.log & while [ ! -e tghmoe.exit ]; do sleep 2; done; sleep 1; kill $!'

train() {
  local code
  while :; do
    wait_until_active
    start "$@" || true # what is just being preempted does not answer
    on_first "$follow" || true
    code=$(on_first "cat tghmoe.exit" || true)
    [ -z "$dry" ] || return 0
    if [[ $code =~ ^[0-9]+$ ]] && [ "$code" -ne 75 ]; then
      return "$code"
    fi
    printf '%s %s; resuming\n' "$name" "$([ "$code" = 75 ] && echo 'was stopped' || echo 'does not answer')" >&2
    sleep "${POLL:-30}"
  done
}

# ---- the command ---------------------------------------------------------------------------------------------------

case $command in
  create) create ;;
  setup)
    wait_until_active
    install_project
    ;;
  train) train "$@" ;;
  status)
    tpu queued-resources describe "$name" --format "value(state.state)"
    tpu tpu-vm describe "$name" --format "value(state,health,acceleratorType)"
    ;;
  logs) on_first 'tail -n 200 -F tghmoe.log' ;;
  delete) tpu queued-resources delete "$name" --force --quiet ;;
esac
