"""Bounds of the numbers that every trainer's configuration has, by dotted key. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """Bounds of a number; `above` excludes the lower bound, `below` the upper one."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def nearest(self, value: Any, default: Any) -> Any:
        """Returns `value` itself when inside; the closed bound it passed; else the default."""
        if self.low is not None and value < self.low:
            return self.low
        if self.high is not None and value > self.high:
            return self.high
        if (self.above is not None and value <= self.above) or (
            self.below is not None and value >= self.below
        ):
            return default
        return value

    def __str__(self) -> str:
        words = {
            "at least": self.low,
            "greater than": self.above,
            "at most": self.high,
            "less than": self.below,
        }
        return " and ".join(
            f"{word} {bound:.12g}" for word, bound in words.items() if bound is not None
        )


COUNT = Range(low=1)
NOT_NEGATIVE = Range(low=0)
SHARE = Range(low=0, below=1)
SEED = Range(low=0, high=2**32 - 1)
RANGES: dict[str, Range] = {
    "run.seed": SEED,
    "model.num_labels": Range(low=2),
    "model.token_types": NOT_NEGATIVE,
    **{
        f"layout.{axis}": COUNT
        for axis in ("tp", "pp", "cp", "ep", "dp", "chunks", "group", "cp_ulysses")
    },
    "zero.shard_size": COUNT,
    "train.recompute_layers": COUNT,
    "train.loss_scale.initial": Range(low=2**-14, high=2**24),
    "train.loss_scale.minimum": Range(above=0),
    "train.loss_scale.overflows": COUNT,
    "guard.spike_sigma": Range(above=0),
    "guard.spike_window": Range(low=8, high=10**6),
    "guard.rollback": COUNT,
    **{
        f"guard.{name}": NOT_NEGATIVE
        for name in ("skip_batches", "max_rollbacks", "replica_check_every", "digest_every")
    },
    **{
        f"train.{name}": Range(low=1, high=10**6)
        for name in ("loss_scale.growth_steps", "fp8.history")
    },
    "train.fp8.margin": Range(low=0, high=16),
    **{f"train.fp8.{name}": NOT_NEGATIVE for name in ("bf16_first", "bf16_last")},
    **{
        f"train.{name}": Range(low=1, high=10**12)
        for name in ("steps", "stop_at", "global_batch", "micro_batch")
    },
    **{
        f"model.{name}": COUNT
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_heads")
    },
    **{
        f"model.{name}": COUNT
        for name in ("num_kv_heads", "head_size", "vocab_size", "max_positions")
    },
    **{
        f"model.moe.{name}": COUNT
        for name in ("top_k", "ffn_hidden_size", "every", "num_groups", "top_groups")
    },
    **{
        f"model.moe.{name}": NOT_NEGATIVE
        for name in ("num_experts", "shared_ffn_hidden_size", "first_dense")
    },
    **{f"model.moe.{name}": NOT_NEGATIVE for name in ("aux_coef", "z_coef", "bias_rate")},
    "model.moe.routed_scale": Range(above=0),
    "model.moe.capacity": Range(above=0, high=10**6),
    "model.sliding_window": COUNT,
    "model.position_offset": NOT_NEGATIVE,
    "model.rope_fraction": Range(above=0, high=1),
    "model.window_rope_theta": Range(above=0),
    **{f"model.{name}": Range(above=0) for name in ("attention_cap", "logit_cap")},
    **{f"model.{name}_scale": Range(above=0) for name in ("attention", "embedding", "residual")},
    "model.logits_scaling": Range(above=0),
    **{f"model.mla.{name}": NOT_NEGATIVE for name in ("kv_lora_dim", "q_lora_dim")},
    **{f"model.mla.{name}_head_size": COUNT for name in ("nope", "rope", "value")},
    "model.mtp.depth": Range(low=0, high=100),
    "model.mtp.weight": Range(above=0),
    "model.norm_eps": Range(above=0),
    "model.mla.norm_eps": Range(above=0),
    "model.init_std": Range(above=0),
    "model.rope_theta": Range(above=0),
    "optim.lr": Range(above=0),
    "optim.min_lr": NOT_NEGATIVE,
    "optim.warmup_steps": NOT_NEGATIVE,
    "optim.decay_fraction": Range(above=0, high=1),
    "optim.eps": Range(above=0),
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.momentum": Range(low=0, below=1),
    "optim.smoothing": Range(low=0, below=1),
    "optim.decay_power": Range(above=0, high=1),
    "optim.update_clip": Range(above=0),
    "optim.min_scale": Range(above=0),
    "optim.ns_steps": Range(low=1, high=20),
    "optim.clip": NOT_NEGATIVE,
    "checkpoint.every": NOT_NEGATIVE,
    "checkpoint.keep": NOT_NEGATIVE,
    "eval.every": NOT_NEGATIVE,
    "eval.batches": NOT_NEGATIVE,
    "log.every": COUNT,
    "log.trace_step": COUNT,
}
