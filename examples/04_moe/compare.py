"""Held-out losses of the mixtures beside those of the dense models: python compare.py FOLDER [--margin NATS]

FOLDER has the runs `dense-SEED` and `moe-SEED`. Exit code 1 when the mean over seeds of the mixtures is worse than that
of the dense models by more than the margin.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def rows_of(run: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def held_out(run: Path) -> float:
    """The last held-out loss of a run; ValueError when it has none."""
    losses = [row["val/loss"] for row in rows_of(run) if row.get("val/loss") is not None]
    if not losses:
        raise ValueError(f"{run}/metrics.jsonl has no val/loss: the run is not finished.")
    return losses[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description="mixtures of experts beside dense models of equal active size")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--margin", type=float, default=0.02, help="nats by which the mixtures may be worse")
    args = parser.parse_args()
    names = [run.name.removeprefix("moe-") for run in args.folder.glob("moe-*") if run.is_dir()]
    seeds = sorted(int(name) for name in names if name.isdecimal())
    if not seeds:
        print(f"compare.py: {args.folder} has no run moe-SEED: train them with run.sh.", file=sys.stderr)
        return 2
    try:
        pairs = [(held_out(args.folder / f"dense-{seed}"), held_out(args.folder / f"moe-{seed}")) for seed in seeds]
    except (OSError, ValueError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    print("seed   dense    moe      moe - dense   busiest expert over the mean")
    for seed, (dense, moe) in zip(seeds, pairs, strict=True):
        rows = rows_of(args.folder / f"moe-{seed}")
        busiest = [row["moe/load_balance"] for row in rows if "moe/load_balance" in row]
        losses = f"{seed:<6} {dense:.4f}   {moe:.4f}   {moe - dense:+.4f}"
        print(f"{losses}       {busiest[0]:.2f} first, {busiest[-1]:.2f} last")
    mean = sum(moe - dense for dense, moe in pairs) / len(pairs)
    print(f"mean of {len(pairs)}: {mean:+.4f} nats (it may be at most {args.margin:+.4f})")
    return int(mean > args.margin)


if __name__ == "__main__":
    raise SystemExit(main())
