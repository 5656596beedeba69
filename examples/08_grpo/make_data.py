"""Two-digit additions: `python make_data.py FOLDER` writes sft.jsonl, prompts.jsonl and held_out.jsonl (200 sums)."""

import json
import random
import sys
from pathlib import Path

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
sums = [(a, b) for a in range(10, 100) for b in range(10, 100)]
random.Random(0).shuffle(sums)
held_out, train = sums[:200], sums[200:]


def write(name: str, rows: list[dict]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


write("sft.jsonl", [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in train])
write("prompts.jsonl", [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in train])
write("held_out.jsonl", [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in held_out])
