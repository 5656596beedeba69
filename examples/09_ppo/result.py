"""What run.sh has measured, as a page: `python result.py WORK TOY COMMAND`."""

import json
import sys
from pathlib import Path

work, toy, command = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].strip()


def rows(run: str) -> list[dict]:
    return [json.loads(line) for line in (work / run / "metrics.jsonl").read_text().splitlines()]


def mean(part: list[dict], key: str) -> float:
    return sum(row[key] for row in part) / len(part)


def line(name: str, run: str) -> str:
    seen, (greedy, drawn) = rows(run), (work / f"{run}.txt").read_text().split()[:2]
    reward = f"{mean(seen[:5], 'reward'):.3f} -> {mean(seen[-10:], 'reward'):.3f}"
    known = " -> ".join(f"{mean(part, 'val_func/explained_variance'):.2f}" for part in (seen[:5], seen[-10:]))
    return f"| {name} | {greedy} | {drawn} | {reward} | {mean(seen[-10:], 'rl/kl'):.4f} | {known} |"


greedy, drawn = (toy / "before.txt").read_text().split()[:2]
one = rows("ppo")
phases = [f"{part} {sum(row.get(f'perf/{part}_seconds', 0) for row in one):.0f}"
          for part in ("rollout", "reward", "score", "update")]  # fmt: skip
print(f"""# PPO on sums of two numbers

Measured by `{command}`: {len(one)} steps of 64 prompts x 4 answers, two passes over them, 200 held-out sums.

| | greedy | temperature 1 | reward, first 5 -> last 10 steps | KL to the start, nats a token | critic explains |
|---|---|---|---|---|---|
| after SFT | {greedy} | {drawn} | | | |
{line("PPO", "ppo")}
{line("PPO-ptx, 0.2 x NLL of 16 right sums an update", "ptx")}

Seconds of PPO, one thread beside the other run: {", ".join(phases)}.""")
