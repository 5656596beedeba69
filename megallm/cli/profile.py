"""`megallm profile`: where the time of a step goes, for any configuration that trains."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from megallm.base.errors import UsageError
from megallm.base.files import atomic_write_text, writing
from megallm.cli.board import tell
from megallm.cli.config import DEFAULT, load_and_check, overrides_argument
from megallm.cli.table import Command
from megallm.launch.environment import RankEnv
from megallm.launch.start import start, world_size
from megallm.parallel.picture import to_svg
from megallm.run.config import JobConfig
from megallm.run.profile import RankProfile, StepSpan, draw_step, table
from megallm.training.kinds import KINDS


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file of a run that trains")
    overrides_argument(parser)
    parser.add_argument(
        "--kind",
        choices=tuple(KINDS),
        default=DEFAULT,
        help="the verb that the configuration is for (default: pretrain)",
    )
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="measured steps (3)")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="steps before them (2)")
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks to start on this machine")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder of profile.json, the traces and timeline.svg (default: profile in run.dir)",
    )


def _run(args: argparse.Namespace) -> int:
    if args.steps < 1 or args.warmup < 0:
        raise UsageError("--steps must be at least 1, and --warmup at least 0.")
    kind, world = KINDS[args.kind], world_size(args.nproc)
    asked = load_and_check(args.config, args.overrides, world, kind=kind)
    last = args.warmup + args.steps + 1
    if asked.train.steps < last:
        raise UsageError(
            f"train.steps is {asked.train.steps}, and {last} steps are needed: --warmup "
            f"{args.warmup}, --steps {args.steps} and one that is traced. Add train.steps={last}."
        )
    folder = Path(args.output or Path(asked.run.dir) / "profile")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="megallm-profile-") as scratch:
        words = [f"run.dir={scratch}", f"train.stop_at={last}", "checkpoint.every=0"]
        words += ["eval.every=0", "log.trace_step=null"]
        config = load_and_check(args.config, [*args.overrides, *words], world, kind=kind)
        kind.check_files(config)
        size = config.layout.grid().world
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # no lines about its own start and end
        work = (kind.module, config, str(folder), args.warmup, args.steps)
        preload = (kind.module, "megallm.training.profiling", "megallm.launch.group")
        start(_rank, work, size, None, preload)
    _report(folder, size)
    return 0


def _rank(
    env: RankEnv, module: str, config: JobConfig, folder: str, warmup: int, steps: int
) -> None:
    from megallm.base.heartbeat import HEARTBEAT
    from megallm.launch.group import process_group
    from megallm.parallel.mesh import Mesh
    from megallm.training.profiling import Profiler

    run = importlib.import_module(module).run
    with process_group(env) as device:
        mesh = Mesh.start(config.layout.grid(), device)
        profiler = HEARTBEAT.listener = Profiler(mesh, warmup, steps)
        try:
            run(config, mesh, "never", False, [])
        finally:
            HEARTBEAT.listener = None
        profiler.write(Path(folder))


def _report(folder: Path, world: int) -> None:
    """Print the table, and write it with the picture."""
    ranks = read_profiles(folder, world)
    lines = list(table(ranks))
    print("\n".join(lines))
    rows = [
        {
            "seconds": rank.seconds(),
            "parts": rank.parts(),
            "shares": rank.shares(),
            "traffic": rank.traffic,
            "device": rank.device,
        }
        for rank in ranks
    ]
    atomic_write_text(folder / "profile.json", json.dumps({"ranks": rows}, indent=1))
    picture = to_svg(draw_step([rank.steps[-1] for rank in ranks]))
    atomic_write_text(folder / "timeline.svg", picture)
    tell(
        f"written: {folder}/profile.json, {folder}/timeline.svg, and for chrome://tracing or "
        f"Perfetto {folder}/trace-rank-N.json."
    )


def read_profiles(folder: Path, world: int) -> list[RankProfile]:
    """Returns what each rank has written."""
    found = []
    for rank in range(world):
        row: dict[str, Any] = json.loads((folder / f"rank-{rank}.json").read_text())
        steps = [[StepSpan(**span) for span in spans] for spans in row.pop("steps")]
        found.append(RankProfile(steps, **row))
    return found


COMMANDS = {"profile": Command(_arguments, _run)}
