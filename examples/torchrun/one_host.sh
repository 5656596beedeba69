#!/usr/bin/env bash
# Pretraining on this machine with torchrun: examples/torchrun/one_host.sh CONFIG.yaml [key=value ..]
# RANKS processes (default: one a GPU, else 2). `megallm pretrain` starts its own ranks too; torchrun is for those whose
# cluster tools expect it. MAX_RESTARTS lets torchrun start the ranks again after a failure; they go on from the last
# checkpoint.
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
gpus=$("$python" -W ignore -c 'import torch; print(torch.cuda.device_count())')
exec "$python" -m torch.distributed.run --standalone --nproc-per-node="${RANKS:-$((gpus > 0 ? gpus : 2))}" \
    --max-restarts="${MAX_RESTARTS:-0}" -m megallm pretrain "$@"
