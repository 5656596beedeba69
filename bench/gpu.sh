#!/usr/bin/env bash
# Every GPU check on a machine that has torch and a CUDA compiler: bash bench/gpu.sh [OUT_FOLDER]
# Builds the extensions and the CUDA kernels, compares and times the kernels (docs/kernels.md), runs the tests that need a
# GPU, and the layout oracle on as many GPUs as there are. It needs torch, nvcc and pybind11; no network.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-gpu-results}"
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$out/gpus.txt"
python setup.py build_ext --inplace >"$out/build.txt" 2>&1 || { tail -20 "$out/build.txt"; exit 1; }
python -m megallm doctor | tee "$out/doctor.txt"
status=0
python bench/gpu_kernels.py --json "$out/kernels.json" | tee "$out/kernels.txt" || status=1
python -m megallm oracle --json "$out/oracle.json" --overwrite | tee "$out/oracle.txt" || status=1
if python -c 'import pytest, hypothesis' 2>/dev/null; then
  python -m pytest -q -m gpu tests -rs | tee "$out/tests.txt" || status=1
else
  echo "pytest or hypothesis is not installed: THE TESTS THAT NEED A GPU DID NOT RUN" | tee "$out/tests.txt"
  status=1
fi
exit $status
