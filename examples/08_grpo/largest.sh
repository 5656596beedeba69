#!/usr/bin/env bash
# SmolLM2-135M-Instruct learns to name the largest of three numbers, from rewards alone and with LoRA, in ten steps:
#   bash examples/08_grpo/largest.sh [key=value ...]
# Settings are those of largest.yaml; LARGEST.md is written anew. To start anew: rm -r examples/08_grpo/work/largest.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/08_grpo
work=$here/work/largest
model=examples/02_huggingface/work/smollm2
source examples/progress.sh
[ -n "${NO_INSTALL:-}" ] || bash examples/05_sft/install.sh
megallm=${MEGALLM:-.venv/bin/megallm}
python=${PYTHON:-.venv/bin/python}
say "1/3 the model as it is"
[ -e $work/held_out.jsonl ] || $python $here/largest_data.py $work
[ -e $work/before.txt ] || OMP_NUM_THREADS=2 $python $here/score.py $model $work/held_out.jsonl > $work/before.txt
say "2/3 GRPO on two processes"
OMP_NUM_THREADS=1 $megallm grpo $here/largest.yaml "$@"
say "3/3 what came out"
OMP_NUM_THREADS=2 $python $here/score.py $work/run $work/held_out.jsonl > $work/after.txt
$python $here/largest_result.py $work "bash $here/largest.sh${*:+ $*}" "$SECONDS" > $here/LARGEST.md.tmp
mv $here/LARGEST.md.tmp $here/LARGEST.md
cat $here/LARGEST.md
say "done"
