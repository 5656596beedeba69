#!/usr/bin/env bash
# A model that adds right now and then and then learns to do so from rewards alone, with two seeds, and once at a
# learning rate that ruins it:
#   bash examples/08_grpo/run.sh [key=value ...]
# Settings are those of grpo.yaml, such as layout.tp=2 or rl.algorithm=dr_grpo. It writes to examples/08_grpo/work and
# goes on where it was stopped; RESULT.md is written anew from what was measured. To start anew: rm -r that folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/08_grpo
work=$here/work
source examples/progress.sh
[ -n "${NO_INSTALL:-}" ] || bash tools/install.sh
megallm=${MEGALLM:-.venv/bin/megallm}
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

say "1/4 SFT: a policy that is right now and then"
[ -e $work/held_out.jsonl ] || $python $here/make_data.py $work
$megallm sft $here/sft.yaml
[ -e $work/before.txt ] || $python $here/score.py $work/sft $work/held_out.jsonl > $work/before.txt
echo "greedy, at temperature 1: $(cat $work/before.txt)"
say "2/4 GRPO with two seeds at once (RUN/logs has what each of them says)"
train() { $megallm grpo $here/grpo.yaml run.dir=$work/$1 "${@:2}" > $work/$1.log 2>&1 || { tail -n 20 $work/$1.log >&2; return 1; }; }
train seed1 run.seed=1 "$@" & first=$!
train seed2 run.seed=2 "$@"
wait $first
tail -n 3 $work/seed1.log
say "3/4 the same at a learning rate twenty times as high"
train high optim.lr=8.0e-3 optim.warmup_steps=0 train.steps=40 "$@"
grep -h "warning" $work/high.log | head -n 3 || true
say "4/4 what came out"
for run in seed1 seed2 high; do
  $python $here/score.py $work/$run $work/held_out.jsonl > $work/$run.txt
done
$python $here/result.py $work "bash $here/run.sh $*" > $here/RESULT.md.tmp
mv $here/RESULT.md.tmp $here/RESULT.md
cat $here/RESULT.md
say "done"
