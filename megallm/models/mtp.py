"""Multi-token prediction: what is trained to say what lies further ahead than the next token.

The deepseek form (DeepSeek-V3, arXiv 2412.19437, section 2.2) is a chain: depth k joins the hidden
state of depth k - 1 with the embedding of the token k places ahead and runs one more block, so that
its label is the token k + 1 places ahead. The heads form (arXiv 2404.19737) is independent: each
has a block of its own on the last layer's output. Both end in a norm of their own and the model's
shared head. Generation ignores them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.models.attention import AttentionInputs
from megallm.models.block import Block
from megallm.models.compute import BLOCK
from megallm.models.config import ModelConfig
from megallm.models.heads import final_norm
from megallm.parallel.mesh import Mesh
from megallm.parallel.recompute import runner
from megallm.parallel.shard import normal
from megallm.parallel.tensor import Norm, ShardedModule, TokenLinear, sequence_partial


class MtpModule(ShardedModule):
    """One depth, `[B, T/cp/tp or T/cp, D]` -> the same, ready for the head. `number` is that of its
    block.

    `projection (D, 2 D)` reads the normalised embedding first, as checkpoints of DeepSeek do. Its
    matrix is whole on every tp rank and acts on the rank's own tokens.
    """

    def __init__(
        self, config: ModelConfig, mesh: Mesh, sp: bool, recompute: frozenset[str], number: int
    ) -> None:
        super().__init__(mesh)
        d, partial = config.hidden_size, sequence_partial(mesh, sp)
        self.projection = None
        if config.mtp.joins:
            self.embedding_norm, self.hidden_norm = (
                Norm(mesh, config.norm, d, config.norm_eps, partial) for _ in range(2)
            )
            self.projection = TokenLinear(mesh, (d, 2 * d), normal(config.init_std), False, sp)
        self.block = Block(config, mesh, sp, recompute - {BLOCK}, config.layer_plan(number))
        self.norm = final_norm(config, mesh, sp)
        self.run = runner(BLOCK in recompute)

    def forward(self, x: Tensor, embedded: Tensor | None, inputs: AttentionInputs) -> Tensor:
        """Compute the hidden states of one depth of multi-token prediction. `x`: the hidden state
        that the head saw last (deepseek), or the last layer's output (heads).
        """
        if self.projection is not None:
            x = self.projection(
                torch.cat((self.embedding_norm(embedded), self.hidden_norm(x)), dim=-1)
            )
        return self.norm(self.block(x, inputs))


def shift_labels(labels: Tensor, ahead: int) -> Tensor:
    """Returns labels `[B, T]` of whole rows moved `ahead` places to the front, 0 where the row has
    ended.

    Where a document has ended they are another's: they reach no token whose label counts
    (`losses.language`).
    """
    return F.pad(labels.clamp(min=0), (0, ahead))[:, ahead:]


def shift_row_mask(mask: Tensor, ahead: int) -> Tensor:
    """Returns a mask `[B, T]` moved likewise, False where the row has ended: every token whose
    label so far ahead counts, and those at the end of a packed document, which the loss leaves out.
    """
    return F.pad(mask, (0, ahead))[:, ahead:]
