#!/usr/bin/env bash
# Pretraining on several hosts with torchrun. On every host, with the same arguments and a run folder that all of them see:
#     NODES=2 NODE_RANK=0 MASTER_ADDR=host0 examples/torchrun/hosts.sh CONFIG.yaml [key=value ..]     # on host0
#     NODES=2 NODE_RANK=1 MASTER_ADDR=host0 examples/torchrun/hosts.sh CONFIG.yaml [key=value ..]     # on host1
# RANKS processes a host (default: one a GPU, else 2). Name the network device with GLOO_SOCKET_IFNAME and
# NCCL_SOCKET_IFNAME where a host has several.
set -euo pipefail
: "${NODES:?the number of hosts}" "${NODE_RANK:?the number of this host, from 0}" "${MASTER_ADDR:?the address of host 0}"
python=${PYTHON:-.venv/bin/python}
gpus=$("$python" -W ignore -c 'import torch; print(torch.cuda.device_count())')
exec "$python" -m torch.distributed.run --nnodes="$NODES" --node-rank="$NODE_RANK" \
    --nproc-per-node="${RANKS:-$((gpus > 0 ? gpus : 2))}" \
    --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}" -m megallm pretrain "$@"
