"""A pipeline stage's layers for one pass in a single call of the extension
(csrc/ops/decode_stack.cpp).

With few tokens a step's time goes to Python and torch's operators in small models, and to what a
matrix library prepares in larger ones. The results are those of the modules to rounding; whatever
the extension does not know (adapters, experts, biases, other precisions) takes the modules' way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megallm.base import extension
from megallm.inference.cache import PagedCache, Pages
from megallm.models.decode import is_plain
from megallm.models.decoder import Stage
from megallm.parallel.tensor import Norm

# Multiplications of a pass up to which one thread is as fast as several.
SMALL = 2**22
Tables = tuple[Tensor, Tensor]  # cosines and sines [positions, E/2]
KINDS = {torch.float32: "FloatStack", torch.float64: "DoubleStack"}


class NativeStage:
    """The layers of a stage, and its embedding and head where those are plain, too.

    Weights are read where they are when a stage is made, so one is made for each run of a
    generator, on weights that stay where they are.
    """

    def __init__(
        self, stage: Stage, cache: PagedCache, tables: list[Tables], isa: str = ""
    ) -> None:
        self.stage, self.embeds = stage, stage.span.first and has_plain_embedding(stage)
        self.heads = stage.span.last and has_plain_head(stage)
        config, blocks = stage.config, list(stage.layers.values())
        first = blocks[0]
        self.numbers = sum(weight.numel() for weight in first.parameters()) * len(blocks)
        self.kept: list[Any] = [tables, cache]  # what the addresses are of
        ends = {
            "embedding": self._address(stage.embedding.weight if self.embeds else None),
            "final_norm": self._address(stage.final_norm.weight if self.heads else None),
            "head": self._address(stage.head_weight if self.heads else None),
        }
        sizes = {
            "hidden": config.hidden_size,
            "heads": first.attention.heads.num_q,
            "kv_heads": first.attention.heads.num_kv,
            "size": first.attention.head_size,
            "ffn": config.ffn_hidden_size,
            "vocab": config.vocab_size,
            "positions": cache.layers[0][0].shape[1],
            "eps": config.norm_eps,
        }
        layers = [
            self._layer(block, tables, pools)
            for block, pools in zip(blocks, cache.layers, strict=True)
        ]
        kind = getattr(extension.ops(), KINDS[cache.layers[0][0].dtype])
        self.stack = kind(sizes, layers, ends, isa)

    @staticmethod
    def of(stage: Stage, cache: PagedCache, tables: list[Tables]) -> NativeStage | None:
        """Returns a stage by the extension, or None for one that it cannot compute."""
        blocks = list(stage.layers.values())
        ops = extension.ops()
        if ops is None or ops.isa() == "reference":
            return None
        if not blocks or not tables or stage.offload is not None:
            return None
        keys, values = cache.layers[0]
        pools = keys.shape == values.shape and keys.device.type == "cpu" and keys.shape[-1] % 2 == 0
        if not pools or keys.dtype not in KINDS or tables[0][0].dtype != keys.dtype:
            return None
        if not all(is_plain(block) and block.attention.sinks is None for block in blocks):
            return None
        if stage.virtual.is_adapted or not all(_is_here(p, keys.dtype) for p in stage.parameters()):
            return None
        if stage.units is not None:  # a gather that the last update began may be under way
            stage.units.before_forward(tuple(f"layers.{number}" for number in stage.layers))
            if stage.span.first:
                stage.units.before_forward(("embedding",))
            if stage.span.last:
                stage.units.before_forward(stage.head_keys)
        return NativeStage(stage, cache, tables)

    def _address(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _layer(self, block, tables: list[Tables], pools: list[Tensor]) -> list[int]:
        """The addresses of a layer in the order of the extension's, and its window."""
        attention, mlp = block.attention, block.mlp
        windowed = attention.plan.window_rope and len(tables) > 1
        norms = [norm and norm.weight for norm in (attention.q_norm, attention.k_norm)]
        tensors = [
            block.attention_norm.weight, attention.q.weight, attention.kv.weight, *norms,
            attention.o.weight, block.mlp_norm.weight, mlp.gate_up.weight, mlp.down.weight,
            *tables[int(windowed)], *pools,
        ]  # fmt: skip
        return [*map(self._address, tensors), attention.window or 0]

    def suits(self, rows: int) -> bool:
        """Returns whether a pass of so many tokens is faster here, in one thread."""
        return torch.get_num_threads() == 1 or rows * self.numbers <= SMALL

    def run(
        self,
        tokens: np.ndarray,
        x: Tensor | None,
        pages: Pages,
        further: np.ndarray,
        outputs: list[int],
    ) -> Tensor:
        """Appends tokens `[n, T]` or hidden states `[n, T, D]` behind what the cache holds; their
        rows of the rotary tables are their positions and `further` `[n, 1]`. Returns hidden states
        `[n, T, D]`, of the last stage the logits `[outputs, V]` of the last positions of the
        sequences `outputs`.
        """
        count, size = tokens.shape[1], self.stage.config.hidden_size
        positions = pages.lengths.numpy()[:, None] + np.arange(count)
        places, turns = positions.ravel(), (positions + further).ravel()
        sequences = np.repeat(np.arange(len(tokens)), count)
        if not self.embeds:
            x = x if x is not None else self._embedded(tokens, positions)
            x = x.contiguous()
        chosen = np.array(outputs if self.heads else [], dtype=np.int64) * count + count - 1
        shape = (len(chosen), self.stage.config.vocab_size) if self.heads else (tokens.size, size)
        out = torch.empty(shape, dtype=self.kept[0][0][0].dtype)
        numbers = [tokens.size, pages.table.shape[1], len(chosen)]
        arrays = (sequences, places, turns)
        self.stack.run(numbers, [
            tokens.ctypes.data if self.embeds else 0, 0 if self.embeds else x.data_ptr(),
            *(array.ctypes.data for array in arrays), pages.table.data_ptr(), chosen.ctypes.data,
            out.data_ptr(),
        ])  # fmt: skip
        if self.heads:
            return out
        out = out.view(*tokens.shape, size)
        if not self.stage.span.last:
            return out
        logits = self.stage.last_logits(out)
        return logits if outputs == list(range(len(logits))) else logits[outputs]

    def _embedded(self, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
        return self.stage.embed(torch.from_numpy(tokens), torch.from_numpy(positions))


def _is_here(weight: Tensor, dtype: torch.dtype) -> bool:
    here = weight.untyped_storage().size() > 0
    return here and weight.dtype == dtype and weight.is_contiguous()


def has_plain_embedding(stage: Stage) -> bool:
    """Returns whether hidden states begin as rows of the embedding and nothing else."""
    slots = stage.embedding, stage.noise, stage.prompt, stage.after_embedding
    others = stage.positions, stage.token_types, stage.embedding_norm, stage.config.embedding_scale
    return not any(slot.is_adapted for slot in slots) and all(each is None for each in others)


def has_plain_head(stage: Stage) -> bool:
    """Returns whether logits are RMSNorm and one product."""
    config, norm = stage.config, stage.final_norm
    return (
        config.head == "lm"
        and isinstance(norm, Norm)
        and norm.kind == "rmsnorm"
        and not stage.q_beta
        and stage.head_bias is None
        and config.logits_scaling is None
        and config.logit_cap is None
        and (stage.head is None or (stage.head.dense is None and not stage.head.is_adapted))
    )
