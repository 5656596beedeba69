"""The one walker of pipeline plans: it runs actions, moves activations, and knows no schedule by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megallm.parallel.mesh import Mesh
from megallm.parallel.p2p import Wire, empty_like_hidden, open_wires
from megallm.parallel.schedule import BACKWARD, FORWARD, Plan

Batch = dict[str, Tensor]
LossOf = Callable[[dict[str, Tensor], Batch], tuple[Tensor, Any]]


@dataclass
class Walk:
    """One run: per microbatch the live (input, output), and what the last stage's losses returned."""

    live: dict[int, tuple[Tensor | None, Tensor]] = field(default_factory=dict)
    results: list[Any] = field(default_factory=list)
    peak_live: int = 0


class Pipeline:
    """Runs the stage of this rank through a plan; collective over pp (and over tp inside the stage)."""

    def __init__(self, mesh: Mesh, stage: nn.Module, dtype: torch.dtype) -> None:
        self.mesh, self.stage, self.dtype = mesh, stage, dtype
        self.rank, self.last = mesh.pp.rank, mesh.pp.size - 1
        self.wires: dict[tuple[str, str], Wire] = {}
        if mesh.pp.size > 1:
            self.wires = open_wires(mesh)

    def run(
        self,
        plans: list[Plan],
        batches: list[Batch],
        hidden_shape: tuple[int, ...],
        loss_of: LossOf,
        after_backward: Callable[[], None],
    ) -> Walk:
        """Walk this rank's plan over `batches`.

        `plans` are those of all pipeline ranks: what the neighbours send, and in which order, follows from
        theirs. `loss_of(outputs, batch)` returns the scalar to differentiate and anything to report;
        `after_backward` is called when the gradients of one microbatch are complete.
        """
        self._expect(plans, hidden_shape)
        walk = Walk()
        training = any(action.op == BACKWARD for action in plans[self.rank])
        with torch.set_grad_enabled(training):
            for action in plans[self.rank]:
                if action.op == FORWARD:
                    self._forward(walk, action.micro, batches[action.micro], loss_of, training)
                else:
                    self._backward(walk, action.micro)
                    after_backward()
        for (direction, _), wire in self.wires.items():
            if direction == "out":
                wire.flush()
        return walk

    def _expect(self, plans: list[Plan], hidden_shape: tuple[int, ...]) -> None:
        new_buffer = empty_like_hidden(hidden_shape, self.dtype, self.mesh.device)
        for kind, neighbour in ((FORWARD, self.rank - 1), (BACKWARD, self.rank + 1)):
            if ("in", kind) in self.wires:
                keys = [(a.micro, self.rank) for a in plans[neighbour] if a.op == kind]
                self.wires["in", kind].expect(keys, new_buffer)

    def _forward(self, walk: Walk, micro: int, batch: Batch, loss_of: LossOf, training: bool) -> None:
        x = None
        if self.rank > 0:
            x = self.wires["in", FORWARD].take((micro, self.rank)).requires_grad_(training)
        out = self.stage(x, batch)
        if self.rank == self.last:
            out, report = loss_of(out, batch)
            walk.results.append(report)
        else:
            self.wires["out", FORWARD].send(out.detach())
        if training:
            walk.live[micro] = (x, out)
            walk.peak_live = max(walk.peak_live, len(walk.live))

    def _backward(self, walk: Walk, micro: int) -> None:
        x, out = walk.live.pop(micro)
        grad = None
        if self.rank < self.last:
            grad = self.wires["in", BACKWARD].take((micro, self.rank))
        torch.autograd.backward(out, grad)
        if x is not None:
            self.wires["out", BACKWARD].send(x.grad)
