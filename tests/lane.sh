#!/usr/bin/env bash
# One Python with the newest packages, as requirements.txt pins them for it: they are installed, both stages are trained
# shortened, the embedded reader answers, and the tests run.
# Usage: tests/lane.sh PYTHON [pytest arguments]     (keeps its environment in .cache/lane-PYTHON)
#   tests/lane.sh 3.13                               a full run: both stages and the quick tier
#   tests/lane.sh 3.13 tests/test_requirements.py    both stages and these tests alone
# Passes, and says so, on a machine without that Python.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?name a Python, as 3.13}
shift

python=
for candidate in "$(command -v "python$version" || true)" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python /usr/bin/"python$version"; do
  # A shim of a version manager may be on the path and start nothing.
  if [ -x "$candidate" ] && "$candidate" -c "import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "no Python $version on this machine: this lane was not tried"
  exit 0
fi

environment=.cache/lane-$version
[ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
export PATH="$PWD/$environment/bin:$PATH" PYTHONUNBUFFERED=1 JAX_PLATFORMS=cpu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# A part of the tests does without torch, which is larger than all the rest and serves tests/parity alone.
without=$([ $# -eq 0 ] || echo '/^(torch|bert-score)==/d;')
sed -E "$without s|^-r |-r $PWD/|" requirements-dev.txt > "$folder/requirements.txt"
python -m pip install -q --disable-pip-version-check -r "$folder/requirements.txt"
python -m pip check
python -c '
import sys, flax, jax
print("Python", sys.version.split()[0], "jax", jax.__version__, "flax", flax.__version__)'

step() {  # step NAME COMMAND...
  local name=$1 begun=$SECONDS
  shift
  "$@" > "$folder/output" 2>&1 || { cat "$folder/output"; echo "failed under Python $version: $name" >&2; exit 1; }
  printf '%-32s %4d s\n' "$name" "$((SECONDS - begun))"
}

# Compiles in a third of the time; the tests below choose for themselves.
quickly=(env JAX_NUM_CPU_DEVICES=1 JAX_DISABLE_MOST_OPTIMIZATIONS=1 JAX_COMPILATION_CACHE_DIR="$folder/programs" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0)
short=(--config.train.steps=3 --config.eval.items=4 --config.eval.calibration=0 --config.data.volumes=16 --config.data.root="$folder/data")
step "stage 1, shortened" "${quickly[@]}" python -m tghmoe_jax.main --config configs/stage1.py --workdir "$folder/stage1" "${short[@]}"
step "stage 2, shortened" "${quickly[@]}" python -m tghmoe_jax.main --config configs/stage2.py --workdir "$folder/stage2" \
  --config.init_from="$folder/stage1" "${short[@]}"
for stage in stage1 stage2; do
  [ -f "$folder/$stage/eval/3/metrics.json" ] || { echo "$stage left no metrics.json" >&2; exit 1; }
done
python -c '
import sys, nibabel
from tghmoe_jax.drawn import phantom
drawn = phantom.draw(20_005_003)
nibabel.save(nibabel.Nifti1Image(drawn.hu.transpose(2, 1, 0), [[-6, 0, 0, 0], [0, -6, 0, 0], [0, 0, 14, 0], [0, 0, 0, 1]]), sys.argv[1])
' "$folder/scan.nii.gz"
step "predict, the embedded reader" "${quickly[@]}" python -m tghmoe_jax.predict --volume "$folder/scan.nii.gz" --json \
  --question "Which phase is this?" --choices "non-contrast|arterial|portal venous|delayed"
grep -q '"text": "[A-D]. arterial"' "$folder/output" || { cat "$folder/output"; echo "not the answer of Python 3.11" >&2; exit 1; }
python -m pytest -q "$@"
