"""Labels of which a share is wrong: `python make_data.py WORK` reads WORK/sft.jsonl and writes WORK/noisy.jsonl."""

import json
import random
import sys
from pathlib import Path

work = Path(sys.argv[1])
WRONG = 0.3
draw = random.Random(1)


def noisy(answer: str) -> str:
    """The answer with one of its digits replaced by another, in a share of the rows."""
    if draw.random() >= WRONG:
        return answer
    at = draw.randrange(len(answer))
    return answer[:at] + draw.choice([digit for digit in "0123456789" if digit != answer[at]]) + answer[at + 1 :]


rows = [json.loads(line) for line in (work / "sft.jsonl").read_text().splitlines()]
made = [{**row, "completion": noisy(row["completion"])} for row in rows]
(work / "noisy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
