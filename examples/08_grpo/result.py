"""What run.sh has measured, as a page: `python result.py "GREEDY SAMPLED" "GREEDY SAMPLED" RUN`."""

import json
import sys
from pathlib import Path

before, after = (text.split() for text in sys.argv[1:3])
rows = [json.loads(line) for line in Path(sys.argv[3], "metrics.jsonl").read_text().splitlines()]
phases = {name: sum(row.get(f"perf/{name}_seconds", 0.0) for row in rows) for name in ("rollout", "reward", "update")}


def mean(part: list[dict], key: str) -> float:
    return sum(row[key] for row in part) / len(part)


print(f"""# GRPO on sums of two numbers

Written by run.sh from what it measured: {len(rows)} steps of 16 prompts x 16 answers, 200 held-out sums.

| | greedy | temperature 1 |
|---|---|---|
| after SFT | {before[0]} | {before[1]} |
| after GRPO | {after[0]} | {after[1]} |

Mean reward of the first five steps {mean(rows[:5], "reward"):.3f}, of the last ten {mean(rows[-10:], "reward"):.3f};
entropy {rows[0]["entropy"]:.3f} -> {rows[-1]["entropy"]:.3f} nats a token. Seconds: rollouts {phases["rollout"]:.0f},
rewards {phases["reward"]:.0f}, updates {phases["update"]:.0f}.""")
