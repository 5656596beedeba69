"""What grid.py has measured, as a page and a plot: `python result.py WORK TEACHER_RIGHT SECONDS`."""

import json
import sys
from pathlib import Path
from statistics import fmean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

work, teacher, seconds = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
runs = [json.loads(path.read_text())["ways"] for path in sorted(work.glob("[0-9]*.json"))]
ways = list(runs[0])
shares = {way: [run[way]["right"] for run in runs] for way in ways}
speed = {way: fmean(run[way]["seconds"] for run in runs) for way in ways}


def spread(values: list[float]) -> str:
    return f"{fmean(values):.3f} +- {stdev(values) if len(values) > 1 else 0:.3f}"


lines = [f"| {way} | {spread(shares[way])} | {speed[way]:.1f} |" for way in ways]
grid = [way for way in ways if way.startswith("beta")]
best, worst = max(grid, key=lambda way: fmean(shares[way])), min(grid, key=lambda way: fmean(shares[way]))
sft = fmean(shares["SFT"])
above = sum(fmean(shares[way]) > sft for way in grid)
print(f"""# A small student learns sums from a larger teacher

Written by run.sh from what it measured, in {seconds:.0f} s on two cores: students of an eighth of the teacher's size,
{len(runs)} seeds, 150 steps of 96 sums after the same start; the share of 200 held-out sums that greedy answers get
right (mean and standard deviation over seeds) and the seconds of the steps. The teacher has {teacher:.3f}.

| | right | seconds |
|---|---|---|
{chr(10).join(lines)}

Of the {len(grid)} places of the grid {above} are above further SFT ({sft:.3f}); the best is {best}
({fmean(shares[best]):.3f}), the worst {worst} ({fmean(shares[worst]):.3f}).

![shares of right sums](right.png)""")
figure, axes = plt.subplots(figsize=(7, 4))
for at, way in enumerate(ways):
    axes.plot([at] * len(runs), shares[way], ".", color="tab:blue")
    axes.plot(at, fmean(shares[way]), "_", color="black", markersize=16)
axes.axhline(teacher, color="tab:gray", linestyle=":", label="teacher")
axes.axhline(sft, color="tab:red", linestyle=":", label="further SFT, mean")
axes.set_xticks(range(len(ways)), ways, rotation=60, ha="right")
axes.set_ylabel("held-out sums right")
axes.legend()
figure.tight_layout()
figure.savefig(Path(__file__).with_name("right.png"), dpi=90)
