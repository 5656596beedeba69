#!/usr/bin/env bash
# Pairs of a right sum and a near miss, learned by DPO and its kin: who prefers the right answer, and who still gives it?
#   bash examples/11_dpo/run.sh
# The model and the pairs are those of examples/07_reward, which is run first when they are not there. To start anew:
# rm -r examples/11_dpo/work.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/11_dpo
toy=examples/07_reward
work=$here/work
begin=$(date +%s)
[ -n "${NO_INSTALL:-}" ] || bash tools/install.sh
megallm=${MEGALLM:-.venv/bin/megallm}
python=${PYTHON:-.venv/bin/python}
[ -e $toy/work/near.jsonl ] || bash $toy/run.sh
train() { # name, verb, settings
  local name=$1 verb=$2
  shift 2
  $megallm "$verb" $here/dpo.yaml run.dir=$work/"$name" "$@"
  answer "$name" $work/"$name"
}
answer() { # name, model
  $megallm generate --model "$2" --prompts $toy/work/held_out.jsonl --max-new-tokens 4 --batch 128 \
    --json $work/"$1".jsonl --overwrite
}
mkdir -p $work
answer base $toy/work/base
train dpo dpo "$@"
train dpo_nll dpo dpo.rpo_alpha=1 "$@"
train ipo dpo dpo.loss=ipo "$@"
train simpo dpo dpo.loss=simpo "$@"
train orpo dpo dpo.loss=orpo "$@"
train lora dpo dpo.rpo_alpha=1 peft.method=lora optim.lr=2.0e-3 "$@"
train kto kto "$@"
$python $here/table.py $work "$(($(date +%s) - begin))" > $here/RESULT.md
cat $here/RESULT.md
