"""best.py prompts HELD_OUT OUT | answers SAMPLES OUT | result WORK SECONDS: eight answers to each prompt, and what the
scores say about them."""

from __future__ import annotations

import datetime
import json
import os
import sys
from itertools import groupby
from pathlib import Path
from statistics import fmean

from toy import answer, read, write

COUNT = 8


def accuracy(path: str) -> float:
    """The share of pairs whose right answer has the higher score."""
    return fmean(row["rewards"][0] > row["rewards"][1] for row in read(path))


def result(work: str, seconds: str) -> None:
    rows = [json.loads(line) for line in Path(f"{work}/reward/metrics.jsonl").read_text().splitlines()]
    first, last = (next(row for row in order if "val/accuracy" in row) for order in (rows, rows[::-1]))
    near, other = (accuracy(f"{work}/held_out-{kind}-scored.jsonl") for kind in ("near", "random"))
    groups = [list(found) for _, found in groupby(read(f"{work}/answers-scored.jsonl"), key=lambda row: row["prompt"])]
    right = [[row["completion"] == answer(row["prompt"]) for row in group] for group in groups]
    best = [max(zip(group, marks, strict=True), key=lambda both: both[0]["reward"])[1]
            for group, marks in zip(groups, right, strict=True)]  # fmt: skip
    print(f"""# Result: a reward model that tells right sums from wrong ones

Command: `bash examples/07_reward/run.sh` on {datetime.date.today()}, {os.cpu_count()} cores:
{seconds} s. A Llama of 0.8M parameters (4 layers, 128 wide) that learned to
add gives its body, the score's head starts from the seed; {rows[-1]["step"]} steps of 64 pairs.

| held-out pairs | right answer scored higher |
|---|---|
| wrong answer drawn at random | {other:.3f} |
| wrong answer sampled from the model itself (near misses) | {near:.3f} |

Held-out loss {first["val/loss"]:.3f} after {first["step"]} steps, {last["val/loss"]:.3f} at the end; accuracy of both
kinds together {first["val/accuracy"]:.3f} and {last["val/accuracy"]:.3f}. The exported folder gives transformers the
same logits (`LlamaForSequenceClassification`, `megallm convert --verify`).

| of {COUNT} samples (T = 1) for each of {len(groups)} held-out prompts | right |
|---|---|
| any one, on the average | {fmean(map(fmean, right)):.3f} |
| the one that the reward model likes best | {fmean(best):.3f} |
| at least one | {fmean(map(any, right)):.3f} |""")


if __name__ == "__main__":
    verb, source, out = sys.argv[1:4]
    if verb == "prompts":
        write(out, [row for row in read(source) for _ in range(COUNT)])
    elif verb == "answers":
        rows = [(row["prompt"], row["text"]) for row in read(source)]
        write(out, [{"prompt": asked, "completion": said if said.strip() else "?"} for asked, said in rows])
    else:
        result(source, out)
