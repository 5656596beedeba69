#!/usr/bin/env bash
# A run on Slurm, from the repository's root: examples/slurm/submit.sh pretrain|sft|grpo [options] [key=value ..]
# What follows is given to `megallm launch`, the last of an option wins; --dry-run prints the batch script:
#     examples/slurm/submit.sh pretrain --nodes 4 --min-nodes 3 --partition gpu train.steps=5000
#     examples/slurm/submit.sh sft --dry-run
set -euo pipefail
verb=${1:?pretrain, sft or grpo}
case $verb in
pretrain) options=(--nodes 2 --gpus-per-node 8 --time 24:00:00) ;;
sft) options=(--nodes 1 --gpus-per-node 8 --time 4:00:00) ;;
grpo) options=(--nodes 1 --gpus-per-node 8 --time 12:00:00 --signal-seconds 300) ;;
*) echo "$verb: there is pretrain, sft and grpo" >&2; exit 2 ;;
esac
exec "${PYTHON:-.venv/bin/python}" -m megallm launch --slurm "${options[@]}" "$verb" "examples/slurm/$verb.yaml" "${@:2}"
