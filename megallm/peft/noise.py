"""NEFTune: uniform noise on the embeddings of tokens in training (Jain et al., arXiv 2310.05914).

The noise of a sequence of L tokens lies between -alpha / sqrt(L D) and as much above, and is keyed
by (sample, token, feature): every layout, packed or padded, adds the same. Without gradients, and
in the reference model, there is none.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from megallm.base.rng import key_of
from megallm.models.decoder import Stage
from megallm.ops.dropout import keyed_uniform
from megallm.parallel import comm
from megallm.parallel.tensor import SEQUENCE_DIM
from megallm.peft.dropout import at_tokens, keys_of
from megallm.peft.slots import put

NAME = "neftune"  # in the stage's slot


class EmbeddingNoise(nn.Module):
    """Stands in the slot `noise` of the first stage."""

    def __init__(self, stage: Stage, alpha: float, seed: int) -> None:
        super().__init__()
        self.mesh, self.sp, self.context = stage.mesh, stage.sp, stage.context
        self.alpha, self.key = alpha, key_of(seed, NAME) % 2**64
        self.keys = self.lengths = torch.empty(0)

    def watch(self, batch: dict[str, Tensor]) -> None:
        """Note the keys `[B, T/cp]` and the lengths of the sequences of a microbatch."""
        self.keys = self.context.local(keys_of(batch))
        self.lengths = self.context.local(at_tokens(batch, "lengths", 0))

    def forward(self, x: None, y: Tensor) -> Tensor:
        """Returns embeddings `y [B, T/cp/tp or T/cp, D]` with the noise."""
        if not torch.is_grad_enabled():
            return y
        keys, lengths = self.keys, self.lengths
        if self.sp:
            keys, lengths = (
                comm.own_slice(each, self.mesh.tp, SEQUENCE_DIM) for each in (keys, lengths)
            )
        noise = keyed_uniform(y, self.key, keys)
        scale = self.alpha / sqrt(y.shape[-1]) * lengths.clamp(min=1).to(noise.dtype).rsqrt()
        return y + (noise * scale[..., None]).to(y.dtype)


def add_noise(stage: Stage, alpha: float, seed: int) -> None:
    """Put the noise on a stage's embeddings, on the meta device; where another stage has them,
    nothing is done.
    """
    if not stage.span.first:
        return
    noise = EmbeddingNoise(stage, alpha, seed)

    def note(stage: Stage, inputs: tuple[Any, ...]) -> None:
        noise.watch(inputs[1])

    put(stage.noise, NAME, noise)
    stage.register_forward_pre_hook(note)
