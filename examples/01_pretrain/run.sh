#!/usr/bin/env bash
# From the text of the King James Bible to a 7M Llama trained on 4 processes (tp=2 x pp=2):
#   bash examples/01_pretrain/run.sh [key=value ...]      settings replace those of config.yaml
# It installs what it needs into .venv and writes to examples/01_pretrain/work. Started again after an interruption it
# goes on from the last checkpoint; when all is done it only shows the results again. To start anew: rm -r that folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/01_pretrain
work=$here/work
run=$work/run
for setting in "$@"; do
  case $setting in
    run.dir=*) run=${setting#run.dir=} ;;
    *=*) ;;
    *) echo "run.sh: '$setting' is not a setting; write it as key=value, such as train.steps=100." >&2; exit 2 ;;
  esac
done

source examples/progress.sh

say "1/6 install megallm into .venv"
if ! [ -e .venv ] && [ "$(df -Pk . | awk 'NR == 2 { print $4 }')" -lt 3000000 ]; then
  echo "run.sh: $PWD has less than 3 GB free, and PyTorch with its libraries needs that." >&2
  exit 2
fi
bash tools/install.sh
megallm=.venv/bin/megallm
python=.venv/bin/python
$python -W ignore -c 'import torch; print("torch", torch.__version__)'
gpu=no
if $python -W ignore -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then gpu=yes; fi
precision=()
if [ $gpu = no ] && [ -r /proc/cpuinfo ] && ! grep -qwE 'amx_bf16|avx512_bf16|bf16' /proc/cpuinfo; then
  echo "This CPU has no bf16 instructions and would emulate them, 3 to 14 times slower: training in fp32 instead."
  precision=(train.precision=fp32)
fi
if [ $gpu = no ] && ! [ -e "$run/checkpoints" ]; then
  echo "Text, tokenizer and preprocessing take a minute or two. Then, as measured on this machine just now:"
  $python -W ignore $here/estimate.py $here/config.yaml "${precision[@]}" "$@"
fi

# Whatever the prepared text depends on: when one of these changes, text and run are made anew.
state=$(cat "$here/kjv.txt.xz" "$here/corpus.py" | cksum)
if [ -e "$work" ] && [ "$(cat "$work/prepared" 2>/dev/null)" != "$state" ]; then
  echo "$work is unfinished, or made from another text: it is removed and made anew."
  rm -rf "$work"
fi
if ! [ -e "$work" ]; then
  mkdir -p "$work/data"
  say "2/6 text: one chapter a document"
  $python $here/corpus.py $here/kjv.txt.xz $work/kjv.jsonl
  head -c 120 $work/kjv.jsonl && echo ' ...'
  say "3/6 tokenizer: byte-level BPE of 4096 tokens"
  $megallm tokenizer train --input $work/kjv.jsonl --vocab-size 4096 --output $work/tokenizer
  say "4/6 preprocess: text to tokens"
  $megallm preprocess --input $work/kjv.jsonl --output $work/data/kjv --tokenizer $work/tokenizer --append-eod --workers 2
  $megallm data verify $work/data/kjv_text_document --vocab 4096
  echo "$state" > $work/prepared
fi

say "5/6 train: tp=2 x pp=2, 4 processes"
$megallm pretrain $here/config.yaml "${precision[@]}" "$@"

say "6/6 what came out"
$python $here/compare.py "$run" --margin 0.7
echo
echo "Samples (temperature 0.8, top-k 40), generated at tp=2 x pp=2:"
$megallm generate --model "$run" --layout tp=2,pp=2 --temperature 0.8 --top-k 40 --seed 1611 --max-new-tokens 48 \
  --prompt "In the beginning God" --prompt "And it came to pass, that" --prompt "The LORD is my"
echo "loss curve:  $run/plots/loss.png"
echo "metrics:     $run/metrics.jsonl"
echo "checkpoints: $run/checkpoints"
say "done"
