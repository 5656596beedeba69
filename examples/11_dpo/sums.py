"""Sums of reasoning-gym for SmolLM2, scored by its own scorer.

sums.py prompts WORK TRAIN HELD_OUT    prompts with three worked sums: sum_prompts.jsonl and sum_held_out.jsonl
sums.py pairs WORK                     right answers and sampled ones that the scorer refuses, of sum_samples.jsonl
sums.py score ANSWERS PROMPTS          the share of answers that the scorer takes
"""

from __future__ import annotations

import json
import sys
from functools import cache
from statistics import fmean

import reasoning_gym
from toy import read, write

SHOTS = "12 + 7 = 19\n5 + 43 = 48\n31 + 58 = 89\n"
SEEDS = {"sum_prompts": 1, "sum_held_out": 1_000_000}


@cache
def tasks(seed: int, count: int):
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2, "allow_negation": False}
    return reasoning_gym.create_dataset("chain_sum", size=count, seed=seed, **options)


def scored(row: dict) -> float:
    """The scorer's word on the first line of a sampled answer."""
    kind = tasks(1, 1)
    return kind.score_answer(row["text"].strip().partition("\n")[0].strip(), {"answer": row["answer"], "metadata": {}})


def prompts(work: str, *counts: str) -> None:
    known: set[str] = set()
    for (name, seed), count in zip(SEEDS.items(), map(int, counts), strict=True):
        rows = []
        for task in tasks(seed, 3 * count):
            asked = SHOTS + task["metadata"]["expression"] + " ="
            if len(rows) < count and asked not in known and "-" not in asked:
                known.add(asked)
                rows.append({"prompt": asked, "answer": task["answer"]})
        write(f"{work}/{name}.jsonl", rows)


def answered(path: str, questions: str) -> list[dict]:
    return [one | {"answer": two["answer"]} for one, two in zip(read(path), read(questions), strict=True)]


def pairs(work: str) -> None:
    rows = answered(f"{work}/sum_samples.jsonl", f"{work}/sum_prompts.jsonl")
    wrong = [row for row in rows if row["text"].strip() and scored(row) < 1]
    made = []
    for row in wrong:
        said = row["text"].strip().partition("\n")[0]
        made.append({"prompt": row["prompt"], "chosen": f" {row['answer']}", "rejected": f" {said}"})
    write(f"{work}/sum_pairs.jsonl", made)
    print(f"{len(wrong)} of {len(rows)} sampled answers are wrong: as many pairs")


def score(path: str, questions: str) -> None:
    print(json.dumps(fmean(scored(row) == 1 for row in answered(path, questions))))


if __name__ == "__main__":
    verb, rest = sys.argv[1], sys.argv[2:]
    {"prompts": prompts, "pairs": pairs, "score": score}[verb](*rest)
