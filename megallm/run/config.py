"""The sections of a configuration that every trainer has. No torch.

A key has the same dotted name in Python, in YAML and on the command line.

The comment beside a field is its documentation (`megallm config --schema` prints it).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megallm.models.config import ModelConfig
from megallm.ops.low_precision import Fp8Options, LossScaleOptions
from megallm.optim.config import OptimConfig
from megallm.parallel.layout import Layout

Part = Literal["norm", "attention", "core", "mlp", "activation"]  # of a block (docs/precision.md)


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and what its randomness is keyed by."""

    dir: str = "runs/default"  # run folder: logs, metrics, checkpoints; made when missing
    seed: int = 1234  # initial weights, the same at every layout; and the order of the data unless data.seed is given


@dataclass(frozen=True)
class LayoutConfig:
    """How the ranks are split; world = pp x dp x cp x tp."""

    tp: int = 1  # tensor-parallel ranks
    sp: bool = False  # sequence parallelism: split activations between tensor-parallel regions over tp
    pp: int = 1  # pipeline stages
    cp: int = 1  # context-parallel ranks
    ep: int = 1  # expert-parallel ranks
    dp: int | None = None  # data-parallel replicas; null: what the number of processes leaves
    chunks: int = 1  # model chunks per pipeline rank
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"] = "1f1b"  # pipeline schedule
    group: int | None = None  # microbatches a rank takes through one chunk before the next; null: pp (interleaved)
    cp_kind: Literal["ring", "ulysses", "allgather", "hybrid"] = "ring"  # how context parallelism exchanges keys
    cp_ulysses: int | None = None  # hybrid: neighbouring cp ranks that exchange heads; null: as many as fit
    stages: str | None = None  # layers of each stage, such as Et*3|t*4|t*3L; null: balanced by work

    def grid(self) -> Layout:
        """The pure rank grid; `dp` left open counts as 1."""
        return Layout(pp=self.pp, dp=self.dp or 1, cp=self.cp, tp=self.tp, ep=self.ep)


@dataclass(frozen=True)
class ZeroConfig:
    """What stays sharded over data-parallel ranks between uses."""

    stage: Literal[0, 1, 2, 3] = 0  # 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights
    shard_size: int | None = None  # ranks of dp x cp that divide the state, replicated across the rest; null: all
    bf16_grads: bool = False  # stages 1 to 3: gradients travel and meet in bf16; accumulation stays wide
    offload: bool = False  # optimizer state and master weights in CPU memory


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, in which precision."""

    steps: int = 1000  # optimizer updates of the whole run; the learning-rate schedule spans them
    stop_at: int | None = None  # save and stop after this step; the schedule keeps the horizon of train.steps
    global_batch: int = 8  # samples per step over all ranks
    micro_batch: int = 1  # samples per forward pass of one rank
    precision: Literal["fp64", "fp32", "bf16", "fp16", "fp8"] = "fp32"  # the last three keep fp32 master weights
    loss_scale: LossScaleOptions = field(default_factory=LossScaleOptions)  # fp16
    fp8: Fp8Options = field(default_factory=Fp8Options)  # fp8: bf16 with linears in FP8
    recompute: Literal["none", "selective", "full"] = "none"  # activations made again in the backward pass
    recompute_modules: tuple[Part, ...] = ("core", "activation")  # selective: the parts of a block made again
    recompute_layers: int | None = None  # only the first so many of each pipeline stage; null: all
    offload: bool = False  # what the blocks keep for the backward pass waits in CPU memory
    fused_head: Literal["auto", "on", "off"] = "auto"  # the head's logits never exist; auto: where they would be large
    determinism: Literal["none", "tree"] = "none"  # tree: gradients summed in one fixed order whatever dp is


@dataclass(frozen=True)
class CheckpointConfig:
    """When states are saved and how many are kept."""

    every: int = 500  # steps; 0 saves only at the end
    keep: int = 3  # newest checkpoints kept; 0 keeps all


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
    plot: bool = True  # draw RUN/plots/loss.png at the end
    trace_step: int | None = None  # draw how the pipeline ran in this step: RUN/plots/pipeline.svg and .json


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
    log: LogConfig = field(default_factory=LogConfig)
