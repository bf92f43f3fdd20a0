#!/usr/bin/env bash
# A pod on this machine: N processes with M simulated devices each run the same command; see docs/hosts.md.
set -uo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/local_pod.sh N M [--dry-run] [-- arguments of tghmoe_jax.main]

Starts N processes of python -m tghmoe_jax.main with M simulated CPU devices each, which find each other on a free port
of this machine (or PORT). Their lines are prefixed with their number. SIGTERM and SIGINT are passed to one process,
which stops them all; when one fails, the others are ended. The exit code is that of the first process that failed.

  launch/local_pod.sh 2 4 -- --config configs/stage1.py --workdir runs/pod --config.train.batch=64
TEXT
}

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

[ $# -gt 0 ] || { usage; exit 0; }
case $1 in -h | --help | help) usage; exit 0 ;; esac
[ $# -ge 2 ] || fail "name the number of processes and of devices each, e.g. launch/local_pod.sh 2 4."
processes=$1 devices=$2 dry=""
shift 2
for number in "$processes" "$devices"; do
  [[ $number =~ ^[1-9][0-9]?$ ]] || fail "$number is no number from 1 to 99: give processes, then devices of each."
done
if [ "${1:-}" = --dry-run ]; then dry=yes; shift; fi
if [ $# -gt 0 ]; then
  [ "$1" = -- ] || fail "'$1' is unknown: arguments of tghmoe_jax.main come after --."
  shift
fi
[ $# -gt 0 ] || fail "name what to run, e.g. -- --config configs/stage1.py --workdir runs/pod."

python=${PYTHON:-python}
port=${PORT:-}
if [ -z "$port" ] && [ -n "$dry" ]; then port=8476; fi
if [ -z "$port" ]; then
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])') ||
    fail "$python does not run; name a Python with PYTHON=."
fi

command_of() { # command_of I: sets `line` to the command of process I
  line=("$python" -u -m tghmoe_jax.main "--coordinator=127.0.0.1:$port" "--process=$1" "--processes=$processes" "${@:2}")
}

if [ -n "$dry" ]; then
  for ((i = 0; i < processes; i++)); do
    command_of "$i" "$@"
    printf 'JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=%s' "$devices"
    printf ' %q' "${line[@]}"
    printf '\n'
  done
  exit 0
fi

export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices
declare -A number=() # of each process that lives, by its pid
for ((i = 0; i < processes; i++)); do
  command_of "$i" "$@"
  "${line[@]}" > >(sed -u "s/^/$i: /") 2> >(sed -u "s/^/$i: /" >&2) &
  number[$!]=$i
done
last=$!

trap 'kill -TERM "$last" 2> /dev/null' TERM INT

code=0 killer=""
while [ ${#number[@]} -gt 0 ]; do
  ended=""
  wait -n -p ended "${!number[@]}"
  status=$?
  [ -n "${ended:-}" ] || continue # a signal that was passed on
  unset "number[$ended]"
  if [ "$status" -ne 0 ] && [ "$code" -eq 0 ]; then
    code=$status
    # The others end by themselves, at the same step; but not where this one was killed and could not signal them.
    [ "$status" -eq 75 ] || (sleep "${GRACE:-60}" && kill -KILL "${!number[@]}" 2> /dev/null) > /dev/null 2>&1 &
    killer=$!
  fi
done
[ -z "$killer" ] || kill "$killer" 2> /dev/null
exit "$code"
