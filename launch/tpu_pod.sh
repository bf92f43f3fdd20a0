#!/usr/bin/env bash
# Trains on a Cloud TPU slice: creates the TPU VM, installs the project on every host, runs main on all of them.
# Needs an installed and authenticated gcloud; see launch/README.md. Nothing else in the project knows of a cloud.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/tpu_pod.sh COMMAND [options] [-- arguments of tghmoe_jax.main]

Commands
  create   create the TPU VM and install the project on all its hosts
  update   copy the present state of the repository to all hosts again
  run      run python -m tghmoe_jax.main on all hosts at once; ends when they end
  delete   delete the TPU VM (it costs money until then)

Options (or the environment variable in brackets)
  --name NAME          name of the TPU VM                        [TPU_NAME]     default tghmoe
  --zone ZONE          where it is                               [TPU_ZONE]     required
  --project PROJECT    the Google Cloud project                  [TPU_PROJECT]  default: gcloud's own
  --type TYPE          accelerator type, e.g. v5litepod-64       [TPU_TYPE]     required for create
  --version VERSION    runtime version, e.g. v2-alpha-tpuv5-lite [TPU_VERSION]  required for create
  --spot               create a preemptible VM; a killed run goes on from its last checkpoint
  --dry-run            print the gcloud commands and run none

Runs, base and data lie on a file system that all hosts mount; URLs are not read yet.
  launch/tpu_pod.sh run --zone us-west4-a -- --config configs/stage1.py:phi3v --workdir /mnt/shared/runs/stage1 \
    --config.base=/mnt/shared/phi3v --config.data.root=/mnt/shared/m3d
TEXT
}

fail() {
  printf '%s\n' "$1" >&2
  exit 2
}

name=${TPU_NAME:-tghmoe} zone=${TPU_ZONE:-} project=${TPU_PROJECT:-}
type=${TPU_TYPE:-} version=${TPU_VERSION:-} spot="" dry=""
command=${1:-}
case $command in
  create | update | run | delete) shift ;;
  -h | --help | help | "") usage; exit 0 ;;
  *) fail "Unknown command '$command': use create, update, run or delete." ;;
esac
while [ $# -gt 0 ]; do
  case $1 in
    --name | --zone | --project | --type | --version)
      [ $# -ge 2 ] || fail "$1 needs a value."
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --spot) spot=yes; shift ;;
    --dry-run) dry=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "Unknown option '$1': arguments of tghmoe_jax.main come after --." ;;
  esac
done
[ -n "$zone" ] || fail "Name the zone with --zone or TPU_ZONE."

tpu() {  # tpu VERB ARGUMENTS...: one gcloud command in this zone and project
  local line=(gcloud compute tpus tpu-vm "$@" --zone "$zone")
  [ -z "$project" ] || line+=(--project "$project")
  if [ -n "$dry" ]; then
    printf '%q ' "${line[@]}"
    printf '\n'
  else
    "${line[@]}"
  fi
}

# Runs on each host, in its home folder, after the archive has arrived there.
install=$(
  cat <<'REMOTE'
set -e
rm -rf tghmoe && mkdir tghmoe && tar -C tghmoe -xzf tghmoe.tar.gz && rm tghmoe.tar.gz
cd tghmoe
python=$(command -v python3.12 || command -v python3.11 || echo python3)
[ -x ~/tghmoe-venv/bin/python ] || "$python" -m venv ~/tghmoe-venv
pip="$HOME/tghmoe-venv/bin/pip install --quiet"
$pip -r requirements.txt
$pip --no-deps -e .
$pip "jax[tpu]==$(~/tghmoe-venv/bin/python -c 'import jax; print(jax.__version__)')" gcsfs
REMOTE
)

send() {  # packs all files that git does not ignore, unpacks and installs them on every host
  local root folder
  root=$(cd "$(dirname "$0")/.." && pwd)
  folder=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$folder'" EXIT
  [ -n "$dry" ] || git -C "$root" ls-files -z --cached --others --exclude-standard |
    tar -C "$root" --null --files-from=- -czf "$folder/tghmoe.tar.gz"
  tpu scp "$folder/tghmoe.tar.gz" "$name:tghmoe.tar.gz" --worker=all
  tpu ssh "$name" --worker=all --command "$install"
}

case $command in
  create)
    [ -n "$type" ] || fail "Name the accelerator type with --type or TPU_TYPE."
    [ -n "$version" ] || fail "Name the runtime version with --version or TPU_VERSION."
    tpu create "$name" --accelerator-type "$type" --version "$version" ${spot:+--spot}
    send
    ;;
  update) send ;;
  run)
    [ $# -gt 0 ] || fail "Name what to run, e.g. -- --config configs/stage1.py:phi3v --workdir /mnt/shared/run."
    printf -v arguments '%q ' "$@"
    # On a TPU VM jax.distributed finds the other hosts by itself.
    tpu ssh "$name" --worker=all --command "cd tghmoe && ~/tghmoe-venv/bin/python -m tghmoe_jax.main $arguments"
    ;;
  delete) tpu delete "$name" --quiet ;;
esac
