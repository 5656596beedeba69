#!/usr/bin/env bash
# What fine-tuning and reinforcement learning do to the same small model, four questions in one table and a picture:
#   bash examples/10_sft_or_rl/run.sh
# To start anew: rm -r examples/10_sft_or_rl/work.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/10_sft_or_rl
work=$here/work
source examples/progress.sh
[ -n "${NO_INSTALL:-}" ] || bash tools/install.sh
megallm=${MEGALLM:-.venv/bin/megallm}
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p $work
train() { $megallm $2 $here/$3.yaml run.dir=$work/$1 "${@:4}" > $work/$1.log 2>&1 || { tail -n 20 $work/$1.log >&2; return 1; }; }

say "1/4 a start that adds and subtracts, right now and then"
[ -e $work/kept.jsonl ] || $python $here/make_data.py $work
OMP_NUM_THREADS=2 $megallm sft $here/start.yaml
say "2/4 fine-tuning; rewards"
train grpo grpo grpo & beside=$!
train sft sft sft
train sft_grpo grpo grpo model.init=$work/sft
wait $beside
say "3/4 both: CHORD-mu and CHORD-phi"
train chord grpo grpo "expert.sources={$work/expert.jsonl: 1}" expert.batch=32 expert.mu_decay_steps=100 & beside=$!
train chord_phi grpo grpo "expert.sources={$work/expert.jsonl: 1}" expert.batch=32 expert.mu_peak=0.1 expert.mu_valley=null \
  expert.phi=true
wait $beside
say "4/4 sixteen answers to each held-out prompt"
$python $here/study.py $work "bash $here/run.sh" "$SECONDS" > $here/RESULT.md.tmp
mv $here/RESULT.md.tmp $here/RESULT.md
cat $here/RESULT.md
say "done"
