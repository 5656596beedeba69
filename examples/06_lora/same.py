"""Whether PEFT and transformers compute the same from an adapter and from the folder that it is merged into:
python same.py BASE ADAPTER MERGED TASKS.jsonl"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import peft
import torch
import transformers

COUNT = 16  # tasks


@torch.no_grad()
def main(base: str, adapter: str, merged: str, tasks: str) -> None:
    """Print the largest difference of logits, as a line of RESULT.md."""
    words = transformers.AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line)["messages"] for line in Path(tasks).read_text().splitlines()[:COUNT]]
    texts = [words.apply_chat_template(row, tokenize=False) for row in rows]
    load = transformers.AutoModelForCausalLM.from_pretrained
    beside = peft.PeftModel.from_pretrained(load(base, dtype=torch.float32), adapter).eval()
    into = load(merged, dtype=torch.float32).eval()
    worst, largest = 0.0, 0.0
    for text in texts:
        ids = torch.tensor([words(text, add_special_tokens=False)["input_ids"]])
        one, other = beside(ids).logits, into(ids).logits
        worst = max(worst, float((one - other).abs().max()))
        largest = max(largest, float(one.abs().max()))
    print(f"- LoRA's adapter beside the base in PEFT, and merged by `megallm merge --dtype fp32` in transformers: "
          f"logits of {len(texts)} tasks differ by at most {worst:.1e} (the largest is {largest:.1f}).")  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
