"""Everything a run writes for people and dashboards, behind one small interface; other ranks than 0
write nothing.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megallm.base.errors import CannotWrite, LeaseLost
from megallm.base.files import atomic_write_json
from megallm.base.output import FdWriter, LossyText
from megallm.checkpoint.reader import step_folders
from megallm.checkpoint.retention import quarantine
from megallm.checkpoint.store import RetentionPolicy
from megallm.parallel import picture
from megallm.parallel.schedule import Placement
from megallm.parallel.simulate import Timeline
from megallm.run.changes import Change, table_of
from megallm.run.config import JobConfig
from megallm.run.console import Console, LossCurve, Reporter, Sink, TensorBoard
from megallm.run.divergence import DivergenceDetector
from megallm.run.interval import FailureRate, failure_rate
from megallm.run.lease import Lease
from megallm.run.rows import Events, Metrics, read_rows
from megallm.run.runfolder import RunFolder, shown_yaml
from megallm.run.trackers import Trackers

STOPPING = "stopping when this step is done"
DIGEST = "guard/weights_digest"  # its name in metrics.jsonl

log = logging.getLogger(__name__)


class Recorder:
    """metrics.jsonl, events.jsonl, the live line and the plot of one run; a context manager.

    Made on every rank; only rank 0 takes the lease and writes, and asks the lease before each
    write. Errors on entering: `CannotWrite` when the folder cannot be written or another job holds
    it; later `LeaseLost`.
    """

    def __init__(self, config: JobConfig, rank: int, own_log: bool = False) -> None:
        self.config, self.writes, self.own_log = config, rank == 0, own_log
        self.log: LossyText | None = None
        self.folder = RunFolder(config.run.dir)
        self.last_checkpoint: int | None = None
        self.proven: int | None = (
            None  # the newest checkpoint whose state gave a sound step afterwards
        )
        self.soundness = DivergenceDetector()
        self.last_words: tuple[str, ...] = ()  # shown at the end of a run without an error
        self.changes: Sequence[Change] = ()  # of the configuration since the last start
        # Digests of steps that were made before and are made again; none in another environment.
        self.digests: dict[int, str] = {}

    @property
    def checkpoints(self) -> Path:
        return self.folder.checkpoints

    def __enter__(self) -> Recorder:
        if self.writes:
            self.folder.prepare()
            self.lease = Lease(self.folder)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.writes:
            return
        try:
            self.lease.check()
            if self.started:
                self._close(f"{kind.__name__}: {error}" if kind is not None else None)
        except LeaseLost:
            if self.started:
                self.reporter.abandon()
                self.metrics.abandon()
                self.events.abandon()
            if kind is None or not issubclass(kind, LeaseLost):
                raise
        finally:
            self.lease.release()

    def _close(self, reason: str | None) -> None:
        self.reporter.close(self.last_words if reason is None else ())
        if reason is not None:
            self.events.add("stopped", reason=reason)
        self.metrics.close()
        self.events.close()
        if self.log is not None:
            os.close(self.log.fileno())

    started = False

    def start(self, resumed_step: int, environment: dict[str, Any]) -> None:
        """Open the files, cutting metrics later than the step that is resumed; 0 is a fresh run."""
        if not self.writes:
            return
        config = self.config
        self.lease.check()
        self.folder.write_config(shown_yaml(config))
        same = self.folder.write_environment(environment)
        goes_back = False  # to where it reads other batches than it did
        for event in read_rows(self.folder.events):
            back = event.get("event") == "rollback"
            goes_back = back or (goes_back and event.get("event") not in ("resumed", "started"))
        last: dict[str, Any] = {}
        for last in read_rows(self.folder.metrics):
            if same and not goes_back and last.get("step", 0) > resumed_step and last.get(DIGEST):
                self.digests[last["step"]] = last[DIGEST]
        self.metrics = Metrics(self.folder.metrics, resumed_step, self.lease.check)
        self.events = Events(self.folder.events, self.lease.check)
        for row in read_rows(self.folder.metrics):
            self.soundness.see(row)
        self.proven = resumed_step or None
        sinks: list[Sink] = []
        if config.log.plot:
            name = Path(config.run.dir).name
            path, metrics = self.folder.plots / "loss.png", self.folder.metrics
            sinks.append(LossCurve(path, f"loss of {name}", metrics, guard=self.lease.check))
        if config.log.tensorboard or "tensorboard" in config.log.trackers:
            sinks.append(TensorBoard(self.folder.path / "tensorboard", resumed_step))
        sinks.append(Trackers(config.log.trackers, self.folder.path, config.log.project))
        if self.own_log:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self.log = LossyText(FdWriter(os.open(self.folder.log_path(0), flags, 0o644)))
        self.reporter = Reporter(
            sys.stdout, config.train.steps, config.log.every, self.log, tuple(sinks)
        )
        self.last_checkpoint = resumed_step or None
        self.started = True
        lost = last.get("step", 0) - resumed_step
        fields = {"lost_steps": lost, "lost_until": last.get("perf/unix_time")} if lost > 0 else {}
        self.events.add("resumed" if resumed_step else "started", step=resumed_step, **fields)

    def row(self, row: dict[str, Any]) -> None:
        """Record the metrics of one finished step."""
        if not self.writes:
            return
        self.lease.check()
        self.soundness.see(row)
        if self.soundness.bad_since is None:
            self.proven = self.last_checkpoint
        self.metrics.append(row)
        self.reporter.step(row, self.last_checkpoint)

    def event(self, kind: str, **fields: Any) -> None:
        """Record something that happened; a dashboard reads it from events.jsonl."""
        if self.writes:
            self.events.add(kind, **fields)

    def note(self, text: str) -> None:
        """Show a sentence for whoever watches."""
        if self.writes:
            self.reporter.note(text)

    def progress(self, text: str) -> None:
        """Show what a step is doing, to whoever watches at a terminal."""
        if self.writes:
            self.reporter.progress(text)

    def draw(self, show: Callable[[Console], None]) -> None:
        """Let `show` print for whoever watches at a terminal."""
        if self.writes:
            self.reporter.draw(show)

    def stopping(self, name: str) -> None:
        """Say that a signal was heard. Of Ctrl-C the launcher tells, except where a panel would
        hide its words.
        """
        if name != "SIGINT":
            self.note(f"{name}: {STOPPING}")
        elif self.writes and self.reporter.on_terminal:
            self.note(f"{STOPPING}; press Ctrl-C again to stop at once")

    def pipeline(self, timeline: Timeline | None, placement: Placement, step: int) -> None:
        """Draw how one step ran: plots/pipeline.svg, and a trace for chrome://tracing."""
        if timeline is None or not self.writes:
            return
        self.lease.check()
        title = (
            f"{self.config.layout.schedule} as it ran in step {step}: idle "
            f"{timeline.idle_fraction:.1%}"
        )
        drawn = picture.Picture(timeline, placement, title, unit="s")
        try:
            picture.save_picture(drawn, self.folder.plots / "pipeline.svg")
            atomic_write_json(self.folder.plots / "pipeline.json", picture.chrome_trace(drawn))
        except (OSError, CannotWrite) as error:
            log.warning("The picture of the pipeline cannot be drawn: %s", error)

    def before_save(self) -> None:
        """Check, before a checkpoint is saved, that the rows it counts on are durable and the
        folder is still ours.
        """
        if self.writes:
            self.lease.check()
            self.metrics.sync()

    def keeping(self, newest: int) -> RetentionPolicy:
        """Returns what a save keeps of older steps: while the losses are unsound also the last that
        was proven.
        """
        return (
            RetentionPolicy(newest, self.proven, self.lease.check)
            if self.writes
            else RetentionPolicy(newest)
        )

    def failures(self) -> FailureRate:
        """Returns how often the run has failed so far, as its events tell; rank 0 knows."""
        events = read_rows(self.folder.events) if self.writes else ()
        return failure_rate(events, time.time())

    def damaged(self, step: int, warnings: Sequence[str]) -> None:
        """Say which checkpoints were passed over, and rename them: no later save may take them for
        its own.
        """
        if not self.writes or not warnings:
            return
        self.lease.check()
        moved = quarantine(self.checkpoints, step + 1, "damaged")
        for warning in warnings:
            log.warning("%s The run goes on from step %d.", warning, step)
        self.event(
            "damaged", step=step, problems=list(warnings), set_aside=[path.name for path in moved]
        )

    def changed(self, step: int, changes: Sequence[Change]) -> None:
        """Say in one table what is not as it was in this run folder, and keep it."""
        self.changes = changes
        if not self.writes or not changes:
            return
        self.note(f"changed since the last start in this run folder:\n{table_of(changes)}")
        rows = [
            {"key": change.key, "before": change.before, "now": change.now} for change in changes
        ]
        self.event("changed", step=step, changes=rows)

    def set_back(self, step: int, first: int, fields: Mapping[str, Any]) -> None:
        """Record that the run goes back at `step`, and rename the checkpoints from `first` on."""
        self.lease.check()
        moved = quarantine(self.checkpoints, first, "rolled-back")
        self.event("rollback", step=step, set_aside=[path.name for path in moved], **fields)

    def set_diverged_aside(self, step: int) -> str:
        """Rename the checkpoints whose state led to the divergence noticed at `step`; sentences for
        the user.
        """
        self.lease.check()
        bad_since = (
            self.soundness.bad_since or self.metrics.last_step + 1
        )  # a step without a row was not sound
        moved = quarantine(self.checkpoints, max(1, bad_since - 1), "diverged")
        self.event(
            "diverged", step=step, bad_since=bad_since, set_aside=[path.name for path in moved]
        )
        left = next((number for number, _ in step_folders(self.checkpoints)), None)
        aside = (
            f"Renamed as diverged, since step {bad_since} went wrong from there: " if moved else ""
        )
        aside += ", ".join(path.name for path in reversed(moved)) + ". " * bool(moved)
        goes_on = "starts afresh" if left is None else f"goes on from step {left}"
        return f"{aside}Lower optim.lr or warm up for longer: the same command then {goes_on}."

    def saved(self, step: int, stall_seconds: float, save_seconds: float) -> None:
        """Record a checkpoint: how long training stood still, and how long it took in all."""
        self.last_checkpoint = step
        times = {"ckpt/stall_seconds": stall_seconds, "ckpt/save_seconds": save_seconds}
        self.event("saved", step=step, **times)
