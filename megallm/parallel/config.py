"""The section `layout` of a configuration: how the ranks are split and how they work together. No
torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megallm.parallel.layout import Layout


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
        """Returns the pure rank grid; `dp` left open counts as 1."""
        return Layout(pp=self.pp, dp=self.dp or 1, cp=self.cp, tp=self.tp, ep=self.ep)
