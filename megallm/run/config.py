"""The sections of a configuration that every trainer has. No torch.

A key has the same dotted name in Python, in YAML and on the command line.

The comment beside a field is its documentation (`megallm config --schema` prints it).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megallm.engine.config import EngineConfig
from megallm.models.compute import ComputeConfig
from megallm.models.config import ModelConfig
from megallm.optim.config import OptimConfig, ZeroConfig
from megallm.parallel.config import LayoutConfig


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and what its randomness is keyed by."""

    dir: str = "runs/default"  # run folder: logs, metrics, checkpoints; made when missing
    seed: int = 1234  # initial weights, the same at every layout; and the order of the data unless data.seed is given


@dataclass(frozen=True)
class StepsConfig:
    """How long, and how much at once."""

    steps: int = 1000  # optimizer updates of the whole run; the learning-rate schedule spans them
    stop_at: int | None = None  # save and stop after this step; the schedule keeps the horizon of train.steps
    global_batch: int = 8  # samples per step over all ranks
    micro_batch: int = 1  # samples per forward pass of one rank


@dataclass(frozen=True)
class TrainConfig(ComputeConfig, StepsConfig):
    """How long, how much at once, in which precision."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When states are saved and how many are kept."""

    every: int | Literal["auto"] = 500  # steps; 0: only at the end; auto: by stall and failures (Young, Daly)
    keep: int = 3  # newest checkpoints kept; 0 keeps all
    async_save: bool = False  # a process beside training writes: a step pays a copy of the state, in memory

    def may_follow(self, step: int) -> bool:
        """Returns whether a save may follow this step; with auto it may follow any."""
        return self.every == "auto" or (self.every > 0 and step % self.every == 0)


@dataclass(frozen=True)
class GuardConfig:
    """What a run does about numbers that are not finite, loss spikes, and ranks that compute or
    remember something else than their replicas (docs/guard.md).
    """

    non_finite: Literal["skip", "stop", "rollback"] = "skip"  # such a loss or gradient norm; ten skips in a row stop
    spike: Literal["off", "warn", "skip", "rollback"] = "warn"  # a loss or gradient norm far above those before
    spike_sigma: float = 6.0  # standard deviations above the mean from which on it is a spike
    spike_window: int = 128  # steps that mean and deviation are taken over
    rollback: int = 1  # checkpoints to go back; what was trained since the last of them is left out then
    skip_batches: int = 0  # batches that are left out besides, after the one that made the run go back
    max_rollbacks: int = 3  # of a run; one more stops it
    replica_check_every: int = 0  # steps between comparisons of what ranks hold alike, besides saves; 0: never
    digest_every: int | None = None  # steps between digests of the weights in the metrics; null: 10 if strict, else 0


@dataclass(frozen=True)
class EvalConfig:
    """Held-out loss during the run."""

    every: int = 0  # steps; 0 evaluates only at the end
    batches: int = 10  # global batches of the validation split; 0 switches evaluation off


@dataclass(frozen=True)
class LogConfig:
    """What a person sees; RUN/metrics.jsonl has one row a step regardless."""

    every: int = 1  # steps between printed lines
    tensorboard: bool = False  # also write TensorBoard event files (optional package)
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()  # dashboards that get every row too
    project: str = "megallm"  # what trackers call the project, or the experiment
    plot: bool = True  # draw RUN/plots/loss.png at the end
    trace_step: int | None = None  # draw how the pipeline ran in this step: RUN/plots/pipeline.svg and .json


@dataclass(frozen=True)
class LaunchConfig:
    """How the ranks are watched and started again."""

    restarts: int = 3  # in a row without a new step, before `megallm launch` gives up; other verbs never restart
    hang_seconds: float = 10.0  # without a sign of life, or 5 x the 99th percentile of the step time: a hang; 0: never
    time_limit: float | None = None  # minutes; saves and leaves with 75 before; null: as its Slurm job
    timeout_seconds: float = 600.0  # for one exchange between ranks; then a rank that cannot be reached ends the run
    meet_seconds: float = 120.0  # for all ranks to come to the start; then the missing ones are named


@dataclass(frozen=True)
class JobConfig:
    """The sections that every trainer has; a trainer's own configuration says what `data` is, and
    may add sections.
    """

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    data: Any = None
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    @property
    def digest_every(self) -> int:
        """Returns the steps between digests of the weights; 0: none are made."""
        if self.guard.digest_every is not None:
            return self.guard.digest_every
        return 10 if self.train.determinism == "strict" else 0

    @property
    def engine(self) -> EngineConfig:
        """Returns what the engine reads of it."""
        return EngineConfig(
            self.model, self.layout, self.zero, self.optim, self.train, self.run.seed
        )
