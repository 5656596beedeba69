"""The largest of three numbers, after two examples: `python largest_data.py FOLDER` writes train and held_out.jsonl."""

import json
import random
import sys
from pathlib import Path

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
draw = random.Random(0)
SHOWN = "Numbers: 17, 38, 52\nLargest: 52\n\nNumbers: 24, 91, 65\nLargest: 91\n\n"
triples = list({tuple(draw.sample(range(10, 100), 3)) for _ in range(700)})
draw.shuffle(triples)


def write(name: str, chosen: list[tuple[int, ...]]) -> None:
    rows = [
        {"prompt": f"{SHOWN}Numbers: {', '.join(map(str, three))}\nLargest:", "answer": str(max(three))}
        for three in chosen
    ]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


write("held_out.jsonl", triples[:100])
write("train.jsonl", triples[100:])
