"""The share of right sums: `python score.py MODEL held_out.jsonl` answers greedily, and once at temperature 1."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

model, held_out = sys.argv[1:]
rows = [json.loads(line) for line in Path(held_out).read_text().splitlines()]
shares = []
for temperature in ("0", "1"):
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "answers.jsonl")
        subprocess.run(
            [sys.executable, "-m", "megallm", "generate", "--model", model, "--prompts", held_out, "--temperature",
             temperature, "--max-new-tokens", "4", "--batch", "200", "--json", str(made)],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        first_lines = [json.loads(line)["text"].strip().split("\n")[0] for line in made.read_text().splitlines()]
    shares.append(sum(row["answer"] == line for row, line in zip(rows, first_lines, strict=True)) / len(rows))
print(f"{shares[0]:.3f} {shares[1]:.3f}")
