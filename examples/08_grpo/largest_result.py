"""What largest.sh has measured, as a page: `python largest_result.py WORK COMMAND SECONDS`."""

import json
import sys
from pathlib import Path

work, command, seconds = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
before, after = ((work / f"{name}.txt").read_text().split() for name in ("before", "after"))
steps = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
rewards = ", ".join(f"{row['reward']:.2f}" for row in steps)
took = sum(row["perf/step_seconds"] for row in steps) / len(steps)
held_out = len((work / "held_out.jsonl").read_text().splitlines())
print(f"""# GRPO with LoRA on SmolLM2-135M: the largest of three numbers

Measured by `{command}` in {seconds} s on two cores: {len(steps)} steps of 4 prompts x 12 answers, {took:.1f} s a step.
{held_out} held-out prompts with two examples each; the standard error of a share is at most 0.05.

| | greedy | temperature 1 |
|---|---|---|
| before | {before[0]} | {before[1]} |
| after {len(steps)} steps | {after[0]} | {after[1]} |

Mean rewards of the steps, whose groups of equal rewards were drawn anew: {rewards}.""")
