"""Samples in Megatron-LM's order, with its own surplus."""

from __future__ import annotations

from collections.abc import Mapping

from megallm.data.megatron.samples import Blend, SampleOptions, SourceSplit, build_samples


def build_split(
    sources: Mapping[str, float | None], split: str, which: str, num_samples: int | None, seq_len: int, seed: int,
    vocab_size: int | None = None,
) -> SourceSplit | Blend:  # fmt: skip
    return build_samples(sources, split, which, num_samples, SampleOptions(seq_len, seed, None, vocab_size))
