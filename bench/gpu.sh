#!/usr/bin/env bash
# Every GPU check on a machine that has torch and a CUDA compiler: bash bench/gpu.sh [OUT_FOLDER]
# Builds the extension, runs the tests that need a GPU, and the layout oracle on as many GPUs as there are.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-gpu-results}"
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$out/gpus.txt"
python setup.py build_ext --inplace >"$out/build.txt" 2>&1 || { tail -20 "$out/build.txt"; exit 1; }
python -m megallm doctor | tee "$out/doctor.txt"
status=0
python -m megallm oracle --json "$out/oracle.json" --overwrite | tee "$out/oracle.txt" || status=1
python -m pytest -q -m gpu tests -rs | tee "$out/tests.txt" || status=1
exit $status
