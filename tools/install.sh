#!/usr/bin/env bash
# Make .venv with megallm in it, editable, extension built: tools/install.sh [EXTRAS, such as test]
# A second call returns at once unless setup.py, pyproject.toml, csrc or the constraints changed.
# PYTHON names the interpreter; a torch that it already has is used, else torch is installed first.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-}
base=${PYTHON:-python3}
venv=$PWD/.venv
python=$venv/bin/python

"$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "tools/install.sh: $base is older than Python 3.11; name another one with PYTHON=..." >&2; exit 2; }

stamp=$venv/megallm-installed-${extras:-plain}
state=$({ echo "$PWD $extras"; cat setup.py pyproject.toml tests/constraints.txt csrc/*/*.?pp; } | cksum)
if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && "$python" -c 'import torch, megallm' 2>/dev/null; then
  exit 0
fi

if ! [ -x "$python" ]; then
  site=()
  if "$base" -c 'import torch' 2>/dev/null; then site=(--system-site-packages); fi
  "$base" -m venv "${site[@]}" "$venv"
fi
pip() { "$python" -m pip --disable-pip-version-check -q "$@"; }
"$python" -c 'import torch' 2>/dev/null || pip install -c tests/constraints.txt torch
# Whatever torch is there stays: a build for this machine's GPU must not be replaced.
torch=$("$python" -W ignore -c 'import torch; print(torch.__version__)')
sed "s/^torch==.*/torch==$torch/" tests/constraints.txt > "$venv/constraints.txt"
rm -f megallm/_index*.so megallm/_ops*.so megallm/_collectives*.so
pip install -c "$venv/constraints.txt" -e ".${extras:+[$extras]}"
"$python" - <<'PY'
from megallm.base.extension import status
found = status()
if not found.loaded:
    print(f"*** megallm: {found.name} was NOT built; `pip install -v -e .` shows why. {found.detail} ***")
PY
echo "$state" > "$stamp"
