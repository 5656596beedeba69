"""The rows of the layout oracle as data: which model, on which layout, fed how. No torch."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from math import gcd
from typing import Any

from megallm.base.errors import UsageError
from megallm.models.compute import PARTS
from megallm.models.config import ModelConfig
from megallm.oracle.branches import BRANCH_ROWS
from megallm.oracle.encoders import ENCODER_CONTROLS, ENCODER_MODELS, ENCODER_ROWS, LOSSES
from megallm.oracle.experts import EXPERT_CONTROLS, EXPERT_MODELS, EXPERT_ROWS
from megallm.oracle.frozen import FROZEN_ROWS
from megallm.oracle.latents import LATENT_CONTROLS, LATENT_MODELS, LATENT_ROWS
from megallm.oracle.layered import LAYERED_MODELS, LAYERED_ROWS
from megallm.oracle.memory import FP8_ROWS, MEMORY_ROWS
from megallm.oracle.optimizers import RULE_CONTROLS, RULE_ROWS, SMOOTH_RULES
from megallm.oracle.outputs import OUTPUT_CONTROLS, OUTPUT_ROWS
from megallm.oracle.rows import Written
from megallm.parallel.layout import Layout
from megallm.parallel.schedule import SCHEDULES
from megallm.parallel.zigzag import KINDS, hybrid_degrees, ulysses_degree

MASKS = {
    "full": "every token counts",
    "uneven": "each token with a chance that grows from row to row, so data ranks count different numbers",
    "rank": "all tokens of the first data rank are masked",
    "micro": "all tokens of the last micro batch of every data rank are masked",
    "one": "one single token of the global batch counts",
    "answer": "a span of each row counts, as of an answer behind its prompt, and of some rows nothing",
}
SIZES = ("dp", "tp", "pp", "cp", "ep")
RECOMPUTE = ("none", "selective", "full")

# Sizes are small and mutually prime where they can be: a transposed or mixed-up dim then changes a
# shape.
TINY: dict[str, Any] = {
    "family": "llama",
    "num_layers": 2,
    "hidden_size": 20,
    "ffn_hidden_size": 28,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 6,
    "vocab_size": 61,
    "max_positions": 40,
    "init_std": 0.3,
}
MODELS: dict[str, dict[str, Any]] = (
    {
        "llama": {},
        "tied": {"tie_embeddings": True},
        "four-kv": {"num_kv_heads": 4},
        "one-kv": {"num_kv_heads": 1},
        "three-groups": {"num_heads": 6, "num_kv_heads": 3},  # tp=2: a rank's three heads read two kv heads unevenly
        "gpt2": {"family": "gpt2", "num_kv_heads": 4},
        "gpt2-exact": {"family": "gpt2", "num_kv_heads": 2, "activation": "gelu", "tie_embeddings": False},
        "qwen2": {"family": "qwen2"},
        "qwen3": {"family": "qwen3", "tie_embeddings": True},
        "mistral": {"family": "mistral", "sliding_window": 3},
        "normed-together": {"family": "olmoe"},
        "normed-three-groups": {"family": "olmoe", "num_heads": 6, "num_kv_heads": 3},  # tp=2: both project one kv head
        "biased": {"bias": True, "qk_norm": True, "norm": "layernorm"},
    }
    | ENCODER_MODELS
    | LATENT_MODELS
    | EXPERT_MODELS
    | LAYERED_MODELS
)


@dataclass(frozen=True)
class Row:
    """One comparison: `steps` optimizer steps of a model on a layout against the reference.

    The global batch of a step is `dp * micros * micro_batch` rows of `seq_len` tokens, data rank
    after data rank, micro batch after micro batch.
    """

    name: str
    model: str = "llama"
    layout: Layout = field(default_factory=Layout)
    sp: bool = False
    schedule: str = "1f1b"
    chunks: int = 1
    stages: str | None = None  # a layout string such as "Et*2|tL"
    zero: int = 0
    shard_size: int | None = None
    tree: bool = False
    cp_kind: str = "ring"
    cp_ulysses: int | None = None
    packed: bool = False  # rows of several documents, attention inside each; micro_batch is 1
    shared: bool = False  # packed: documents begin alike two by two, and microbatches hold that once
    recompute: str = "none"
    recompute_modules: tuple[str, ...] = ("core", "activation")
    recompute_layers: int | None = None
    offload: bool = False
    fused_head: str = "off"
    fp8: str | None = None  # a recipe: linears of blocks, experts and further tokens in FP8, the rest in float64
    micros: int = 1
    micro_batch: int = 2
    seq_len: int = 8
    mask: str = "uneven"
    loss: str | None = None  # one of LOSSES of the model's head; None: the first
    trainer: str = "pretrain"  # or one of `trainers.TRAINERS`
    adapter: str | None = None  # one of `trainers.ADAPTERS` beside a frozen model
    hidden_dropout: float = 0.0  # of a row of a trainer
    frozen: tuple[str, ...] = ()  # patterns of logical names that are not trained
    rule: str = "adamw"  # the update rule, with the settings of `compare.RULE_SETTINGS`
    clip: float = 0.05  # far below the norms of these models, so that it acts
    rates: tuple[float, ...] = (0.02, 0.01, 0.03)  # learning rates of successive steps, repeated
    precision: str = "fp64"  # or fp32, for what has no float64
    small_pieces: bool = False  # buckets, chunks of the fused head and of updates so small that there are several
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of the model, beyond `model`
    rollout: bool = False  # before each update the weights answer prompts
    steps: int = 3
    seed: int = 1

    @cached_property
    def config(self) -> ModelConfig:
        return ModelConfig(**(TINY | MODELS[self.model] | dict(self.overrides))).resolve()

    @property
    def loss_name(self) -> str:
        return self.loss or LOSSES[self.config.head][0]

    @property
    def layout_text(self) -> str:
        """`tp=2,pp=2,sp=1`: what `--layout` takes."""
        parts = [f"{axis}={self.layout.size(axis)}" for axis in SIZES if self.layout.size(axis) > 1]
        parts += (
            ["sp=1"] * self.sp + [f"chunks={self.chunks}"] * (self.chunks > 1) + [f"zero={self.zero}"] * (self.zero > 0)
        )
        parts += [f"cp_kind={self.cp_kind}"] * (self.cp_kind != "ring")
        parts += [f"schedule={self.schedule}"] * (self.schedule != "1f1b")
        return ",".join(parts) or "tp=1"


def _row(name: str, layout: str = "", model: str = "llama", **rest: Any) -> Row:
    settings = parse_layout(layout) if layout else {}
    axes = {axis: settings.pop(axis) for axis in SIZES if axis in settings}
    return Row(name, model, Layout(**axes), **settings, **rest)


CHOICES = {
    "cp_kind": KINDS,
    "sp": ("0", "1"),
    "zero": ("0", "1", "2", "3"),
    "schedule": tuple(k for k in SCHEDULES if k != "forward"),
}


def parse_layout(text: str) -> dict[str, Any]:
    """`tp=2,pp=2,sp=1,schedule=zb-v` -> settings of a row; raises UsageError naming what is not
    understood.
    """
    values: dict[str, Any] = {}
    for item in text.split(","):
        key, _, value = item.strip().partition("=")
        value = {"true": "1", "false": "0"}.get(value.lower(), value)
        sizes = (*SIZES, "chunks")
        if not (value in CHOICES[key] if key in CHOICES else key in sizes and value.isdecimal()):
            takes = [f"{size}=N" for size in sizes] + [f"{k}={'|'.join(v)}" for k, v in CHOICES.items()]
            raise UsageError(f"--layout has '{item}'; it takes, separated by commas, {', '.join(takes)}.")
        values[key] = value if key in ("schedule", "cp_kind") else bool(int(value)) if key == "sp" else int(value)
    if "chunks" not in values and SCHEDULES[values.get("schedule", "1f1b")].chunks != 1:
        values["chunks"] = 2
    return values


ROWS: tuple[Row, ...] = (
    _row("single"),
    _row("single-unclipped", clip=0.0, mask="full"),
    _row("accumulation", micros=3),
    _row("dp2", "dp=2"),
    _row("dp3-accumulation", "dp=3", micros=2),
    _row("dp2-masked-rank", "dp=2", mask="rank"),
    _row("dp2-masked-micro", "dp=2", micros=2, mask="micro"),
    _row("dp2-one-token", "dp=2", mask="one"),
    _row("tp2", "tp=2"),
    _row("tp2-tied", "tp=2", model="tied"),
    _row("tp2-gpt2", "tp=2", model="gpt2"),
    _row("tp2-gpt2-exact-untied", "tp=2", model="gpt2-exact"),
    _row("tp2-qwen2", "tp=2", model="qwen2"),
    _row("tp2-qwen3", "tp=2", model="qwen3"),
    _row("tp2-mistral", "tp=2", model="mistral"),
    _row("tp2-mistral-long", "tp=2", "mistral", seq_len=70, micro_batch=1),  # longer than a strip of the window
    _row("tp2-biased", "tp=2", model="biased"),
    _row("tp2-one-kv", "tp=2", model="one-kv"),
    _row("tp2-three-groups", "tp=2", model="three-groups"),
    _row("tp2-normed-together", "tp=2", model="normed-together"),
    _row("tp2-sp-normed-three-groups", "tp=2,sp=1", model="normed-three-groups", recompute="full"),
    _row("tp4-normed-together-zero1", "tp=4,dp=2,zero=1", model="normed-together", micros=2, mask="rank"),
    _row("pp2-tp2-normed-zb-h1", "pp=2,tp=2,schedule=zb-h1", "normed-three-groups", micros=3),
    _row("tp2-uneven-ffn", "tp=2", overrides={"ffn_hidden_size": 27}),
    _row("tp4-two-kv", "tp=4"),
    _row("tp4-qwen2-two-kv", "tp=4", model="qwen2"),
    _row("tp2-sp", "tp=2,sp=1"),
    _row("tp2-sp-tied", "tp=2,sp=1", model="tied"),
    _row("tp2-sp-gpt2", "tp=2,sp=1", model="gpt2"),
    _row("tp2-sp-qwen3", "tp=2,sp=1", model="qwen3"),
    _row("tp2-sp-biased", "tp=2,sp=1", model="biased"),
    _row("tp4-sp-two-kv", "tp=4,sp=1"),
    _row("pp2", "pp=2", micros=4),
    _row("pp2-one-micro", "pp=2"),
    _row("pp2-tied", "pp=2", model="tied", micros=3),
    _row("pp2-gpt2", "pp=2", model="gpt2", micros=2),
    _row("pp2-uneven-layers", "pp=2", micros=3, overrides={"num_layers": 3}),
    _row("pp4-uneven-layers-tied", "pp=4", model="tied", micros=5, overrides={"num_layers": 6}),
    _row("pp4-fewer-micros", "pp=4", micros=2, overrides={"num_layers": 4}),
    _row("recompute-full", recompute="full"),
    _row("recompute-selective", recompute="selective"),
    _row("tp2-sp-recompute-full", "tp=2,sp=1", recompute="full", model="qwen3"),
    _row("tp2-recompute-selective", "tp=2", recompute="selective", model="three-groups"),
    _row("pp2-recompute-full", "pp=2", micros=3, recompute="full", model="gpt2"),
    *(_row(name, layout, model, **rest) for name, layout, model, rest in MEMORY_ROWS + FP8_ROWS),
    _row("packed", packed=True, micro_batch=1, micros=2),
    _row("cp2-ring", "cp=2"),
    _row("cp2-ulysses-one-kv", "cp=2,cp_kind=ulysses", "one-kv"),
    _row("cp2-allgather-mistral", "cp=2,cp_kind=allgather", "mistral"),
    _row("cp2-ring-packed-mistral", "cp=2", "mistral", packed=True, micro_batch=1, seq_len=16),
    _row("cp4-ring-packed-recompute-full", "cp=4", packed=True, micro_batch=1, seq_len=16, recompute="full"),
    _row("cp4-hybrid-qwen3", "cp=4,cp_kind=hybrid", "qwen3"),
    _row("cp2-tp2-sp-ring", "cp=2,tp=2,sp=1", "three-groups"),
    _row("cp2-tp2-ulysses-packed", "cp=2,tp=2,cp_kind=ulysses", packed=True, micro_batch=1, seq_len=16),
    _row("cp2-pp2-tied-ring", "cp=2,pp=2", "tied", micros=3),
    _row("dp2-cp2-ulysses-one-token", "dp=2,cp=2,cp_kind=ulysses", mask="one"),
    _row("dp2-cp2-allgather-selective", "dp=2,cp=2,cp_kind=allgather", mask="rank", recompute="selective"),
    _row("cp2-tp2-pp2-sp-ring-gpt2", "cp=2,tp=2,pp=2,sp=1", "gpt2", micros=2, recompute="full"),
    _row("zb-h1-cp2", "pp=2,cp=2,schedule=zb-h1", micros=3),
    _row("zero3-dp2-cp2-recompute", "dp=2,cp=2,zero=3", "tied", micros=2, recompute="full"),
    _row("dp2-tp2", "dp=2,tp=2"),
    _row("dp2-tp2-sp-one-token", "dp=2,tp=2,sp=1", mask="one", model="one-kv"),
    _row("dp2-pp2-tied", "dp=2,pp=2", model="tied", micros=2),
    _row("dp2-pp2-masked-rank", "dp=2,pp=2", micros=2, mask="rank"),
    _row("tp2-pp2-tied-sp", "tp=2,pp=2,sp=1", model="tied", micros=2),
    _row("dp2-tp2-pp2", "dp=2,tp=2,pp=2", micros=3),
    _row("dp2-tp2-pp2-sp-tied", "dp=2,tp=2,pp=2,sp=1", model="qwen3", micros=3),
    _row("dp2-tp2-pp2-sp-gpt2-recompute", "dp=2,tp=2,pp=2,sp=1", model="gpt2", micros=2, recompute="full"),
    _row("gpipe", "pp=2,schedule=gpipe", micros=3),
    _row("interleaved", "pp=2,schedule=interleaved", micros=4, overrides={"num_layers": 4}),
    _row("interleaved-ragged", "pp=2,chunks=3,schedule=interleaved", "tied", micros=5, overrides={"num_layers": 7}),
    _row("interleaved-pp4-sp", "pp=4,tp=2,sp=1,schedule=interleaved", micros=4, overrides={"num_layers": 8}),
    _row("one-rank-chunks", "pp=1,chunks=2,schedule=interleaved", "tied", micros=2),
    _row("zb-h1", "pp=2,schedule=zb-h1", micros=4),
    _row("zb-h1-tied-tp2", "pp=2,tp=2,schedule=zb-h1", "tied", micros=3),
    _row("zb-h1-pp4-gpt2", "pp=4,schedule=zb-h1", "gpt2", micros=5, overrides={"num_layers": 4}),
    _row("zb-v", "pp=2,schedule=zb-v", micros=4, overrides={"num_layers": 4}),
    _row(
        "zb-v-tied-kv",
        "pp=2,tp=2,schedule=zb-v",
        "three-groups",
        micros=3,
        overrides={"num_layers": 5, "tie_embeddings": True},
    ),
    _row("zb-v-pp4-recompute", "pp=4,schedule=zb-v", "qwen3", micros=7, recompute="full", overrides={"num_layers": 8}),
    _row("zb-v-dp2", "pp=2,dp=2,schedule=zb-v", "tied", micros=3, overrides={"num_layers": 4}),
    _row("zb-v-zero2-dp2", "pp=2,dp=2,schedule=zb-v,zero=2", "tied", micros=3, overrides={"num_layers": 4}),
    _row("stages-written", "pp=2", "tied", micros=2, stages="Et|t*2L", overrides={"num_layers": 3}),
    _row("stages-head-alone", "pp=3", micros=3, stages="E|t*2|L"),
    _row("stages-empty-rank", "pp=3,dp=2,zero=3", "tied", micros=3, stages="Et||tL"),
    _row("zero1-dp2", "dp=2,zero=1", micros=2),
    _row("zero1-dp3-tied-pp2", "dp=3,pp=2,zero=1", "tied", micros=2),
    _row("zero2-dp2", "dp=2,zero=2", "gpt2", micros=2),
    _row("zero2-dp2-tp2-sp", "dp=2,tp=2,sp=1,zero=2", "biased", micros=2, mask="rank"),
    _row("zero3-dp2", "dp=2,zero=3", "tied", micros=2),
    _row("zero3-dp3-recompute", "dp=3,zero=3", "qwen3", micros=2, recompute="full", mask="one"),
    _row("zero3-dp2-tp2-sp-selective", "dp=2,tp=2,sp=1,zero=3", "three-groups", micros=2, recompute="selective"),
    _row("zero3-dp2-interleaved", "dp=2,pp=2,schedule=interleaved,zero=3", micros=4, overrides={"num_layers": 4}),
    _row("zero3-dp2-zb-h1", "dp=2,pp=2,schedule=zb-h1,zero=3", "tied", micros=3),
    _row("zero3-hybrid-dp4", "dp=4,zero=3", "gpt2", micros=1, shard_size=2),
    _row("zero1-hybrid-dp4", "dp=4,zero=1", "tied", micros=2, shard_size=2),
    _row("zero3-8-ranks", "dp=2,tp=2,pp=2,sp=1,zero=3", "qwen3", micros=3),
    _row("tree-dp2", "dp=2", "tied", micros=4, tree=True),
    _row("tree-dp4-zero1", "dp=4,zero=1", micros=2, tree=True),
    _row("tree-dp2-tp2-pp2-sp", "dp=2,tp=2,pp=2,sp=1", "tied", micros=2, tree=True),
    *(
        _row(name, layout, model, **rest)
        for name, layout, model, rest in (
            ENCODER_ROWS
            + LATENT_ROWS
            + EXPERT_ROWS
            + RULE_ROWS
            + FROZEN_ROWS
            + BRANCH_ROWS
            + OUTPUT_ROWS
            + LAYERED_ROWS
        )
    ),
)

# For every reduction a small row in which leaving it out must show.
CONTROLS: dict[str, str] = (
    {
        "tp.enter": "tp2",
        "tp.leave": "tp2",
        "sp.enter": "tp2-sp",
        "sp.leave": "tp2-sp",
        "tp.qk_norm": "tp2-normed-together",
        "vocab.embedding": "tp2",
        "vocab.logits": "tp2",
        "vocab.max": "tp2",
        "vocab.sum": "tp2",
        "vocab.label": "tp2",
        "vocab.divergence": "distill-tp2-sp",
        "fp8.amax": "fp8-tp2",
        "fp8.expert_amax": "fp8-moe-tp2-replicated",
        "fp8.wrong_expert": "fp8-moe",
        "cp.lse": "cp2-ring",
        "cp.kv_grads": "cp2-ring",
        "cp.heads": "cp2-ulysses-one-kv",
        "cp.outputs": "cp2-ring",
        "grads.data": "dp2",
        "zero.parameters": "zero1-dp2",
        "grads.partial": "tp2-sp",
        "grads.tie": "pp2-tied",
        "clip.norm": "tp2",
        "loss.counts": "dp2",
        "loss.report": "dp2",
        "dora.norm": "dora-tp2-sp",
        "adalora.gram": "adalora-tp2-sp",
        "adalora.scores": "adalora-tp2-sp",
    }
    | ENCODER_CONTROLS
    | LATENT_CONTROLS
    | EXPERT_CONTROLS
    | RULE_CONTROLS
    | OUTPUT_CONTROLS
)


def made_row(written: Written) -> Row:
    """Returns the row that a module of rows has written down."""
    name, layout, model, rest = written
    return _row(name, layout, model, **rest)


def row_named(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


def row_for_layout(text: str) -> Row:
    """Returns a row of a model that fits the layout a person asked for, with enough layers, heads
    and micro batches.
    """
    base = _row(f"--layout {text}", text, micros=2)
    ranks = base.layout.tp * base.layout.cp
    heads = 4 * ranks // gcd(4, ranks)
    ulysses_degree(base.cp_kind, base.layout.cp, heads // base.layout.tp)
    sizes = {"num_heads": heads, "num_layers": max(2, base.layout.pp * base.chunks)}
    unit = base.layout.tp * (2 * base.layout.cp if base.layout.cp > 1 else 1)
    length = 8 * unit // gcd(8, unit)
    if base.layout.ep > 1:
        experts = EXPERT_MODELS["moe"]["moe"] | {"num_experts": 2 * base.layout.ep}
        base, sizes = replace(base, model="moe"), sizes | {"moe": experts}
    return replace(base, overrides=sizes, seq_len=length)


def sample_rows(n: int, seed: int, max_ranks: int = 8) -> list[Row]:
    """`n` random rows, the same for the same seed; valid by construction, at most `max_ranks`
    ranks.
    """
    draw = random.Random(seed)
    rows = []
    for i in range(n):
        model = draw.choice(list(MODELS))
        heads = int((TINY | MODELS[model])["num_heads"])
        tp = draw.choice([t for t in (1, 1, 2, 2, 3, 4, 6) if heads % t == 0 and t <= max_ranks])
        pp = draw.choice([p for p in (1, 1, 2, 2, 3, 4) if p * tp <= max_ranks])
        dp = draw.choice([d for d in (1, 2, 3, 4) if d * tp * pp <= max_ranks])
        sizes = {
            "num_layers": draw.randint(pp, pp + 2),
            "vocab_size": draw.randint(50, 80),
            "ffn_hidden_size": draw.randint(2 * tp, 30),
            "tie_embeddings": draw.random() < 0.5,
        }
        row = Row(
            name=f"random-{seed}-{i}",
            model=model,
            layout=Layout(dp=dp, tp=tp, pp=pp),
            sp=tp > 1 and draw.random() < 0.5,
            recompute=draw.choice(RECOMPUTE),
            micros=draw.randint(1, 4),
            micro_batch=draw.randint(1, 2),
            seq_len=tp * draw.randint(2, 6) if tp > 2 else 2 * draw.randint(2, 6),
            mask=draw.choice([mask for mask in MASKS if mask != "rank" or dp > 1]),
            clip=draw.choice((0.0, 0.05, 10.0)),
            overrides=sizes,
            seed=draw.randrange(2**31),
        )
        row = _with_sharding(_with_experts(_with_schedule(_with_context(row, draw, max_ranks), draw), draw), draw)
        losses = [kind for kind in LOSSES[row.config.head] if kind != "reward" or not row.config.head_bias]
        row = replace(row, loss=draw.choice(losses))  # of a reward's bias the gradient is zero, and Adam's step noise
        row = replace(row, rule=draw.choice(("adamw", *SMOOTH_RULES)))
        row = _with_memory(row, random.Random(f"memory-{seed}-{i}"))
        row = replace(row, small_pieces=random.Random(f"pieces-{seed}-{i}").random() < 0.3)
        rows.append(replace(row, mask="uneven") if row.mask == "micro" and row.micros == 1 else row)
    return rows


def _with_schedule(row: Row, draw: random.Random) -> Row:
    """Returns the row with a random schedule, and as many layers as its stages need."""
    kind = draw.choice([kind for kind in SCHEDULES if kind != "forward"])
    chunks = SCHEDULES[kind].chunks or draw.randint(1, 3)
    stages = row.layout.pp * chunks
    sizes = dict(row.overrides) | {"num_layers": draw.randint(stages, stages + 2)}
    return replace(row, schedule=kind, chunks=chunks, overrides=sizes)


def _with_memory(row: Row, draw: random.Random) -> Row:
    """Returns the row with random ways to keep less of a forward pass."""
    row = replace(row, offload=draw.random() < 0.3)
    if row.config.head in ("lm", "mlm"):
        row = replace(row, fused_head=draw.choice(("on", "off")))
    if row.recompute == "selective":
        row = replace(row, recompute_modules=tuple(draw.sample(sorted(PARTS), draw.randint(1, len(PARTS)))))
    return row if row.recompute == "none" else replace(row, recompute_layers=draw.choice((None, None, 1)))


def _with_experts(row: Row, draw: random.Random) -> Row:
    """Returns a row whose model has experts with a random number of ranks that divide them."""
    experts, ranks = row.config.moe.num_experts, row.layout.stage_ranks
    if not experts:
        return row
    ep = draw.choice([n for n in range(1, ranks + 1) if gcd(ranks, experts) % n == 0])
    return replace(row, layout=replace(row.layout, ep=ep))


def _with_sharding(row: Row, draw: random.Random) -> Row:
    """Returns the row with a random ZeRO stage, perhaps hybrid, or with sums in a tree where that
    is defined.
    """
    zero, group = draw.randint(0, 3), row.layout.dp * row.layout.cp
    sizes = [size for size in range(1, group + 1) if group % size == 0]
    row = replace(row, zero=zero, shard_size=draw.choice([None, *sizes]) if zero else None)
    powers = all(n & (n - 1) == 0 for n in (row.layout.dp, row.layout.cp, row.micros))
    tree = zero <= 1 and row.schedule != "zb-v" and powers and not row.config.moe.num_experts and draw.random() < 0.5
    return replace(row, tree=tree, shard_size=None if tree else row.shard_size)


def _with_context(row: Row, draw: random.Random, max_ranks: int) -> Row:
    """Returns the row with a random number of context-parallel ranks of any kind that fits, and
    perhaps packed.
    """
    layout, heads = row.layout, row.config.num_heads // row.layout.tp
    cp = draw.choice([c for c in (1, 1, 2, 2, 3, 4) if c * layout.world <= max_ranks])
    fits = {"ulysses": heads % cp == 0, "hybrid": bool(hybrid_degrees(cp, heads))}
    kind = draw.choice([kind for kind in KINDS if fits.get(kind, True)])
    if draw.random() < 0.3:
        row = replace(row, packed=True, micro_batch=1)
    if cp == 1:
        return row
    unit = 2 * cp * layout.tp
    length = unit * draw.randint(1, max(1, 36 // unit))
    return replace(row, layout=replace(layout, cp=cp), cp_kind=kind, seq_len=length)


def describe(row: Row) -> dict[str, Any]:
    """Returns what sets a row apart from the default one, as plain JSON values."""
    standard = Row(row.name)
    seen = {f.name: getattr(row, f.name) for f in fields(Row) if f.name not in ("name", "layout")}
    told = {k: dict(v) if k == "overrides" else v for k, v in seen.items() if v != getattr(standard, k)}
    return {"name": row.name, "layout": row.layout_text, "world": row.layout.world} | told
