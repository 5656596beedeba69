"""`megallm oracle`: every layout against the reference in float64, and reductions left out on
purpose.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megallm.base.errors import CannotWrite, UsageError
from megallm.base.files import atomic_write_json
from megallm.base.progress import Progress, quiet
from megallm.models.config import ModelConfig
from megallm.oracle.compare import Verdict, run_row
from megallm.oracle.emulated_nccl import NAME as EMULATED
from megallm.oracle.fine_tuning import FINE_TUNING, as_trainer, control_row, fits_trainer
from megallm.oracle.pool import MAX_RANKS, Pool
from megallm.oracle.table import (
    CONTROLS,
    ROWS,
    Row,
    describe,
    row_for_layout,
    sample_rows,
)
from megallm.oracle.trainers import CONTROLS_OF, TRAINER_MISTAKES, TRAINERS
from megallm.parallel.comm import BREAKS

EXIT_FAILED = 70
PRETRAIN = "pretrain"
NAMES = BREAKS | TRAINER_MISTAKES
TYPICAL = {
    "gqa": "llama",
    "moe": "moe",
    "mla": "mla",
    "encoder": "bert",
}  # --model -> what --layout compares


def main(
    args: argparse.Namespace,
    write: Callable[[str], Any] = sys.stdout.write,
    progress: Progress = quiet,
) -> int:
    """Run the command and return the exit code, 0 or 70; `args` are those of `cli.oracle`.

    Raises UsageError (exit code 2) for what cannot be run.
    """
    check(args)
    if args.list:
        found = rows_of(args.model, args.trainer)
        listing = {"rows": [describe(row) for row in found], "reductions": BREAKS}
        return _report(args, listing, write, _list_lines(found, args.trainer), failed=False)
    rows = select_rows(args)
    broken = frozenset({args.break_name} if args.break_name else ())
    verdicts = []
    with closing(Pool()) as pool:
        for row in rows:
            progress(row.name, len(verdicts), len(rows), "rows")
            verdict = run_row(pool, row, broken, device_for(row, args.device))
            verdicts.append(verdict)
            write(line(verdict) + "\n")
    failed = sum(not verdict.passed for verdict in verdicts)
    summary = f"{len(rows) - failed} of {len(rows)} rows equal the reference"
    summary += f" with the reduction {args.break_name} left out" if args.break_name else ""
    document = {
        "model": args.model,
        "trainer": args.trainer,
        "break": args.break_name,
        "rows": [as_json(verdict) for verdict in verdicts],
    }
    return _report(args, document, write, [summary + "."], failed=failed > 0)


def check(args: argparse.Namespace) -> None:
    """Refuse what this oracle does not have."""
    if args.model not in ("all", *TYPICAL):
        raise UsageError(f"--model {args.model} is not known; it takes all, {', '.join(TYPICAL)}.")
    if args.trainer not in (PRETRAIN, *TRAINERS):
        raise UsageError(
            f"--trainer {args.trainer} is not known; it takes {', '.join((PRETRAIN, *TRAINERS))}."
        )
    names = NAMES if args.trainer != PRETRAIN else BREAKS
    if args.break_name is not None and args.break_name not in names:
        raise UsageError(
            f"--break {args.break_name} is no reduction; the names are {', '.join(names)}."
        )
    if args.layout is not None and args.layouts is not None:
        raise UsageError(
            "--layout names one layout and --layouts asks for random ones: give one of the two."
        )
    if args.layouts is not None and args.layouts < 1:
        raise UsageError(
            f"--layouts is {args.layouts}; it takes a number of random layouts of at least 1."
        )
    if args.json is not None and not Path(args.json).absolute().parent.is_dir():
        raise CannotWrite(f"--json {args.json} cannot be written: its folder does not exist.")


def kind_of(model: ModelConfig) -> str:
    """Returns which of TYPICAL a model is: an encoder sees whole documents or has another head than
    a language model.
    """
    if not model.causal or model.head != "lm":
        return "encoder"
    if model.moe.num_experts:
        return "moe"
    return "mla" if model.mla.kv_lora_dim or model.mtp.depth else "gqa"


def rows_of(kind: str, trainer: str = PRETRAIN) -> list[Row]:
    """Returns the rows of a trainer whose model is of this kind, or all."""
    found = ROWS if trainer == PRETRAIN else FINE_TUNING
    return [
        row for row in found if row.trainer == trainer and kind in ("all", kind_of(row.config))
    ]


def random_rows(kind: str, n: int, seed: int, trainer: str = PRETRAIN) -> list[Row]:
    """Returns the first `n` random rows of a kind, the same for the same seed."""
    drawn, found = n, []
    while len(found) < n:
        found = [row for row in sample_rows(drawn, seed) if kind in ("all", kind_of(row.config))]
        found = [row for row in found if trainer == PRETRAIN or fits_trainer(row, trainer)][:n]
        drawn *= 2
    return found if trainer == PRETRAIN else [as_trainer(row, trainer) for row in found]


def select_rows(args: argparse.Namespace) -> list[Row]:
    """One layout, random layouts, or the table; `--break` alone takes the row of the table made for
    that name.
    """
    if args.layout is not None:
        row = row_for_layout(args.layout)
        if args.model not in ("all", kind_of(row.config)):
            row = replace(row, model=TYPICAL[args.model])
        if args.trainer != PRETRAIN:
            row = _trained_by(row, args.trainer)
        if row.layout.world > MAX_RANKS:
            raise UsageError(
                f"--layout {args.layout} needs {row.layout.world} ranks; the oracle runs at most "
                f"{MAX_RANKS}."
            )
        return [row]
    if args.layouts is not None:
        return random_rows(args.model, args.layouts, args.seed or 0, args.trainer)
    if args.break_name is not None:
        return [_control(args.break_name, args.trainer)]
    return rows_of(args.model, args.trainer)


def _trained_by(row: Row, trainer: str) -> Row:
    if not fits_trainer(row, trainer):
        raise UsageError(
            f"--trainer {trainer} does not take the model of {row.name} here: experts have no "
            "prompt, latent attention no prefix, and encoders no answers."
        )
    return as_trainer(row, trainer)


def _control(name: str, trainer: str) -> Row:
    row = control_row(name, trainer)
    if row is None:
        raise UsageError(
            f"--break {name} has no row of --trainer {trainer} that must then fail; its names are "
            f"{', '.join(CONTROLS_OF[trainer])}. With --layout or --layouts it takes any."
        )
    return row


def device_for(row: Row, wanted: str) -> str:
    """Returns where a row runs: `auto` takes GPUs when there is one for each rank, since nccl wants
    a GPU of its own each.

    Raises UsageError when GPUs were asked for and there are too few.
    """
    if wanted == EMULATED:
        return EMULATED
    gpus = torch.cuda.device_count()
    if wanted == "cuda" and gpus < row.layout.world:
        raise UsageError(
            f"--device cuda: the row {row.name} needs a GPU for each of its {row.layout.world} "
            f"ranks, and {gpus} are here; --device auto runs such rows on the CPU."
        )
    return "cuda" if wanted != "cpu" and gpus >= row.layout.world else "cpu"


def as_json(verdict: Verdict) -> dict[str, Any]:
    """Returns the row of the report; an error that is not finite is null, and then the row does not
    pass.
    """
    return describe(verdict.row) | {
        "initial_weights_equal": verdict.initial,
        "loss": _finite(verdict.loss),
        "grads": {name: _finite(error) for name, error in verdict.grads.items()},
        "grad_norm": _finite(verdict.grad_norm),
        "weights": _finite(max(verdict.weights.values(), default=math.inf)),
        "weights_by_name": {name: _finite(error) for name, error in verdict.weights.items()},
        "rollout": _finite(verdict.rollout),
        "seconds": round(verdict.seconds, 3),
        "device": verdict.device,
        "problem": verdict.problem,
        "pass": verdict.passed,
    }


def line(verdict: Verdict) -> str:
    """One line of the table a person reads."""
    head = f"{'pass' if verdict.passed else 'FAIL'}  {verdict.row.name:<32} {verdict.row.layout_text:<22}"
    worst = max(
        [verdict.loss, verdict.grad_norm, *verdict.grads.values(), *verdict.weights.values(),
         verdict.rollout]
    )  # fmt: skip
    tail = f"worst {worst:.1e}" if verdict.passed else "; ".join(verdict.failures[:3])
    return f"{head} {verdict.device:<4} {verdict.seconds:5.1f} s  {tail}"


def _list_lines(rows: list[Row], trainer: str) -> list[str]:
    lines = ["Rows:"]
    for row in rows:
        told = {k: v for k, v in describe(row).items() if k not in ("name", "layout", "world")}
        lines.append(
            f"  {row.name:<32} {row.layout_text:<22} {json.dumps(told) if told else ''}".rstrip()
        )
    lines.append("Reductions (--break NAME leaves one out; the row that must then fail):")
    names = CONTROLS if trainer == PRETRAIN else CONTROLS_OF[trainer]
    rows_for = {name: control_row(name, trainer) for name in NAMES if name in names}
    return lines + [
        f"  {name:<18} {row.name if row else '':<12} {NAMES[name]}"
        for name, row in rows_for.items()
    ]


def _report(
    args: argparse.Namespace,
    document: dict[str, Any],
    write: Callable[[str], Any],
    lines: list[str],
    failed: bool,
) -> int:
    write("\n".join(lines) + "\n")
    if args.json is not None:
        atomic_write_json(args.json, document)
    return EXIT_FAILED if failed else 0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
