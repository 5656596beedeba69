"""Held-out shares of every run, as a page and a picture: `python study.py WORK COMMAND`."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

work, command = Path(sys.argv[1]), sys.argv[2].strip()
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
    """Greedy share of each set; of sums the share that one, and that any of SAMPLES at temperature 1, has right."""
    sets = {name: [json.loads(line) for line in (work / f"{name}.jsonl").read_text().splitlines()] for name in SETS}
    everything = [row for rows in sets.values() for row in rows]
    said = answers(work / run, everything, "0")
    greedy = iter(row["answer"] == text for row, text in zip(everything, said, strict=True))
    found = {name: sum(next(greedy) for _ in rows) / len(rows) for name, rows in sets.items()}
    for name in ("in", "out"):
        rows = [row for row in sets[name] for _ in range(SAMPLES)]
        right = [row["answer"] == text for row, text in zip(rows, answers(work / run, rows, "1"), strict=True)]
        groups = [right[i : i + SAMPLES] for i in range(0, len(right), SAMPLES)]
        found[f"{name}1"], found[f"{name}16"] = sum(right) / len(right), sum(map(any, groups)) / len(groups)
    return found


found = {name: measure(run) for name, run in RUNS.items()}
columns = {
    "in": "greedy, below 70 (trained)", "out": "greedy, from 70 on", "kept": "greedy, differences",
    "in1": "pass@1, below 70", "in16": "pass@16, below 70",
    "out1": "pass@1, from 70 on", "out16": "pass@16, from 70 on",
}  # fmt: skip
figure, axes = plt.subplots(1, 2, figsize=(11, 3.6))
names = list(found)
for axis, labels in ((axes[0], SETS), (axes[1], {"in1": "pass@1", "in16": "pass@16"})):
    width = 0.8 / len(labels)
    for place, (key, label) in enumerate(labels.items()):
        at = [i + width * (place - (len(labels) - 1) / 2) for i in range(len(names))]
        axis.bar(at, [found[name][key] for name in names], 0.94 * width, label=label)
for axis, title in zip(axes, ("greedy answers", "samples, sums below 70"), strict=True):
    axis.set_xticks(range(len(names)), names, rotation=20, fontsize=8)
    axis.set_ylim(0, 1)
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8)
figure.tight_layout()
figure.savefig(Path(__file__).with_name("result.png"), dpi=110)


def change(name: str, key: str) -> str:
    return f"{found[name][key] - found['start'][key]:+.3f}"


def pair(name: str) -> str:
    return f"{found[name]['in']:.3f} and {found[name]['out']:.3f}"


weak = "" if found["start"]["in1"] > 0.2 else f"""
The start is right in {found["start"]["in1"]:.0%} of its answers only, so that rewards are rare and 80 steps of them
teach little: what stands here of GRPO and CHORD is about that. `train.stop_at` in start.yaml makes it better."""
lines = [f"| {name} | {' | '.join(f'{each[key]:.3f}' for key in columns)} |" for name, each in found.items()]
print(f"""# Fine-tuning or reinforcement learning

Measured by `{command}` with one seed: 200 held-out prompts of each kind, {SAMPLES} samples of each sum at temperature
1. The start knows sums and differences; every run then trains 80 steps of 128 rows on sums whose first number is
below 70.
The standard error of a share is at most 0.035: smaller differences say nothing.
{weak}

| | {" | ".join(columns.values())} |
|---|{"---|" * len(columns)}
{chr(10).join(lines)}

![shares](result.png)

- In and out of distribution (Chu et al., arXiv 2501.17161), against the start: SFT {change("SFT", "in")} below 70 and
  {change("SFT", "out")} from 70 on; GRPO {change("GRPO", "in")} and {change("GRPO", "out")}.
- Forgetting (arXiv 2510.18874), of differences: SFT {change("SFT", "kept")}, GRPO {change("GRPO", "kept")}.
- pass@1 and pass@16 (Matsutani et al., arXiv 2509.21128), below 70: SFT {change("SFT", "in1")} and
  {change("SFT", "in16")}; GRPO {change("GRPO", "in1")} and {change("GRPO", "in16")}.
- Both, greedy below 70 and from 70 on: SFT, then GRPO {pair(BOTH)}; CHORD-mu {pair("CHORD-mu")};
  CHORD-phi {pair("CHORD-phi")}.""")
