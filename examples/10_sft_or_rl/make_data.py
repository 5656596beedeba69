"""Sums and differences of two-digit numbers: `python make_data.py FOLDER`.

start.jsonl teaches both, over all numbers; train.jsonl and expert.jsonl have only sums whose first number is below 70.
Held out are such sums (in.jsonl), sums with a first number from 70 on (out.jsonl), and differences (kept.jsonl).
"""

import json
import random
import sys
from pathlib import Path

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
random.Random(0).shuffle(pairs)
near, far = [p for p in pairs if p[0] < 70], [p for p in pairs if p[0] >= 70]
HELD_OUT = 200


def rows(chosen: list[tuple[int, int]], sign: str, answer: str) -> list[dict]:
    return [{"prompt": f"{a}{sign}{b}=", answer: str(a + b if sign == "+" else a - b)} for a, b in chosen]


def write(name: str, content: list[dict]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))


seen = pairs[HELD_OUT:]
held = {*near[:HELD_OUT], *far[:HELD_OUT], *pairs[:HELD_OUT]}
start = [p for p in seen if p not in held]
write("start.jsonl", rows(start, "+", "completion") + rows(start, "-", "completion"))
write("train.jsonl", rows(near[HELD_OUT:], "+", "answer"))
write("expert.jsonl", rows(near[HELD_OUT:], "+", "completion"))
write("in.jsonl", rows(near[:HELD_OUT], "+", "answer"))
write("out.jsonl", rows(far[:HELD_OUT], "+", "answer"))
write("kept.jsonl", rows(pairs[:HELD_OUT], "-", "answer"))
