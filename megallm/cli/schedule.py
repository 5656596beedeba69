"""`megallm schedule`: what each pipeline rank does when, as a grid, JSON, a picture or a trace.
Without torch.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from megallm.base import terminal
from megallm.base.errors import UsageError
from megallm.base.files import atomic_write_json
from megallm.cli.output import check_outputs, overwrite_argument
from megallm.cli.table import Command
from megallm.parallel import picture
from megallm.parallel.schedule import SCHEDULES, Placement, place, plan_schedule
from megallm.parallel.simulate import Cost, Deadlock, TimedAction, Timeline, simulate

if TYPE_CHECKING:
    from rich.console import Console

MAX_ACTIONS = 200_000
MAX_GRID_BOXES = 4_000
COSTS = {"F": "forward", "B": "backward", "W": "weight", "M": "message"}
NAME_WIDTH = 9  # columns before a row's boxes: "rank 12  "


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kind", required=True, choices=SCHEDULES, help="the schedule")
    parser.add_argument("--pp", type=int, required=True, metavar="N", help="pipeline ranks")
    parser.add_argument(
        "--chunks",
        type=int,
        metavar="N",
        help="stages a rank (default: 2 for interleaved and zb-v)",
    )
    parser.add_argument(
        "--micros", type=int, required=True, metavar="N", help="microbatches of a step"
    )
    parser.add_argument(
        "--group",
        type=int,
        metavar="N",
        help="microbatches that an interleaved chunk takes in turn (default pp)",
    )
    parser.add_argument(
        "--cost",
        default="",
        metavar="F=1,B=1,W=1,M=0",
        help="times of a chunk: forward, input gradient, weight gradient (a whole backward takes "
        "B + W); of a message",
    )
    parser.add_argument(
        "--json",
        metavar="F",
        help="write ranks, makespan, bubble_fraction, idle_fraction, peak_live",
    )
    parser.add_argument("--draw", metavar="F.svg|F.png", help="draw a picture")
    parser.add_argument(
        "--trace", metavar="F.json", help="write a trace for chrome://tracing or ui.perfetto.dev"
    )
    overwrite_argument(parser)


def _run(args: argparse.Namespace) -> int:
    cost = parse_cost(args.cost)
    if args.draw:
        picture.check_name(Path(args.draw))
    check_outputs(args, args.json, args.draw, args.trace)
    placement = _placement(args)
    timeline = _simulate(args, placement, cost)
    drawn = picture.Picture(timeline, placement, title(args, placement, timeline))
    if args.json:
        atomic_write_json(args.json, to_json(timeline))
    if args.draw:
        picture.save_picture(drawn, Path(args.draw))
    if args.trace:
        atomic_write_json(args.trace, picture.chrome_trace(drawn))
    _show(drawn)
    return 0


def _placement(args: argparse.Namespace) -> Placement:
    """Returns the placement; UsageError for a size that is no size, or too large to write down."""
    for name in ("pp", "chunks", "micros", "group"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; it must be at least 1.")
    default = 2 if args.kind == "interleaved" else SCHEDULES[args.kind].chunks or 1
    placement = place(args.kind, args.pp, args.chunks or default)
    actions = placement.num_stages * args.micros * 3
    if actions > MAX_ACTIONS:
        raise UsageError(
            f"--pp {args.pp} x chunks {placement.chunks} x --micros {args.micros} makes up to "
            f"{actions} actions; at most {MAX_ACTIONS}: take fewer microbatches."
        )
    return placement


def _simulate(args: argparse.Namespace, placement: Placement, cost: Cost) -> Timeline:
    plans = plan_schedule(args.kind, placement, args.micros, args.group)
    try:
        return simulate(plans, placement, cost)
    except Deadlock as error:
        raise UsageError(
            f"{error} With --group {placement.pp} (pp) or more it does not."
        ) from error


def parse_cost(text: str) -> Cost:
    """Returns `F=1,B=2` as a Cost; what is not named keeps its default. UsageError for anything
    else.
    """
    values: dict[str, float] = {}
    for item in filter(None, text.split(",")):
        name, equals, number = item.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if (
            name not in COSTS
            or not equals
            or not 0 <= value <= 1e9
            or (value < 1e-9 and name in "FB")
        ):
            raise UsageError(
                f"--cost '{item}' is not understood: write F=1,B=1,W=1,M=0 with numbers from 1e-9 "
                "to 1e9 (W and M may be 0)."
            )
        values[COSTS[name]] = value
    return Cost(**values)


def title(args: argparse.Namespace, placement: Placement, timeline: Timeline) -> str:
    """Returns one line that says what was simulated and what came out."""
    chunks = f", {placement.chunks} chunks" if placement.chunks > 1 else ""
    return (
        f"{args.kind}: {placement.pp} ranks{chunks}, {args.micros} microbatches; "
        f"bubble {timeline.bubble_fraction:.1%}, idle {timeline.idle_fraction:.1%}"
    )


def to_json(timeline: Timeline) -> dict[str, object]:
    """Returns the timeline as plain data."""
    return {
        "ranks": [[_slot_json(slot) for slot in row] for row in timeline.ranks],
        "makespan": timeline.makespan,
        "bubble_fraction": timeline.bubble_fraction,
        "idle_fraction": timeline.idle_fraction,
        "peak_live": timeline.peak_live,
    }


def _slot_json(slot: TimedAction) -> dict[str, object]:
    action = slot.action
    return {
        "op": action.op,
        "micro": action.micro,
        "stage": action.stage,
        "start": slot.start,
        "end": slot.end,
    }


# --- the grid
# --------------------------------------------------------------------------------------------------


def _show(drawn: picture.Picture) -> None:
    """Print the grid in bands no wider than the terminal (or COLUMNS, or 80), what its signs mean,
    and the figures.
    """
    console = terminal.console(highlight=False)
    boxes = sum(len(row) for row in drawn.timeline.ranks)
    if boxes > MAX_GRID_BOXES:
        rows, lines = [], [f"(the grid of {boxes} boxes is left out: use --draw or --json)"]
    else:
        rows, lines = grid(drawn), legend(drawn)
    widest = max((len(row) for row in rows), default=0)
    width = console.width if console.is_terminal else shutil.get_terminal_size().columns
    band = _band(drawn, max(24, width - NAME_WIDTH))
    for begin in range(0, widest, band):
        for number, row in enumerate(rows):
            name = f"rank {number - 1}" if number else "time"
            line = (
                Text(f"{name:<{NAME_WIDTH}}", style="dim")
                + row[begin : min(begin + band, len(row))]
            )
            _print(console, line)
        _print(console, Text(""))
    live = " ".join(str(peak) for peak in drawn.timeline.peak_live)
    for text in (
        *lines,
        drawn.title,
        f"makespan {drawn.timeline.makespan:g}, work of the busiest rank {drawn.timeline.work:g}",
        f"peak live activations (microbatch, stage) by rank: {live}",
    ):
        _print(console, Text(text))


def _scale(drawn: picture.Picture) -> tuple[float, float]:
    """(columns a unit of time, columns of the shortest box)."""
    slots = [slot for row in drawn.timeline.ranks for slot in row]
    room = 1 + max(len(_label(slot, drawn.placement)) for slot in slots)
    shortest = min(slot.end - slot.start for slot in slots if slot.end > slot.start)
    most = max(len(row) for row in drawn.timeline.ranks)
    scale = min(room / shortest, 4 * room * most / drawn.timeline.makespan)
    return scale, shortest * scale


def _band(drawn: picture.Picture, width: int) -> int:
    """Columns of one band, at most `width`: a multiple of the shortest box, so that no label is cut
    in two.
    """
    unit = max(1, round(_scale(drawn)[1]))
    return width // unit * unit or width


def legend(drawn: picture.Picture) -> list[str]:
    """Returns what the signs of the grid mean: those that it has."""
    ops = {slot.action.op for row in drawn.timeline.ranks for slot in row}
    means = {
        "F": "forward",
        "B": "input gradient" if "W" in ops else "backward",
        "W": "weight gradient",
    }
    signs = [f"{op}3 {word}" for op, word in means.items() if op in ops]
    lines = [f"{', '.join(signs)} of microbatch 3; - goes on; blank: the rank waits"]
    if drawn.placement.chunks > 1:
        last = chr(ord("a") + min(drawn.placement.chunks, 26) - 1)
        lines.append(
            f"a to {last} behind the number: model chunk of the rank, in order (F3a: its first)"
        )
    return lines


def _print(console: Console, line: Text) -> None:
    if console.is_terminal:
        console.print(line, no_wrap=True, overflow="ignore", crop=False)
    else:
        print(line.plain.rstrip())


def grid(drawn: picture.Picture) -> list[Text]:
    """Returns a ruler and a row for each rank, all to one scale: `F3` is microbatch 3 forward,
    `F3b` in the second chunk.
    """
    timeline, placement = drawn.timeline, drawn.placement
    scale, _ = _scale(drawn)
    ruler = Text(style="dim")
    for tick in picture.ticks(timeline.makespan):
        ruler.append(" " * max(0, round(tick * scale) - len(ruler)) + f"{tick:g}")
    rows = [ruler]
    for slots in timeline.ranks:
        row = Text()
        for slot in slots:
            row.append(" " * (round(slot.start * scale) - len(row)))
            width = round(slot.end * scale) - len(row)
            label = _label(slot, placement)
            if width > len(label):
                row.append(label + "-" * (width - len(label) - 1), style=_style(slot, placement))
                row.append(" ")
            else:
                row.append(label[: max(0, width)], style=_style(slot, placement))
        rows.append(row)
    return rows


def _label(slot: TimedAction, placement: Placement) -> str:
    chunk = chr(ord("a") + slot.action.stage // placement.pp % 26) if placement.chunks > 1 else ""
    return f"{slot.action.op}{slot.action.micro}{chunk}"


def _style(slot: TimedAction, placement: Placement) -> str:
    fill = picture.chunk_colour(slot.action.op, slot.action.stage // placement.pp, placement.chunks)
    return f"{picture.text_colour(fill)} on {fill}"


COMMANDS = {"schedule": Command(_arguments, _run)}
