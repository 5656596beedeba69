"""The systems that bench/parallel.py compares: each is a function step(number) -> loss, None where it is unknown.

Everything is imported here, so that every system's memory is counted from the same start.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peer_llama import Llama, load
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor import parallel as tp

from megallm.engine.config import EngineConfig
from megallm.engine.engine import Engine
from megallm.launch.process import keep_memory
from megallm.losses.language import NextToken
from megallm.models.compute import ComputeConfig
from megallm.models.config import ModelConfig
from megallm.models.stages import head_work, plan_stages
from megallm.optim.config import OptimConfig, ZeroConfig
from megallm.parallel.config import LayoutConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh

LR, SEED = 1e-3, 1234
OPTIM = OptimConfig(clip=0.0).resolve()
Step = Callable[[int], float | None]


@dataclass(frozen=True)
class Job:
    """What is trained: the shape of `parallel.SHAPES`, and how many rows and microbatches."""

    shape: tuple[int, ...]
    rows: int
    micros: int
    tuned: bool

    @property
    def tokens(self) -> int:
        return self.shape[5]

    @property
    def model(self) -> ModelConfig:
        layers, hidden, ffn, heads, vocab, _ = self.shape
        sizes = {"num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": ffn, "num_heads": heads}
        return ModelConfig(family="llama", vocab_size=vocab, **sizes).resolve()

    def batch(self, number: int, replicas: int, replica: int) -> tuple[Tensor, Tensor]:
        """Tokens and labels `[micros * rows, T]` of one step and replica; a small set of steps that repeats."""
        total = self.rows * self.micros
        draw = torch.Generator().manual_seed(number % 8)
        rows = torch.randint(self.shape[4], (replicas * total, self.tokens + 1), generator=draw)
        mine = rows[replica * total : (replica + 1) * total]
        return mine[:, :-1], mine[:, 1:]


def build(name: str, job: Job) -> Step:
    """The step function of a system of `parallel.COMPARISONS`."""
    if name.startswith("megallm:"):
        return megallm(dict(item.split("=") for item in name.partition(":")[2].split(",")), job)
    return PEERS[name](job)


def megallm(options: dict[str, str], job: Job) -> Step:
    """Our engine at a layout, with the memory settings that `megallm pretrain` gives its ranks."""
    keep_memory()
    sizes = {axis: int(options.pop(axis, 1)) for axis in ("tp", "pp", "dp", "cp")}
    layout = LayoutConfig(
        sp=bool(options.pop("sp", "")), chunks=int(options.pop("chunks", 1)), schedule=options.pop("schedule", "1f1b")
    )
    zero, tree = ZeroConfig(int(options.pop("zero", 0))), bool(options.pop("tree", ""))
    compute = ComputeConfig(determinism="tree" if tree else "none")
    mesh = Mesh.start(Layout(**sizes))
    config = EngineConfig(job.model, layout, zero, OPTIM, compute, SEED)
    engine = Engine.build(config, mesh)
    positions = torch.arange(job.tokens).expand(job.rows, -1)

    def step(number: int) -> float:
        tokens, labels = job.batch(number, mesh.data.size, mesh.data.rank)
        batches = [
            {"tokens": t, "labels": y, "positions": positions, "mask": torch.ones_like(y, dtype=torch.bool)}
            for t, y in zip(tokens.split(job.rows), labels.split(job.rows), strict=True)
        ]
        return engine.train_step(batches, NextToken(), LR).loss

    return step


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def groups(model: nn.Module) -> list[dict]:
    """Norms are not decayed."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": OPTIM.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(model), lr=LR, betas=OPTIM.betas, eps=OPTIM.eps)


def whole_model(job: Job) -> Llama:
    model = Llama(job.model, job.tokens)
    load(model, job.model, SEED)
    return model


def compiled(model: Llama, job: Job) -> None:
    if job.tuned:
        for block in model.layers.values():
            block.compile()


