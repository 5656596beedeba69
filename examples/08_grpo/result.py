"""What run.sh has measured, as a page: `python result.py WORK COMMAND`."""

import json
import math
import sys
from pathlib import Path

work, command = Path(sys.argv[1]), sys.argv[2].strip()
SUMS = 200  # held out


def shares(name: str) -> list[float]:
    return [float(share) for share in (work / f"{name}.txt").read_text().split()[:2]]


def rows(run: str) -> list[dict]:
    return [json.loads(line) for line in (work / run / "metrics.jsonl").read_text().splitlines()]


def interval(share: float, n: int = SUMS) -> str:
    """A share with its 95 % interval (Wilson)."""
    middle, half = share + 1.92 / n, 1.96 * math.sqrt(share * (1 - share) / n + 0.96 / n**2)
    low, high = ((middle + side) / (1 + 3.84 / n) for side in (-half, half))
    return f"{share:.3f} ({max(low, 0):.2f} to {high:.2f})"


def mean(part: list[dict], key: str) -> float:
    return sum(row[key] for row in part) / len(part)


def line(name: str, run: str) -> str:
    greedy, drawn = shares(run)
    if run == "before":
        return f"| {name} | | {interval(greedy)} | {interval(drawn)} | | |"
    seen = rows(run)
    reward = f"{mean(seen[:5], 'reward'):.3f} -> {mean(seen[-10:], 'reward'):.3f}"
    entropy = f"{seen[0]['entropy']:.2f} -> {seen[-1]['entropy']:.2f}"
    return f"| {name} | {len(seen)} | {interval(greedy)} | {interval(drawn)} | {reward} | {entropy} |"


one = rows("seed1")
phases = [
    f"{part} {sum(row.get(f'perf/{part}_seconds', 0) for row in one):.0f}" for part in ("rollout", "reward", "update")
]
events = [json.loads(text) for text in (work / "high" / "events.jsonl").read_text().splitlines()]
warnings = [each["reason"] for each in events if "reason" in each and each.get("step")]
print(f"""# GRPO on sums of two numbers

Measured by `{command}`: 16 prompts x 16 answers a step, {SUMS} held-out sums, shares with 95 % intervals.

| | steps | greedy | temperature 1 | reward, first 5 -> last 10 steps | entropy, nats a token |
|---|---|---|---|---|---|
{line("after SFT", "before")}
{line("GRPO, seed 1", "seed1")}
{line("GRPO, seed 2", "seed2")}
{line("GRPO, learning rate x 20", "high")}

Seconds of seed 1, one thread beside the other seed: {", ".join(phases)}. Of the run at the high rate the monitor said:
""")
print("\n".join(f"> {text}" for text in warnings[:3]) or "> nothing")
