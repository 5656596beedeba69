#!/usr/bin/env bash
# A mixture of experts (10.0M parameters, 4.5M active) beside the dense model of equal active size, three seeds each:
#   bash examples/04_moe/run.sh [SEED ...]
# The text is that of examples/01_pretrain, which is run first when its data are not there. Runs that are finished are
# not trained again; to start anew: rm -r examples/04_moe/work.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/04_moe
data=examples/01_pretrain/work/data/kjv_text_document.idx
seeds=("$@")
[ ${#seeds[@]} -gt 0 ] || seeds=(1 2 3)
for seed in "${seeds[@]}"; do
  case $seed in
    '' | *[!0-9]*) echo "run.sh: '$seed' is not a seed; give whole numbers such as 1 2 3." >&2; exit 2 ;;
  esac
done
bash tools/install.sh
[ -e $data ] || bash examples/01_pretrain/run.sh
for seed in "${seeds[@]}"; do
  for kind in dense moe; do
    echo "== $kind, seed $seed"
    .venv/bin/megallm pretrain $here/$kind.yaml run.seed="$seed" run.dir=$here/work/$kind-"$seed"
  done
done
.venv/bin/python $here/compare.py $here/work --margin 0.02
