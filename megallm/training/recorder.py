"""Everything a run writes for people and dashboards, behind one small interface; other ranks than 0 write nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from megallm.base.config import to_yaml
from megallm.base.files import atomic_write_json
from megallm.parallel import picture
from megallm.parallel.schedule import Placement
from megallm.parallel.simulate import Timeline
from megallm.training.config import PretrainConfig
from megallm.training.reporting import LossCurve, Reporter, Sink, TensorBoard
from megallm.training.runfolder import Events, Lease, Metrics, RunFolder


class Recorder:
    """metrics.jsonl, events.jsonl, the live line and the plot of one run; a context manager.

    Made on every rank; only rank 0 takes the lease and writes. Errors on entering: `CannotWrite` when the
    folder cannot be written or another job holds it.
    """

    def __init__(self, config: PretrainConfig, rank: int, own_log: bool = False) -> None:
        self.config, self.writes, self.own_log = config, rank == 0, own_log
        self.log: TextIO | None = None
        self.folder = RunFolder(config.run.dir)
        self.last_checkpoint: int | None = None

    @property
    def checkpoints(self) -> Path:
        return self.folder.checkpoints

    def __enter__(self) -> Recorder:
        if self.writes:
            self.folder.prepare()
            self.lease = Lease(self.folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.writes:
            return
        if self.started:
            self.reporter.close()
            if self.log is not None:
                self.log.close()
            if error is not None:
                self.events.add("stopped", reason=f"{kind.__name__}: {error}")
            self.metrics.close()
            self.events.close()
        self.lease.release()

    started = False

    def start(self, resumed_step: int, environment: dict[str, Any]) -> None:
        """Open the files, cutting metrics later than the step that is resumed; 0 is a fresh run."""
        if not self.writes:
            return
        config = self.config
        self.folder.write_config(to_yaml(config))
        self.folder.write_environment(environment)
        self.metrics = Metrics(self.folder.metrics, resumed_step)
        self.events = Events(self.folder.events)
        sinks: list[Sink] = []
        if config.log.plot:
            name = Path(config.run.dir).name
            sinks.append(LossCurve(self.folder.plots / "loss.png", f"loss of {name}", self.folder.metrics))
        if config.log.tensorboard:
            sinks.append(TensorBoard(self.folder.path / "tensorboard", resumed_step))
        if self.own_log:
            self.log = open(self.folder.log_path(0), "a", encoding="utf-8")  # noqa: SIM115 - closed on leaving
        self.reporter = Reporter(sys.stdout, config.train.steps, config.log.every, self.log, tuple(sinks))
        self.last_checkpoint = resumed_step or None
        self.started = True
        self.events.add("resumed" if resumed_step else "started", step=resumed_step)

    def row(self, row: dict[str, Any]) -> None:
        """The metrics of one finished step."""
        if self.writes:
            self.metrics.append(row)
            self.reporter.step(row, self.last_checkpoint)

    def event(self, kind: str, **fields: Any) -> None:
        """Something that happened; a dashboard reads it from events.jsonl."""
        if self.writes:
            self.events.add(kind, **fields)

    def note(self, text: str) -> None:
        """A sentence for whoever watches."""
        if self.writes:
            self.reporter.note(text)

    def pipeline(self, timeline: Timeline | None, placement: Placement, step: int) -> None:
        """Draw how one step ran: plots/pipeline.svg, and a trace for chrome://tracing."""
        if timeline is None or not self.writes:
            return
        title = f"{self.config.layout.schedule} as it ran in step {step}: idle {timeline.idle_fraction:.1%}"
        drawn = picture.Picture(timeline, placement, title, unit="s")
        picture.save(drawn, self.folder.plots / "pipeline.svg")
        atomic_write_json(self.folder.plots / "pipeline.json", picture.chrome_trace(drawn))

    def before_save(self) -> None:
        """The rows that a checkpoint counts on are durable, and the folder is still ours."""
        if self.writes:
            self.lease.check()
            self.metrics.sync()

    def saved(self, step: int, seconds: float) -> None:
        self.last_checkpoint = step
        self.event("saved", step=step, **{"ckpt/stall_seconds": seconds})
