"""What a person sees of a run: the live line, a panel on a terminal, the loss curve, TensorBoard.

All of it is made from the rows of metrics.jsonl, so that what is shown is what is recorded. Nothing
here may stop training: a closed terminal, a full disk or a missing package is told once and then
left out.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megallm.base import terminal
from megallm.base.errors import CannotWrite
from megallm.base.files import atomic_path
from megallm.base.redact import redacted_text
from megallm.run.rows import read_rows

log = logging.getLogger(__name__)

MetricRow = Mapping[str, Any]
MAX_POINTS = 2000  # of a curve in the picture


# --- the line
# --------------------------------------------------------------------------------------------------


def format_line(
    row: MetricRow, total_steps: int, last_checkpoint: int | None, eta_seconds: float | None
) -> str:
    """Returns one row as the log line, for example

    `step 1200/20000 | loss 2.4135 | gnorm 0.81 | lr 3.0e-4 | 18.2k tok/s (4.6k/dev) | mfu 41.2% |
    0.90 s | mem 3.1 GiB | ckpt 1150 | eta 4h41m` (in one line); what is not known is `-`, so the
    fields never move.
    """
    return " | ".join(
        f"{label} {value}".strip()
        for label, value in _fields(row, total_steps, last_checkpoint, eta_seconds)
    )


def _fields(
    row: MetricRow, total_steps: int, last_checkpoint: int | None, eta_seconds: float | None
) -> list[tuple[str, str]]:
    rate = f"{_show(row, 'perf/tokens_per_sec', format_count)} tok/s"
    return [
        ("step", f"{row['step']}/{total_steps}"),
        ("loss", _show(row, "train/loss", "{:.4f}".format)),
        ("gnorm", _show(row, "train/grad_norm", _format_norm)),
        ("lr", _show(row, "train/lr", format_lr)),
        ("", f"{rate} ({_show(row, 'perf/tokens_per_sec_per_device', format_count)}/dev)"),
        ("mfu", _show(row, "perf/mfu", "{:.1%}".format)),
        ("", f"{_show(row, 'perf/step_seconds', '{:.2f}'.format)} s"),
        ("mem", f"{_show(row, 'mem/peak_gib', '{:.1f}'.format)} GiB"),
        ("ckpt", "-" if last_checkpoint is None else str(last_checkpoint)),
        ("eta", "-" if eta_seconds is None else format_seconds(eta_seconds)),
    ]


def _show(row: MetricRow, key: str, form: Any) -> str:
    value = row.get(key)
    return "-" if value is None else form(value)


def format_count(value: float) -> str:
    """Returns three digits or so with a unit: 8.3, 812, 18.2k, 4.6M."""
    if value < 99.95:
        return f"{value:.1f}"
    if value < 999.5:
        return f"{value:.0f}"
    for unit in ("k", "M", "G"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f}{unit}"
    return f"{value / 1000:.1f}T"


def format_lr(value: float) -> str:
    """Returns two digits and an exponent without padding: 3.0e-4."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _format_norm(value: float) -> str:
    return format_lr(value) if 0 < value < 0.01 else f"{value:.2f}"


