"""What each precision does to the loss: one small model, the same tokens and start, trained once per precision.

    bash examples/01_pretrain/run.sh      # steps 1 to 4 prepare the text; any other dataset will do
    python bench/precision.py --data examples/01_pretrain/work/data/kjv_text_document --work runs/precision \\
        --plot docs/precision.png

Each run is `megallm pretrain` in a process of its own; a run that is already in --work is read, not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RUNS = {
    "fp32": ["train.precision=fp32"],
    "bf16": ["train.precision=bf16"],
    **{
        f"fp8 {recipe}": ["train.precision=fp8", f"train.fp8.recipe={recipe}"]
        for recipe in ("delayed", "tensorwise", "rowwise", "blockwise")
    },
}
MODEL = {
    "family": "llama", "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 768, "num_heads": 4, "num_kv_heads": 4,
    "vocab_size": 4096,
}  # fmt: skip
EXPERTS = {"top_k": 2, "ffn_hidden_size": 384}  # two of half the width: a token uses as much as of the dense model
SHOWN = 20  # steps at the end over which the loss is averaged


def settings(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The configuration that all runs share."""
    batch = {"global_batch": args.batch, "micro_batch": args.batch}
    return {
        "run": {"dir": str(folder), "seed": args.seed},
        "model": MODEL | ({"moe": EXPERTS | {"num_experts": args.experts}} if args.experts else {}),
        "data": {"sources": {args.data: 1.0}, "split": "95,5,0", "seq_len": args.seq_len},
        "train": {"steps": args.steps, **batch},
        "optim": {"lr": 2e-3, "min_lr": 2e-4, "warmup_steps": 10},
        "eval": {"batches": 16},
        "checkpoint": {"every": 0, "keep": 1},
        "log": {"every": 50, "plot": False},
    }


def train(name: str, args: argparse.Namespace) -> list[dict]:
    """The metrics of one run, a row a step."""
    folder = args.work / name.replace(" ", "-")
    metrics = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    if not rows or rows[-1]["step"] < args.steps:
        args.work.mkdir(parents=True, exist_ok=True)
        config = folder.with_suffix(".yaml")
        config.write_text(json.dumps(settings(args, folder)))  # JSON is YAML
        command = [sys.executable, "-m", "megallm", "pretrain", str(config), *RUNS[name]]
        subprocess.run(command, check=True)
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return rows


def mean_of_last(rows: list[dict]) -> float:
    losses = [row["train/loss"] for row in rows[-SHOWN:]]
    return sum(losses) / len(losses)


def plot(curves: dict[str, list[dict]], path: Path) -> None:
    """Loss curves, and how far each is from that of fp32 at the same step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    reference = [row["train/loss"] for row in curves["fp32"]]
    for name, rows in curves.items():
        steps, losses = [row["step"] for row in rows], [row["train/loss"] for row in rows]
        left.plot(steps, losses, label=name, linewidth=1)
        right.plot(steps, [a - b for a, b in zip(losses, reference, strict=True)], label=name, linewidth=1)
    left.set(xlabel="step", ylabel="training loss (nats)", title="loss")
    right.set(xlabel="step", ylabel="nats", title="loss less fp32's")
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="prefix of a dataset whose tokenizer has at most 4096 tokens")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--experts", type=int, default=0, help="feed-forward layers become so many experts; 0: dense")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    curves = {name: train(name, args) for name in args.only}
    print(f"{'precision':<16} {'loss, last ' + str(SHOWN):>14} {'less fp32':>10} {'held out':>9} {'s/step':>7}")
    for name, rows in curves.items():
        last = mean_of_last(rows)
        apart = last - mean_of_last(curves["fp32"]) if "fp32" in curves else float("nan")
        seconds = sorted(row["perf/step_seconds"] for row in rows)[len(rows) // 2]
        print(f"{name:<16} {last:>14.4f} {apart:>+10.4f} {rows[-1]['val/loss']:>9.4f} {seconds:>7.2f}")
    if args.plot:
        plot(curves, args.plot)


if __name__ == "__main__":
    main()
