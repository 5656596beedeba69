"""Pipeline parallelism: the one executor of pipeline plans runs actions, moves activations, and
knows no schedule by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megallm.base.device import Stopwatch
from megallm.base.heartbeat import HEARTBEAT
from megallm.parallel.linear import WeightGradQueue, compute_weight_grads
from megallm.parallel.mesh import Mesh
from megallm.parallel.p2p import Key, open_channels
from megallm.parallel.schedule import BACKWARD, FORWARD, WEIGHT, Action, Placement, Plan
from megallm.parallel.simulate import TimedAction

Batch = dict[str, Tensor]
LossOf = Callable[[dict[str, Tensor], Batch], tuple[Tensor, Any]]


class Listener(Protocol):
    """A listener that is told when a backward pass begins on a stage, and when the gradients of one
    microbatch are complete there.

    `last`: it is the step's last one on that stage. `whole`: weight gradients come with the
    backward pass.
    """

    def starts(self, stage: int, last: bool, whole: bool) -> None: ...

    def stage_done(self, stage: int, last: bool) -> None: ...


@dataclass
class ScheduleRun:
    """One run: what is alive, what the last stage's losses returned, and when each action ran."""

    live: dict[Key, tuple[Tensor | None, Tensor]] = field(default_factory=dict)
    weights: dict[Key, list] = field(default_factory=dict)
    here: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)
    results: dict[int, Any] = field(default_factory=dict)  # by microbatch
    moments: list[tuple[Action, Any, Any]] = field(default_factory=list)
    peak_live: int = 0


class Pipeline:
    """Runs this rank's stages through a plan; collective over pp (and over tp and cp inside the
    stages).
    """

    def __init__(
        self,
        mesh: Mesh,
        placement: Placement,
        stages: dict[int, nn.Module],
        weight_grads: WeightGradQueue | None,
    ) -> None:
        self.mesh, self.placement, self.stages, self.weight_grads = (
            mesh,
            placement,
            stages,
            weight_grads,
        )
        self.rank, self.last = mesh.pp.rank, placement.num_stages - 1
        self.channels = open_channels(mesh, placement) if mesh.pp.size > 1 else {}
        self.watch = Stopwatch(mesh.device)

    def run(
        self,
        plans: list[Plan],
        batches: list[Batch],
        new_buffer: Callable[[], Tensor],
        loss_of: LossOf,
        listener: Listener | None = None,
    ) -> ScheduleRun:
        """Walk this rank's plan over `batches`.

        `plans` are those of all pipeline ranks: what the neighbours send, and in which order,
        follows from theirs. `new_buffer` makes a tensor of the shape that travels;
        `loss_of(outputs, batch)` returns the scalar to differentiate and anything to report.
        Without a listener the plan has forwards only.
        """
        self._expect(plans, new_buffer)
        run, plan = ScheduleRun(), plans[self.rank]
        split = any(action.op == WEIGHT for action in plan)
        closing = WEIGHT if split else BACKWARD
        ends = {(action.op, action.stage): action for action in plan}
        with torch.set_grad_enabled(listener is not None):
            for action in plan:
                if action.op == FORWARD:
                    self._forward(run, action, batches[action.micro], loss_of)
                elif action.op == BACKWARD:
                    listener.starts(action.stage, action is ends[BACKWARD, action.stage], not split)
                    self._backward(run, action, split)
                else:
                    begin = self.watch.mark()
                    compute_weight_grads(run.weights.pop((action.micro, action.stage)))
                    run.moments.append((action, begin, self.watch.mark()))
                if action.op == closing:
                    listener.stage_done(action.stage, action is ends[closing, action.stage])
        for channel in self.channels.values():
            channel.flush()
        return run

    def timeline(self, run: ScheduleRun) -> list[TimedAction]:
        """Returns when this rank was busy, in seconds of the machine's clock; waits for messages
        are the gaps.
        """
        return [
            TimedAction(action, self.watch.seconds(a), self.watch.seconds(b))
            for action, a, b in run.moments
        ]

    def _expect(self, plans: list[Plan], new_buffer: Callable[[], Tensor]) -> None:
        for (source, destination, kind), channel in self.channels.items():
            if destination == self.mesh.rank:
                plan = plans[self.mesh.pp.ranks.index(source)]
                channel.expect(
                    [key for action in plan if (key := self._arrives(action, kind))], new_buffer
                )

    def _arrives(self, action: Action, kind: str) -> Key | None:
        """The message to this rank that an action of another rank ends with, if it does."""
        target = action.stage + (1 if kind == FORWARD else -1)
        if (
            action.op != kind
            or not 0 <= target <= self.last
            or self.placement.rank_of(target) != self.rank
        ):
            return None
        return action.micro, target

    def _pass_on(self, run: ScheduleRun, kind: str, micro: int, target: int, x: Tensor) -> None:
        """Hand a tensor to the rank of stage `target`, which may be this one."""
        holder = self.placement.rank_of(target)
        if holder == self.rank:
            run.here[kind, micro, target] = x
        else:
            self.channels[self.mesh.rank, self.mesh.pp.ranks[holder], kind].send(x)

    def _obtain(self, run: ScheduleRun, kind: str, micro: int, stage: int) -> Tensor:
        """The tensor that stage `stage` needs from its neighbour, waiting if it has to come."""
        holder = self.placement.rank_of(stage + (-1 if kind == FORWARD else 1))
        if holder == self.rank:
            return run.here.pop((kind, micro, stage))
        return self.channels[self.mesh.pp.ranks[holder], self.mesh.rank, kind].take((micro, stage))

    def _forward(self, run: ScheduleRun, action: Action, batch: Batch, loss_of: LossOf) -> None:
        micro, stage, training = action.micro, action.stage, torch.is_grad_enabled()
        x = None
        if stage > 0:
            x = self._obtain(run, FORWARD, micro, stage).requires_grad_(training)
        begin = self.watch.mark()
        if training:
            HEARTBEAT.enter("forward")
        else:
            HEARTBEAT.beat()
        out = self.stages[stage](x, batch)
        if stage == self.last:
            out, report = loss_of(out, batch)
            run.results[micro] = report
        run.moments.append((action, begin, self.watch.mark()))
        if stage < self.last:
            self._pass_on(run, FORWARD, micro, stage + 1, out.detach())
        if training:
            run.live[micro, stage] = (x, out)
            run.peak_live = max(run.peak_live, len(run.live) + len(run.weights))

    def _backward(self, run: ScheduleRun, action: Action, split: bool) -> None:
        micro, stage = action.micro, action.stage
        x, out = run.live.pop((micro, stage))
        grad = self._obtain(run, BACKWARD, micro, stage) if stage < self.last else None
        begin = self.watch.mark()
        HEARTBEAT.enter("backward")
        if out.requires_grad:  # a first stage may be frozen as a whole
            torch.autograd.backward(out, grad)
        if split:
            run.weights[micro, stage] = self.weight_grads.take()
        run.moments.append((action, begin, self.watch.mark()))
        if x is not None:
            self._pass_on(run, BACKWARD, micro, stage - 1, x.grad)


def buffer_maker(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    """Returns a function that makes receive buffers of one shape."""
    return partial(torch.empty, shape, dtype=dtype, device=device)