def format_seconds(seconds: float) -> str:
    """Returns the two largest units: 12s, 41m20s, 4h41m, 2d3h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600}h"


class EtaClock:
    """Time left, from the pace of the last steps: evaluation and saves count, the start-up does
    not.
    """

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._marks: deque[tuple[int, float]] = deque(maxlen=100)

    def eta(self, step: int, now: float) -> float | None:
        """Number of seconds until `total_steps` after `step` ended at time `now`; None until two
        steps were seen.
        """
        self._marks.append((step, now))
        (first, then), (last, latest) = self._marks[0], self._marks[-1]
        if last == first:
            return None
        return max(0, self.total_steps - step) * (latest - then) / (last - first)


# --- the reporter
# --------------------------------------------------------------------------------------------------


class Sink(Protocol):
    """Takes the row of each step: a loss curve, TensorBoard."""

    def add(self, row: MetricRow) -> None: ...
    def close(self) -> None: ...


class Reporter:
    """Shows a run on `stream`: a live panel when it is a terminal, else one plain line every
    `every` steps.

    `log_stream` (RUN/logs/rank-0.log) gets the plain lines either way. Rank 0 only; not collective.
    """

    def __init__(
        self,
        stream: TextIO,
        total_steps: int,
        every: int = 1,
        log_stream: TextIO | None = None,
        sinks: tuple[Sink, ...] = (),
    ) -> None:
        self.total_steps, self.every, self.sinks = total_steps, max(1, every), sinks
        self._streams = [log_stream] if log_stream else []
        self._clock = EtaClock(total_steps)
        console = self._console = terminal.console(stream)
        self._live: Live | None = None
        self._shown: Panel | Text = Text("")  # of the last step
        self._notes = _Notes(self)
        if console.is_terminal:
            self._live = Live(
                console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
            )
            self._on_terminal(self._live.start)
            self._notes.begin()
        else:
            self._streams.insert(0, stream)

    def step(self, row: MetricRow, last_checkpoint: int | None = None) -> None:
        """Show the row of a finished step; the keys are those of metrics.jsonl."""
        eta = self._clock.eta(row["step"], time.monotonic())
        for sink in self.sinks:
            sink.add(row)
        if self._live is not None:
            self._shown = _panel(row, self.total_steps, last_checkpoint, eta)
            self._on_terminal(partial(self._live.update, self._shown, refresh=True))
        if row["step"] % self.every == 0 or row["step"] == self.total_steps:
            self._write(format_line(row, self.total_steps, last_checkpoint, eta))
        if row.get("val/loss") is not None:
            self.note(f"step {row['step']}/{self.total_steps} | val loss {row['val/loss']:.4f}")

    def note(self, text: str) -> None:
        """Show a sentence: a save, a resume, a warning."""
        if self._live is not None:
            self._on_terminal(partial(self._live.console.print, Text(text)))
        self._write(text)

    def progress(self, text: str) -> None:
        """Show what the step is doing, below the panel of the last one; nothing where there is no
        terminal.
        """
        if self._live is not None:
            shown = Group(self._shown, Text(text, style="dim"))
            self._on_terminal(partial(self._live.update, shown, refresh=True))

    def draw(self, show: Callable[[Console], None]) -> None:
        """Let `show` print on the console where that is a terminal; elsewhere nothing is drawn."""
        if self._live is not None:
            self._on_terminal(partial(show, self._live.console))

    @property
    def on_terminal(self) -> bool:
        """Returns whether a panel is shown."""
        return self._live is not None

    def close(self, last_words: tuple[str, ...] = ()) -> None:
        """Draw and flush what is left; the last panel stays on the screen, `last_words` below
        it.
        """
        for sink in self.sinks:
            sink.close()
        self.abandon()
        for line in last_words:
            if self._console.is_terminal:
                self._on_terminal(partial(self._console.print, Text(line), soft_wrap=True))
            self._write(line)
        self._streams.clear()

    def abandon(self) -> None:
        """Give the terminal back, and write no file."""
        self._notes.end()
        if self._live is not None:
            self._on_terminal(self._live.stop)
            self._live = None

    def _on_terminal(self, action: Callable[[], Any]) -> None:
        """Do something with the panel; a terminal that is gone ends it."""
        try:
            action()
        except OSError as error:
            self._live = None
            log.warning("The terminal is gone (%s); the run goes on without a panel.", error)

    def _write(self, line: str) -> None:
        for stream in list(self._streams):
            try:
                stream.write(terminal.escaped(redacted_text(line)) + "\n")
                stream.flush()
            except (OSError, ValueError) as error:  # ValueError: the stream was closed
                self._streams.remove(stream)
                log.warning(
                    "Log lines can no longer be written (%s); the run goes on without them.", error
                )


class _Notes(logging.Handler):
    """Shows warnings above the panel: on stderr the next frame would be drawn over them."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.WARNING)
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self.reporter.note(record.getMessage())

    def begin(self) -> None:
        logging.captureWarnings(True)
        for name in ("megallm", "py.warnings"):
            logging.getLogger(name).addHandler(self)

    def end(self) -> None:
        if self in logging.getLogger("megallm").handlers:
            logging.captureWarnings(False)
        for name in ("megallm", "py.warnings"):
            logging.getLogger(name).removeHandler(self)


def _panel(
    row: MetricRow, total_steps: int, last_checkpoint: int | None, eta_seconds: float | None
) -> Panel:
    fields = _fields(row, total_steps, last_checkpoint, eta_seconds)
    table = Table.grid(padding=(0, 3))
    for start in range(1, len(fields), 3):
        table.add_row(
            *(
                Text.assemble((f"{label} " if label else "", "dim"), (value, "bold"))
                for label, value in fields[start : start + 3]
            )
        )
    bar = ProgressBar(total=total_steps, completed=row["step"])
    return Panel(
        Group(table, bar), title=f"step {fields[0][1]}", title_align="left", expand=False, width=72
    )


