"""Independent float64 multi-token prediction in ordinary torch, beside the decoder of `reference`.

It imports nothing of megallm but that referee's parts. DeepSeek-V3's chain (arXiv 2412.19437,
equations 21 to 25, with the hidden state that the head saw as the start of the chain) or
independent heads (arXiv 2404.19737).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.oracle.reference_mla import Config, Weights, linear

Batch = dict[str, Tensor]
Norm = Callable[[str, Tensor], Tensor]  # of the weights of that name
Block = Callable[[str, int, Tensor], Tensor]  # of the weights at that prefix, as the layer of that number


def further_loss(config: Config, weights: Weights, last: Tensor, batch: Batch, norm: Norm, block: Block) -> Tensor:
    """Returns what the further tokens add to the loss, from the last layer's output [B, T, D].

    The mean over depths of each depth's mean over its labels, times the weight.
    """
    depth, length = config["mtp"]["depth"], last.shape[1]
    head = weights["embedding.weight" if config["tie_embeddings"] else "head.weight"]
    seen, total = norm("final_norm", last), 0.0
    # Tokens 1, 2, ... places after the first of the row, as far as they are known.
    text = torch.cat((batch["tokens"][:, :1], batch["labels"]), dim=1)
    for k in range(1, depth + 1):
        at = f"mtp.{k - 1}."
        if config["mtp"]["kind"] == "deepseek":
            known = F.pad(text, (0, depth))[:, k : k + length]
            joined = torch.cat((norm(at + "embedding_norm", weights["embedding.weight"][known]),
                                norm(at + "hidden_norm", seen)), dim=-1)  # fmt: skip
            seen = norm(
                at + "norm",
                block(at + "block.", config["num_layers"] + k - 1, linear(weights, at + "projection", joined)),
            )
        else:
            seen = norm(at + "norm", block(at + "block.", config["num_layers"] + k - 1, last))
        total = total + _mean_loss(seen @ head.T, batch, k)
    return total * config["mtp"]["weight"] / depth


def _mean_loss(logits: Tensor, batch: Batch, ahead: int) -> Tensor:
    """Cross entropy of the label `ahead` places on, token by token: where it counts and is of the
    same document.
    """
    rows, length = batch["labels"].shape
    losses = []
    for row in range(rows):
        for i in range(length - ahead):
            same = "documents" not in batch or batch["documents"][row, i] == batch["documents"][row, i + ahead]
            if same and batch["mask"][row, i + ahead]:
                losses.append(F.cross_entropy(logits[row, i], batch["labels"][row, i + ahead]))
    return torch.stack(losses).mean() if losses else logits.sum() * 0
