"""The toy of examples/07_reward: sums of numbers with two digits, a character a token.

toy.py data WORK                        problems to learn, and others that are held out
toy.py pairs SAMPLES OUT [random]       pairs of the right answer and a wrong one: a sampled one, or a random number
toy.py mix OUT FILE...                  rows of several files, one of each in turn
"""

from __future__ import annotations

import json
import random
import sys
from itertools import chain, zip_longest
from pathlib import Path

HELD_OUT = 200
PROMPTS = 3000  # of the learned problems, to sample answers to


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


def pairs(samples: str, out: str, corrupt: bool) -> None:
    """A pair for each sampled answer that is wrong; with `corrupt` the wrong answer is any number."""
    draw, made = random.Random(1), []
    for row in read(samples):
        right = answer(row["prompt"])
        wrong = str(draw.randint(0, 198)) if corrupt else row["text"]
        if wrong.strip() and wrong != right:
            made.append({"prompt": row["prompt"], "chosen": right, "rejected": wrong})
    write(out, made)
    print(f"{len(made)} pairs in {out}")


def mix(out: str, names: list[str]) -> None:
    write(out, [row for row in chain(*zip_longest(*map(read, names))) if row is not None])


if __name__ == "__main__":
    verb, rest = sys.argv[1], sys.argv[2:]
    if verb == "data":
        data(rest[0])
    elif verb == "pairs":
        pairs(rest[0], rest[1], "random" in rest[2:])
    else:
        mix(rest[0], rest[1:])
