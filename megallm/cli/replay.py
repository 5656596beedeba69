"""`megallm replay`: run the batch of a step that was not finite again, and name the layer."""

from __future__ import annotations

import argparse
import dataclasses
import json

from megallm.cli.table import Command

PRECISIONS = ("fp64", "fp32", "bf16", "fp16")


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder")
    add("--step", type=int, required=True, metavar="N", help="step that was not finite")
    add("--rank", type=int, metavar="R", help="whose batch, where several were saved")
    add(
        "--precision",
        choices=PRECISIONS,
        default="fp64",
        help="numbers of the pass (default fp64: what only overflows the run's is finite)",
    )
    add("--json", action="store_true", help="print JSON")


def _run(args: argparse.Namespace) -> int:
    from megallm.training import rerun

    batch = rerun.saved_batch(args.run, args.step, args.rank)
    found = rerun.replay(batch, args.run, args.precision)
    if args.json:
        print(json.dumps({"about": batch.about, **dataclasses.asdict(found)}))
        return 0
    fault = batch.about["fault"]
    print(f"{batch.path}: in the run {fault['phase']} {fault['layer']}, rank {fault['ranks'][0]}")
    for row in batch.about["rows"]:
        print(f"  {json.dumps(row)}")
    print(f"weights: {found.weights}{'' if found.exact else ' (not those of the step itself)'}")
    for layer, largest in found.largest.items():
        print(f"  {layer:<48} largest {largest:.4g}")
    if found.layer is None:
        print(f"in {found.precision} everything is finite.")
    else:
        print(f"in {found.precision} the first that is not finite: {found.phase} {found.layer}.")
    return 0


COMMANDS = {"replay": Command(_arguments, _run)}
