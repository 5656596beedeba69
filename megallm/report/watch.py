"""A run on a terminal: curves in one line each, what happened, how long it still takes. From files
only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megallm.report.chart import bin_points
from megallm.report.facts import RunFacts, read_run
from megallm.report.goodput import goodput
from megallm.run.console import EtaClock, MetricRow, format_line, format_seconds
from megallm.run.rows import LONG_FIELDS

BLOCKS = " ▁▂▃▄▅▆▇█"
SHOWN = (
    "train/loss",
    "val/loss",
    "train/grad_norm",
    "rl/reward_mean",
    "rl/kl",
    "rewards/accuracies",
    "perf/tokens_per_sec",
)
EVENTS = 5


def sparkline(values: Sequence[float], width: int) -> str:
    """Returns a curve of at most `width` block characters; "" without a finite value."""
    means = [b.mean for b in bin_points(list(enumerate(values)), width)]
    if not means:
        return ""
    low, high = min(means), max(means)
    levels = (len(BLOCKS) - 2) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[1 + round((value - low) * levels)] for value in means)


def draw(facts: RunFacts, width: int) -> RenderableType:
    """Returns what a terminal of `width` columns shows of a run."""
    table = Table.grid(padding=(0, 2))
    for name in SHOWN:
        values = [float(row[name]) for row in facts.rows if type(row.get(name)) in (int, float)]
        values = [value for value in values if math.isfinite(value)]
        if values:
            curve = sparkline(values, max(10, width - 46))
            table.add_row(
                Text(name, style="dim"), Text(f"{values[-1]:.5g}", style="bold"), Text(curve)
            )
    spent = goodput(facts.events, facts.rows)
    saved = next((e for e in reversed(facts.events) if e["event"] == "saved"), None)
    told = [f"{facts.path}: {facts.state}"]
    if facts.rows:
        row, last = facts.rows[-1], facts.checkpoints[0] if facts.checkpoints else None
        told.append(format_line(row, facts.steps, last, _eta(facts.rows, facts.steps)))
    told.append(
        f"goodput {spent.fraction:.1%} of {format_seconds(spent.wall)}"
        + (
            f", last save of step {saved['step']} {format_seconds(time.time() - saved['time'])} ago"
            if saved
            else ""
        )
    )
    lines: list[RenderableType] = [Text(line) for line in told]
    lines += [table, *(Text(_event(event), style="dim") for event in facts.events[-EVENTS:])]
    return Group(*lines)


def _eta(rows: Sequence[MetricRow], steps: int) -> float | None:
    clock, eta = EtaClock(steps), None
    for row in rows[-100:]:
        if row.get("perf/unix_time"):
            eta = clock.eta(row["step"], float(row["perf/unix_time"]))
    return eta


def _event(event: MetricRow) -> str:
    when = time.strftime("%H:%M:%S", time.localtime(float(event["time"])))
    hidden = ("time", "event", *LONG_FIELDS)
    told = {key: value for key, value in event.items() if key not in hidden}
    return f"{when}  {event['event']}  " + "  ".join(
        f"{key}={value}" for key, value in told.items()
    )


def watch(
    path: str, console: Console, seconds: float, ended: Callable[[], bool] = lambda: False
) -> None:
    """Show the run of a folder and look again every `seconds`, until nobody trains there any more.

    Errors: UsageError when it is no run folder.
    """
    facts = read_run(path)
    if not console.is_terminal or facts.holder is None:
        console.print(draw(facts, console.width), soft_wrap=True)
        return
    with Live(draw(facts, console.width), console=console, auto_refresh=False) as live:
        while facts.holder is not None and not ended():
            time.sleep(seconds)
            facts = read_run(path)
            live.update(draw(facts, console.width), refresh=True)
