"""Greedy continuations by transformers, compared with rows of `megallm generate`: python continue_text.py HF ROWS.jsonl

Both run in float32 on the same weights; the tokens must be the same. Prints the texts; exit code 1 when one differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers


def main(folder: Path, rows: Path) -> int:
    """Continue each row's prompt with transformers and compare; 0 when all are equal."""
    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    differing = 0
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = words(row["prompt"], return_tensors="pt", add_special_tokens=False)
        made = model.generate(**prompt, max_new_tokens=len(row["tokens"]), do_sample=False)
        tokens = made[0, prompt["input_ids"].shape[1] :].tolist()
        same = tokens == row["tokens"][: len(tokens)]
        differing += not same
        print(f"{row['prompt']}{words.decode(tokens)}\n  -> {'the same' if same else 'OTHER'} tokens as megallm's\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
