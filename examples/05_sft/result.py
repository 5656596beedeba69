"""RESULT.md of an example from what it measured: python result.py TITLE COMMAND SECONDS SCORES.jsonl RUN..."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from pathlib import Path

import torch


def run_lines(run: Path) -> list[str]:
    """What a run trained, and how its losses went."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    opening = next(line for line in (run / "logs" / "rank-0.log").read_text().splitlines() if "run folder" in line)
    seconds = sorted(row["perf/step_seconds"] for row in rows)[len(rows) // 2]
    saved = sum(path.stat().st_size for path in run.glob("checkpoints/step-*/*.safetensors"))
    return [
        f"- `{run.name}`: {opening}",
        f"  Loss {rows[0]['train/loss']:.3f} in step 1, {rows[-1]['train/loss']:.3f} in step {rows[-1]['step']}, held "
        f"out {rows[-1]['val/loss']:.3f} nats a token; {seconds:.2f} s a step (median), {rows[-1]['mem/peak_gib']:.2f} "
        f"GiB a process, checkpoint of {saved / 2**20:.1f} MiB.",
    ]


def main(title: str, command: str, seconds: str, scores: str, *runs: str) -> None:
    """Print the page."""
    now = datetime.date.today().isoformat()
    print(f"# {title}\n")
    print(f"Written by `{command}` on {now}: {seconds} s in all on {os.cpu_count()} cores ({platform.machine()}), load "
          f"average {os.getloadavg()[1]:.1f}, torch {torch.__version__}.\n")  # fmt: skip
    print("Held-out tasks, scored by transformers (and PEFT) in float32:\n")
    print("| model | nats a token of the answers | exactly right |\n|---|---|---|")
    for line in Path(scores).read_text().splitlines():
        row = json.loads(line)
        print(f"| {row['name']} | {row['nats']:.3f} | {row['exact']:.1%} of {row['tasks']} |")
    print()
    for run in runs:
        print("\n".join(run_lines(Path(run))))


if __name__ == "__main__":
    main(*sys.argv[1:])
