#!/usr/bin/env bash
# A reward model on pairs of right and wrong sums, and the best of 8 samples by its scores:
#   bash examples/07_reward/run.sh [key=value ...]      settings replace those of both configurations
# It installs what it needs into .venv, writes to examples/07_reward/work and, at the end, RESULT.md. Started again after an
# interruption it goes on where it stopped. To start anew: rm -r examples/07_reward/work.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/07_reward
work=$here/work
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

source examples/progress.sh

say "1/6 megallm and its data"
[ -n "${NO_INSTALL:-}" ] || bash tools/install.sh
megallm=${MEGALLM:-.venv/bin/megallm}
python=${PYTHON:-.venv/bin/python}
begin=$(date +%s)
$python $here/toy.py data $work

say "2/6 the model that both examples start from learns to add a little"
$megallm sft $here/base.yaml "$@"

say "3/6 it answers: pairs of right and wrong answers"
if [ ! -e $work/near.jsonl ]; then
  for set in prompts held_out; do
    $megallm generate --model $work/base --prompts $work/$set.jsonl --temperature 1 --max-new-tokens 4 --batch 128 \
      --json $work/$set-samples.jsonl --overwrite
    $python $here/toy.py pairs $work/$set-samples.jsonl $work/$set-near.jsonl
    $python $here/toy.py pairs $work/$set-samples.jsonl $work/$set-random.jsonl random
  done
  cp $work/prompts-near.jsonl $work/near.jsonl
fi
$python $here/toy.py mix $work/pairs.jsonl $work/prompts-near.jsonl $work/prompts-random.jsonl
$python $here/toy.py mix $work/held_out_pairs.jsonl $work/held_out-near.jsonl $work/held_out-random.jsonl

say "4/6 the reward model, and its scores in transformers"
$megallm reward $here/reward.yaml "$@"
$megallm convert --to hf --input $work/reward --output $work/hf --verify --overwrite

say "5/6 eight answers to each held-out prompt, scored"
$python $here/best.py prompts $work/held_out.jsonl $work/eight.jsonl
$megallm generate --model $work/base --prompts $work/eight.jsonl --temperature 1 --max-new-tokens 4 --batch 128 \
  --json $work/eight-samples.jsonl --overwrite
$python $here/best.py answers $work/eight-samples.jsonl $work/answers.jsonl
for set in held_out-near held_out-random answers; do
  $megallm score --model $work/reward --input $work/$set.jsonl --output $work/$set-scored.jsonl --batch 128 --overwrite
done

say "6/6 RESULT.md"
$python $here/best.py result $work "$(($(date +%s) - begin))" > $here/RESULT.md.tmp
mv $here/RESULT.md.tmp $here/RESULT.md
cat $here/RESULT.md
say "done"
