"""The toy of examples/11_dpo: sums of two numbers with two digits, a character a token.

toy.py data WORK            sums to learn, prompts to sample answers to, and 200 sums that are held out
toy.py pairs SAMPLES OUT    a pair of the right answer and the sampled one for each sample that is wrong
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

HELD_OUT, PROMPTS = 200, 4000


def read(path: str | Path) -> list[dict]:
    with open(path, encoding="utf-8") as lines:  # not splitlines: a text may hold other line breaks
        return [json.loads(line) for line in lines]


def write(path: str | Path, rows: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def answer(prompt: str) -> str:
    return str(sum(map(int, prompt.rstrip("=").split("+"))))


def data(work: str) -> None:
    Path(work).mkdir(parents=True, exist_ok=True)
    problems = [f"{a}+{b}=" for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(problems)
    held_out, learned = problems[:HELD_OUT], problems[HELD_OUT:]
    write(f"{work}/learn.jsonl", [{"prompt": one, "completion": answer(one)} for one in learned])
    write(f"{work}/held_out.jsonl", [{"prompt": one} for one in held_out])
    write(f"{work}/prompts.jsonl", [{"prompt": one} for one in learned[:PROMPTS]])


def pairs(samples: str, out: str) -> None:
    made = []
    for row in read(samples):
        right, wrong = answer(row["prompt"]), row["text"]
        if wrong.strip() and wrong != right:
            made.append({"prompt": row["prompt"], "chosen": right, "rejected": wrong})
    write(out, made)
    print(f"{len(made)} pairs in {out}")


if __name__ == "__main__":
    verb, rest = sys.argv[1], sys.argv[2:]
    {"data": data, "pairs": pairs}[verb](*rest)