# --- the curve
# --------------------------------------------------------------------------------------------------


class LossCurve:
    """RUN/plots/loss.png: training and held-out loss over steps, drawn again at most every
    `seconds`.

    Starts with the rows that `metrics` (a metrics.jsonl) already has, so a resumed run draws its
    whole curve.
    """

    def __init__(
        self,
        path: Path,
        title: str,
        metrics: Path | None = None,
        seconds: float = 60.0,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self.path, self.title, self.seconds, self.guard = path, title, seconds, guard
        self._train, self._held_out = _Series(), _Series()
        self._tokens: tuple[int, float] | None = None
        self._drawn = time.monotonic()
        self._failed = False
        for row in read_rows(metrics) if metrics else ():
            self._take(row)

    def add(self, row: MetricRow) -> None:
        self._take(row)
        if time.monotonic() - self._drawn >= self.seconds:
            self.draw()

    def _take(self, row: MetricRow) -> None:
        for series, key in ((self._train, "train/loss"), (self._held_out, "val/loss")):
            if row.get(key) is not None:
                series.add(row["step"], row[key])
        if row.get("consumed_tokens") and row["step"]:
            self._tokens = (row["step"], row["consumed_tokens"])

    def close(self) -> None:
        self.draw()

    def draw(self) -> None:
        """Write the picture, whole or not at all; a failure is told once."""
        self._drawn = time.monotonic()
        if not (self._train.steps or self._held_out.steps):
            return
        try:
            with atomic_path(self.path) as temporary:
                self._figure().savefig(temporary, format="png", dpi=120)
                self.guard()  # drawing takes a while: is the folder still ours?
        except (OSError, ImportError, CannotWrite) as error:
            if not self._failed:
                log.warning("The loss curve cannot be drawn: %s", error)
            self._failed = True

    def _figure(self) -> Any:
        from matplotlib.backends.backend_agg import (
            FigureCanvasAgg,
        )  # 0.5 s to import: only when drawn
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.plot(*self._train.thinned(), label="training", linewidth=1)
        if self._held_out.steps:
            axes.plot(
                *self._held_out.thinned(), label="held out", linewidth=1.5, marker="o", markersize=3
            )
        axes.set(xlabel="step", ylabel="loss (nats per token)", title=self.title)
        axes.grid(alpha=0.3)
        axes.legend()
        if self._tokens is not None:
            per_step = self._tokens[1] / self._tokens[0]
            above = axes.secondary_xaxis(
                "top", functions=(lambda x: x * per_step, lambda x: x / per_step)
            )
            above.set_xlabel("consumed tokens")
        return figure


class _Series:
    """Steps and values, compact: 16 bytes a point."""

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def add(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)

    def thinned(self) -> tuple[list[float], list[float]]:
        """Returns at most MAX_POINTS points: means of equal groups."""
        group = -(-len(self.steps) // MAX_POINTS)
        if group <= 1:
            return list(self.steps), list(self.values)
        starts = range(0, len(self.steps), group)
        return _means(self.steps, starts, group), _means(self.values, starts, group)


def _means(values: array, starts: range, group: int) -> list[float]:
    return [sum(values[s : s + group]) / len(values[s : s + group]) for s in starts]


# --- TensorBoard
# --------------------------------------------------------------------------------------------------


class TensorBoard:
    """Event files in RUN/tensorboard, an option. Of a resumed run, earlier events after
    `first_step` are hidden.

    A missing package or a failing disk switches it off with one warning.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(path), purge_step=first_step + 1)
        except (
            ImportError,
            AttributeError,
            TypeError,
            OSError,
        ) as error:  # wrong versions fail in many ways
            log.warning(
                "TensorBoard is off: %s. Install the package 'tensorboard' to have it.", error
            )

    def add(self, row: MetricRow) -> None:
        if self._writer is None:
            return
        try:
            for key, value in row.items():
                if "/" in key and isinstance(value, int | float):
                    self._writer.add_scalar(key, value, row["step"])
        except OSError as error:
            self._off(error)

    def close(self) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._off(error)

    def _off(self, error: OSError) -> None:
        log.warning("TensorBoard is off from here on: %s.", error)
        self._writer = None
