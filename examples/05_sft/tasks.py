"""Small tasks with known answers from reasoning-gym, as conversations: python tasks.py FOLDER [TRAIN] [HELD_OUT]"""

from __future__ import annotations

import json
import sys
from itertools import cycle, islice
from pathlib import Path

import reasoning_gym

TASKS = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "letter_counting": {"min_words": 2, "max_words": 4},
    "spell_backward": {"min_word_len": 3, "max_word_len": 4},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 20},
}


def rows(seed: int, count: int) -> list[dict]:
    """`count` tasks, each kind in turn."""
    kinds = [reasoning_gym.create_dataset(name, size=count, seed=seed, **options) for name, options in TASKS.items()]
    turns = zip(cycle(kinds), range(count), strict=False)
    made = []
    for kind, number in turns:
        task = kind[number // len(kinds)]
        talk = (("user", task["question"]), ("assistant", task["answer"]))
        made.append({"messages": [{"role": role, "content": text} for role, text in talk]})
    return made


def main(folder: Path, train: int = 384, held_out: int = 64) -> None:
    """Write train.jsonl, and held_out.jsonl without any task of it (task i of seed s is task i - 1 of seed s + 1)."""
    folder.mkdir(parents=True, exist_ok=True)
    known = [json.dumps(row) for row in rows(1, train)]
    unseen = [line for line in map(json.dumps, rows(1_000_000, 4 * held_out)) if line not in set(known)]
    for name, lines in (("train", known), ("held_out", list(islice(unseen, held_out)))):
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        print(f"{folder / name}.jsonl: {len(lines)} tasks")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
