#!/usr/bin/env bash
# PPO: a policy and its critic on two-digit sums, from the same start as examples/08_grpo; with demonstrations in the same
# loss (PPO-ptx) as a second run beside it:
#   bash examples/09_ppo/run.sh [key=value ...]
# Settings are those of ppo.yaml. To start anew: rm -r examples/09_ppo/work.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/09_ppo
toy=examples/08_grpo
work=$here/work
source examples/progress.sh
[ -n "${NO_INSTALL:-}" ] || bash tools/install.sh
megallm=${MEGALLM:-.venv/bin/megallm}
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p $work

say "1/4 the policy of examples/08_grpo after SFT"
[ -e $toy/work/held_out.jsonl ] || $python $toy/make_data.py $toy/work
$megallm sft $toy/sft.yaml
[ -e $toy/work/before.txt ] || $python $toy/score.py $toy/work/sft $toy/work/held_out.jsonl > $toy/work/before.txt
say "2/4 PPO, and PPO-ptx at once"
$megallm ppo $here/ppo.yaml run.dir=$work/ptx "expert.sources={$toy/work/sft.jsonl: 1}" expert.mix=ptx expert.batch=16 \
  expert.mu_peak=0.2 expert.mu_valley=null "$@" > $work/ptx.log 2>&1 & beside=$!
$megallm ppo $here/ppo.yaml "$@"
wait $beside || { tail -n 20 $work/ptx.log >&2; exit 1; }
say "3/4 how good they are"
for run in ppo ptx; do $python $toy/score.py $work/$run $toy/work/held_out.jsonl > $work/$run.txt; done
say "4/4 what came out"
$python $here/result.py $work $toy/work "bash $here/run.sh $*" > $here/RESULT.md.tmp
mv $here/RESULT.md.tmp $here/RESULT.md
cat $here/RESULT.md
say "done"
