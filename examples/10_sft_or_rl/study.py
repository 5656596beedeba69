"""Held-out shares of every run, as a page and a picture: `python study.py WORK COMMAND SECONDS`."""

import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

work, command, seconds = Path(sys.argv[1]), sys.argv[2].strip(), sys.argv[3]
SAMPLES = 16
BOTH = "SFT, then GRPO"
RUNS = {"start": "start", "SFT": "sft", "GRPO": "grpo", BOTH: "sft_grpo", "CHORD-mu": "chord", "CHORD-phi": "chord_phi"}
SETS = {"in": "sums below 70", "out": "sums from 70 on", "kept": "differences"}


def answers(model: Path, rows: list[dict], temperature: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        asked, made = Path(folder, "asked.jsonl"), Path(folder, "made.jsonl")
        asked.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
        subprocess.run(
            [sys.executable, "-m", "megallm", "generate", "--model", str(model), "--prompts", str(asked),
             "--temperature", temperature, "--max-new-tokens", "4", "--batch", "400", "--json", str(made)],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return [json.loads(line)["text"] for line in made.read_text().splitlines()]


def measure(run: str) -> dict[str, float]:
    """Of each set the greedy share, the one that one, and that any of SAMPLES answers at temperature 1, has right."""
    sets = {name: [json.loads(line) for line in (work / f"{name}.jsonl").read_text().splitlines()] for name in SETS}
    everything = [row for rows in sets.values() for row in rows]
    many = [row for row in everything for _ in range(SAMPLES)]
    greedy = iter(map(right, everything, answers(work / run, everything, "0")))
    sampled = iter(map(right, many, answers(work / run, many, "1")))
    found = {}
    for name, rows in sets.items():
        found[name] = sum(next(greedy) for _ in rows) / len(rows)
        groups = [[next(sampled) for _ in range(SAMPLES)] for _ in rows]
        found[f"{name}1"] = sum(map(sum, groups)) / len(groups) / SAMPLES
        found[f"{name}16"] = sum(map(any, groups)) / len(groups)
    return found


def right(row: dict, text: str) -> bool:
    return row["answer"] == text


with ThreadPoolExecutor(2) as pool:
    found = dict(zip(RUNS, pool.map(measure, RUNS.values()), strict=True))
columns = {
    f"{key}{count}": f"{kind}, {label}"
    for key, label in SETS.items()
    for count, kind in (("", "greedy"), ("1", "pass@1"), ("16", "pass@16"))
}
figure, axes = plt.subplots(1, 3, figsize=(14, 3.6))
names = list(found)
panels = [SETS, *({f"{key}1": "pass@1", f"{key}16": "pass@16"} for key in ("in", "kept"))]
for axis, labels in zip(axes, panels, strict=True):
    width = 0.8 / len(labels)
    for place, (key, label) in enumerate(labels.items()):
        at = [i + width * (place - (len(labels) - 1) / 2) for i in range(len(names))]
        axis.bar(at, [found[name][key] for name in names], 0.94 * width, label=label)
for axis, title in zip(axes, ("greedy answers", "samples, sums below 70", "samples, differences"), strict=True):
    axis.set_xticks(range(len(names)), names, rotation=20, fontsize=8)
    axis.set_ylim(0, 1.3)  # room for the legend
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8, ncols=len(axis.containers), loc="upper center")
figure.tight_layout()
figure.savefig(Path(__file__).with_name("result.png"), dpi=110)


def change(name: str, key: str) -> str:
    return f"{found[name][key] - found['start'][key]:+.3f}"


def mean(rows: list[dict]) -> float:
    return sum(row["reward"] for row in rows) / len(rows)


def pair(name: str) -> str:
    return f"{found[name]['in']:.3f} and {found[name]['out']:.3f}"


def both(key: str) -> str:
    return f"SFT {change('SFT', key)}, GRPO {change('GRPO', key)}"


steps = [json.loads(line) for line in (work / "grpo" / "metrics.jsonl").read_text().splitlines()]
lines = [f"| {name} | {' | '.join(f'{each[key]:.3f}' for key in columns)} |" for name, each in found.items()]
print(f"""# Fine-tuning or reinforcement learning

Measured by `{command}` with one seed: {seconds} s of training on two cores,
then 200 held-out prompts of each kind, {SAMPLES} samples of each at temperature 1. The start knows sums and
differences; every run then trains {len(steps)} steps of 128 rows on sums whose first number is below 70: SFT from right
answers, GRPO from rewards, CHORD from both. The standard error of a greedy share is at most 0.035:
smaller differences say nothing.

| | {" | ".join(columns.values())} |
|---|{"---|" * len(columns)}
{chr(10).join(lines)}

![shares](result.png)

Against the start:

- In and out of distribution (Chu et al., arXiv 2501.17161), greedy: below 70 {both("in")}; from 70 on {both("out")}.
- pass@1 and pass@16 (Matsutani et al., arXiv 2509.21128), below 70: pass@1 {both("in1")}; pass@16 {both("in16")}.
  From 70 on: pass@1 {both("out1")}; pass@16 {both("out16")}.
- Forgetting (arXiv 2510.18874), of differences: greedy {both("kept")}; pass@1 {both("kept1")};
  pass@16 {both("kept16")}.
- Both, greedy below 70 and from 70 on: SFT, then GRPO, which has twice the steps, {pair(BOTH)};
  CHORD-mu {pair("CHORD-mu")}; CHORD-phi {pair("CHORD-phi")}.
- Reward of GRPO, first and last ten steps: {mean(steps[:10]):.3f} and {mean(steps[-10:]):.3f}.""")
