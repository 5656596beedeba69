"""What grid.py has measured, as a page and a plot: `python result.py WORK TEACHER_RIGHT SECONDS COMMAND`."""

import json
import sys
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

work, teacher, seconds, command = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4]
runs = [json.loads(path.read_text())["ways"] for path in sorted(work.glob("[0-9]*.json"))]
ways = list(runs[0])
KINDS = ("greedy", "sampled")
shares = {kind: {way: [run[way][kind] for run in runs] for way in ways} for kind in KINDS}
speed = {way: fmean(run[way]["seconds"] for run in runs) for way in ways}
clean, noisy = ((work / f"{name}.jsonl").read_text().splitlines() for name in ("sft", "noisy"))
wrong = sum(map(str.__ne__, clean, noisy)) / len(clean)


def mean(way: str, kind: str = "greedy") -> float:
    return fmean(shares[kind][way])


def each(way: str, kind: str) -> str:
    return f"{mean(way, kind):.3f} ({', '.join(f'{share:.3f}' for share in shares[kind][way])})"


def of(key: str, value: float) -> str:
    """The mean of a row or column of the grid."""
    chosen = [way for way in grid if f"{key} {value:g}" in way.split(", ")]
    return f"{fmean(map(mean, chosen)):.3f}"


lines = [f"| {way} | {each(way, 'greedy')} | {each(way, 'sampled')} | {speed[way]:.1f} |" for way in ways]
grid = [way for way in ways if way.startswith("beta")]
best, worst = max(grid, key=mean), min(grid, key=mean)
above = [sum(mean(way, kind) > mean("SFT", kind) for way in grid) for kind in KINDS]
values = (0.0, 0.5, 1.0)
print(f"""# A small student with partly wrong labels learns sums from a larger teacher

Measured by `{command}` in {seconds} s on two cores.
{wrong:.0%} of the labels that the students see have a wrong digit; the teacher, four times as large, was trained on
right ones. {len(runs)} seeds, 150 steps of 96 sums after the same start on the same labels; the share of 200 held-out
sums that are right, greedily and drawn at temperature 1 (mean, and each seed), and the seconds of the steps. The
teacher's greedy share is {teacher:.3f}.

| | greedy | at temperature 1 | seconds |
|---|---|---|---|
{chr(10).join(lines)}

Of the {len(grid)} places of the grid {above[0]} are above further SFT greedily ({mean("SFT"):.3f}), and {above[1]} at
temperature 1 ({mean("SFT", "sampled"):.3f}). The best is {best} ({mean(best):.3f}), the worst {worst}
({mean(worst):.3f}). Means of the greedy shares, beta 0, 0.5 and 1: {", ".join(of("beta", value) for value in values)};
lmbda (share of steps on own answers) 0, 0.5 and 1: {", ".join(of("lmbda", value) for value in values)}. The reverse KL
divergence as a reward has {mean("reverse KL as a reward"):.3f} (the start {mean("start"):.3f}).

![shares of right sums](right.png)""")
figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
for axes, kind, title in zip(panels, KINDS, ("greedy answers", "answers at temperature 1"), strict=True):
    for at, way in enumerate(ways):
        axes.plot([at] * len(runs), shares[kind][way], ".", color="tab:blue")
        axes.plot(at, mean(way, kind), "_", color="black", markersize=16)
    axes.axhline(mean("SFT", kind), color="tab:red", linestyle=":", label="further SFT, mean")
    axes.set_xticks(range(len(ways)), ways, rotation=60, ha="right")
    axes.set_title(title, fontsize=10)
    axes.legend()
panels[0].axhline(teacher, color="tab:gray", linestyle=":", label="teacher")
panels[0].set_ylabel("held-out sums right")
panels[0].legend()
figure.tight_layout()
figure.savefig(Path(__file__).with_name("right.png"), dpi=90)
