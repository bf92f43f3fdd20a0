#!/usr/bin/env bash
# Whether the project works under Python 3.12 with the newest packages that its ranges allow, as in Colab: every module is
# imported, stage 1 takes a few steps, the embedded reader answers, and a notebook is executed.
# Usage: tests/smoke_newest.sh     (keeps its environment in .cache/newest; passes, and says so, without a Python 3.12)
set -euo pipefail
cd "$(dirname "$0")/.."
limit=300  # seconds for each step after the installation

python=
for candidate in "$(command -v python3.12 || true)" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python /usr/bin/python3.12; do
  # A shim of a version manager may be on the path and start nothing.
  if [ -x "$candidate" ] && "$candidate" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "no Python 3.12 on this machine: the newest packages were not tried"
  exit 0
fi

environment=.cache/newest
[ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
export PATH="$PWD/$environment/bin:$PATH" PYTHONUNBUFFERED=1 JAX_PLATFORMS=cpu
python -m pip install -qq --disable-pip-version-check --upgrade --upgrade-strategy eager -e ".[notebooks]" pytest pytest-xdist hypothesis filelock
python -m pip check
python -c '
import sys, flax, jax
print("Python", sys.version.split()[0], "jax", jax.__version__, "flax", flax.__version__)'

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export JAX_COMPILATION_CACHE_DIR="$folder/programs" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_DISABLE_MOST_OPTIMIZATIONS=1  # compiles in a third of the time

step() {  # step NAME COMMAND...
  local name=$1 begun=$SECONDS
  shift
  timeout "$limit" "$@" > "$folder/output" 2>&1 || { cat "$folder/output"; echo "failed with the newest packages: $name" >&2; exit 1; }
  printf '%-32s %4d s\n' "$name" "$((SECONDS - begun))"
}

step "imports" python -c '
import importlib, pkgutil, tghmoe_jax
for module in pkgutil.walk_packages(tghmoe_jax.__path__, "tghmoe_jax."):
    importlib.import_module(module.name)'
step "stage 1, a few steps" python -m tghmoe_jax.main --config configs/stage1.py --workdir "$folder/stage1" \
  --config.train.steps=3 --config.eval.every=0 --config.data.volumes=16 \
  --config.data.root="$folder/data"
[ "$(wc -l < "$folder/stage1/metrics.jsonl")" -eq 3 ] || { echo "stage 1 left no three records" >&2; exit 1; }
python -c '
import sys, nibabel
from tghmoe_jax.drawn import phantom
drawn = phantom.draw(20_005_003)
nibabel.save(nibabel.Nifti1Image(drawn.hu.transpose(2, 1, 0), [[-6, 0, 0, 0], [0, -6, 0, 0], [0, 0, 14, 0], [0, 0, 0, 1]]), sys.argv[1])
' "$folder/scan.nii.gz"
step "predict, the embedded reader" python -m tghmoe_jax.predict --volume "$folder/scan.nii.gz" --json \
  --question "Which phase is this?" --choices "non-contrast|arterial|portal venous|delayed"
grep -q '"text": "[A-D]. arterial"' "$folder/output" || { cat "$folder/output"; echo "not the answer of the pinned packages" >&2; exit 1; }
step "notebook" python -m pytest -q -m "" -p no:cacheprovider tests/test_notebooks.py -k "top_to_bottom and read_a_scan"