def data_parallel(model: nn.Module, optimizer: torch.optim.Optimizer, job: Job) -> Step:
    """One microbatch a rank; the loss that is reported is the mean over the ranks."""

    def step(number: int) -> float:
        tokens, labels = job.batch(number, dist.get_world_size(), dist.get_rank())
        loss = cross_entropy(model(tokens), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        return total.item() / dist.get_world_size()

    return step


def ddp(job: Job) -> Step:
    """DistributedDataParallel."""
    model = whole_model(job)
    compiled(model, job)
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return data_parallel(wrapped, adamw(model), job)


def ddp_zero1(job: Job) -> Step:
    """DistributedDataParallel with ZeroRedundancyOptimizer."""
    model = whole_model(job)
    compiled(model, job)
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(
        groups(model), optimizer_class=torch.optim.AdamW, lr=LR, betas=OPTIM.betas, eps=OPTIM.eps
    )
    return data_parallel(wrapped, optimizer, job)


def fsdp2(job: Job, free: bool = True) -> Step:
    """fully_shard of each block; `free` reshards after the forward pass (ZeRO 3), otherwise ZeRO 2."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = whole_model(job)
    compiled(model, job)
    for block in model.layers.values():
        fully_shard(block, mesh=mesh, reshard_after_forward=free)
    fully_shard(model, mesh=mesh, reshard_after_forward=free)
    return data_parallel(model, adamw(model), job)


def deepspeed_zero(job: Job, stage: int) -> Step:
    """DeepSpeed's engine in fp32 on gloo; needs the package deepspeed (0.19.8 was used)."""
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))  # it refuses to start without
    import deepspeed

    deepspeed.init_distributed("gloo", dist_init_required=False)
    model = whole_model(job)
    compiled(model, job)
    settings = {
        "train_micro_batch_size_per_gpu": job.rows * job.micros,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model), config=settings)

    def step(number: int) -> float:
        tokens, labels = job.batch(number, dist.get_world_size(), dist.get_rank())
        loss = cross_entropy(engine(tokens), labels)
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        return total.item() / dist.get_world_size()

    return step


def dtensor(job: Job, sequence: bool = False) -> Step:
    """parallelize_module with column- and row-wise linears and a loss over the divided vocabulary."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = whole_model(job)
    between = Shard(1) if sequence else Replicate()
    whole = (Replicate(), None, None)
    block = {
        "attention": tp.PrepareModuleInput(input_layouts=(between, None, None), desired_input_layouts=whole),
        "mlp": tp.PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),)),
        **{f"attention.{name}": tp.ColwiseParallel() for name in "qkv"},
        **{f"mlp.{name}": tp.ColwiseParallel() for name in ("gate", "up")},
        "attention.o": tp.RowwiseParallel(output_layouts=between),
        "mlp.down": tp.RowwiseParallel(output_layouts=between),
    }
    outer = {
        "embedding": tp.RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "head": tp.ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
    }
    if sequence:
        block |= {"attention_norm": tp.SequenceParallel(), "mlp_norm": tp.SequenceParallel()}
        outer |= {"final_norm": tp.SequenceParallel()}
    tp.parallelize_module(model, mesh, outer)
    for layer in model.layers.values():
        tp.parallelize_module(layer, mesh, block)
    compiled(model, job)
    optimizer = adamw(model)

    def step(number: int) -> float:
        tokens, labels = job.batch(number, 1, 0)
        with tp.loss_parallel():
            loss = cross_entropy(model(tokens), labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach().full_tensor().item()

    return step


def torch_pipeline(job: Job, chunks: int = 1) -> Step:
    """torch.distributed.pipelining: Schedule1F1B, or ScheduleInterleaved1F1B with several stages a rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    spans = plan_stages(job.model.num_layers, ranks * chunks, loss_work=head_work(job.model))  # as megallm cuts them
    models, stages = nn.ModuleList(), []
    for number in range(rank, len(spans), ranks):
        model = Llama(job.model, job.tokens, (spans[number].begin, spans[number].end))
        load(model, job.model, SEED)
        models.append(model)
        stages.append(PipelineStage(model, number, len(spans), torch.device("cpu")))
    if chunks == 1:
        schedule = Schedule1F1B(stages[0], job.micros, loss_fn=cross_entropy)
    else:
        schedule = ScheduleInterleaved1F1B(stages, job.micros, loss_fn=cross_entropy)
    optimizer = adamw(models)

    def step(number: int) -> float | None:
        tokens, labels = job.batch(number, 1, 0)
        losses: list[Tensor] = []
        last = rank == ranks - 1
        schedule.step(*([tokens] if rank == 0 else []), **({"target": labels, "losses": losses} if last else {}))
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean().item() if last else None

    return step


def torch_single(job: Job) -> Step:
    """The plain model on whole rows in one process; the other rank rests."""
    if dist.get_rank() > 0:
        return lambda number: None
    model = whole_model(job)
    compiled(model, job)
    optimizer = adamw(model)

    def step(number: int) -> float:
        tokens, labels = job.batch(number, 1, 0)
        loss = cross_entropy(model(tokens), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


PEERS: dict[str, Callable[[Job], Step]] = {
    "ddp": ddp,
    "ddp-zero1": ddp_zero1,
    "fsdp2": fsdp2,
    "deepspeed-1": partial(deepspeed_zero, stage=1),
    "deepspeed-2": partial(deepspeed_zero, stage=2),
    "deepspeed-3": partial(deepspeed_zero, stage=3),
    "fsdp2-keep": lambda job: fsdp2(job, free=False),
    "dtensor-tp": dtensor,
    "dtensor-sp": lambda job: dtensor(job, sequence=True),
    "torch-1f1b": torch_pipeline,
    "torch-interleaved": lambda job: torch_pipeline(job, chunks=2),
    "torch-single": torch_single,
}
