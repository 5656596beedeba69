"""One bucket in memory: parameters, gradients and master weights as flat buffers, whole or this
rank's range (mixed precision: the weights in bf16, master weights and gradients in fp32).

What stays sharded between uses is ZeRO's stage (arXiv 1910.02054): 0 nothing, 1 the master weights
and the optimizer's state, 2 the gradients too, 3 the parameters too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megallm.base.device import HostCopyStream, host_zeros
from megallm.base.errors import InternalError
from megallm.optim.buckets import Bucket
from megallm.optim.config import ZeroConfig
from megallm.parallel import comm
from megallm.parallel.mesh import Axis

PARAMETERS = "zero.parameters"


class FlatBucket:
    """Storage and messages of one bucket. `shard` is the group that divides it (size 1: whole
    everywhere).
    """

    def __init__(
        self,
        index: int,
        plan: Bucket,
        options: ZeroConfig,
        shard: Axis,
        dtypes: tuple[torch.dtype, torch.dtype],
        device: torch.device,
    ) -> None:
        dtype, wide = dtypes
        self.index, self.plan, self.shard, self.frozen = index, plan, shard, plan.frozen
        self.begin, self.end = plan.shard_range(shard.size, shard.rank)
        self.sharded_grads = options.stage >= 2
        self.frees_params = options.stage >= 3 and shard.size > 1
        self.message_dtype = torch.bfloat16 if options.bf16_grads else wide
        self.reduction = "grads.expert" if plan.expert else "grads.data"
        self.present = True
        count = self.end - self.begin
        self.params = torch.zeros(plan.numel, dtype=dtype, device=device)
        self.weights = self.params[self.begin : self.end]
        if self.frees_params:
            self.weights = self.weights.clone()
        self.home_grads: Tensor | None = None  # with offload: where gradients are copied to
        if self.frozen or (dtype == wide and not options.offload):
            self.master = self.weights
        elif options.offload:
            self.master = host_zeros(count, wide, device)
            self.home_grads = host_zeros(count, wide, device)
        else:
            self.master = torch.zeros(count, dtype=wide, device=device)
        self.copies = HostCopyStream(device) if options.offload else None
        self.coming: Callable[[], Tensor] | None = None
        # Frozen parameters have no gradient: their buffer is empty and nothing may read it.
        numel = 0 if self.frozen else count if self.sharded_grads else plan.numel
        self.grads = torch.zeros(numel, dtype=wide, device=device)
        self.shard_grads = (
            self.grads if self.sharded_grads or self.frozen else self.grads[self.begin : self.end]
        )
        self.untouched = True  # nothing of this step is in `grads`, whatever they hold
        self.gathering: dist.Work | None = None

    def views(self, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
        """Returns the whole members, as views of `params` that do not notice when a gather rewrites
        it.

        To be made once, before parameters are let go for the first time: no view can be made of
        freed memory.
        """
        flat = self.params.data
        return {
            member.name: flat[offset : offset + member.numel].view(shapes[member.name])
            for member, offset in zip(self.plan.members, self.plan.offsets, strict=True)
        }

    # Parameters

    def publish(self) -> None:
        """Gather what an update has changed: the new weights in the model's dtype, on their way to
        the other ranks of the shard group.
        """
        if self.master is not self.weights:
            self.weights.copy_(self.master, non_blocking=True)
        if not self.frees_params:
            self._start_gather()

    def prefetch(self) -> None:
        """Start bringing the parameters, if they are neither here nor on their way."""
        if self.frees_params and not self.present and self.gathering is None:
            self.params.untyped_storage().resize_(self.params.numel() * self.params.element_size())
            self._start_gather()

    def unshard(self) -> None:
        """Gather the parameters here (unshard); `wait_and_reshard` lets them go again."""
        self.prefetch()
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None
        self.present = True

    def reshard(self) -> None:
        """Let go of parameters that are not kept between uses; nothing happens to those that are
        not here.
        """
        if self.frees_params and (self.present or self.gathering is not None):
            self.unshard()
            self.params.untyped_storage().resize_(0)
            self.present = False

    def settle(self) -> None:
        """Wait for a gather under way, which also writes this rank's own range, before that is read
        or written.
        """
        if self.gathering is not None and not self.frees_params:
            self.gathering.wait()
            self.gathering = None

    def wait_and_reshard(self) -> None:
        """Wait for what is on its way and let go of what is stale, before the weights are written
        from outside.
        """
        if self.gathering is not None:
            self.unshard()
        self.reshard()

    def _start_gather(self) -> None:
        if self.shard.size > 1 and PARAMETERS not in self.shard.broken:
            piece = (
                self.weights if self.frees_params else self.weights.clone()
            )  # never its own output
            self.gathering = comm.start_all_gather(self.params, piece, self.shard)

    # Gradients

    def start_home(self) -> None:
        """Begin to bring the completed gradients to where the master weights are."""
        if self.copies is not None:
            self.coming = self.copies.bring(self.shard_grads, self.home_grads)

    def gradients(self) -> Tensor:
        """Returns the completed gradients beside the master weights: what an update reads, which
        may overwrite them.
        """
        self.settle()
        if self.coming is not None:
            self.coming()
            self.coming = None
        return self.shard_grads if self.copies is None else self.home_grads

    def begin_step(self) -> None:
        """Begin a step: what comes first overwrites the accumulator."""
        self.untouched = True

    def zero_if_untouched(self) -> None:
        """Clear the gradients when nothing came in this step; nothing more does."""
        if self.untouched:
            self.grads.zero_()
            self.untouched = False

    def reduce_scatter(self, whole: Tensor, done: deque[Callable[[], None]]) -> None:
        """Start summing `whole` over the shard group; what is done on completion is appended to
        `done`.
        """
        message = whole.to(self.message_dtype)
        if self.reduction in self.shard.broken or self.shard.size == 1:
            piece = message[self.begin : self.end].clone()
            done.append(lambda: self._keep(piece))
            return
        piece = message.new_empty(self.end - self.begin)
        work = comm.start_reduce_scatter(piece, message, self.shard)

        def finish(sent: Tensor = message) -> None:  # holds what is being sent until it has left
            work.wait()
            self._keep(piece)

        done.append(finish)

    def _keep(self, piece: Tensor) -> None:
        if self.sharded_grads and not self.untouched:
            self.shard_grads.add_(piece)
        else:
            self.shard_grads.copy_(piece)
        self.untouched = False

    def accumulate(self, params: dict[str, nn.Parameter]) -> None:
        """Add the members' gradients of one microbatch to the whole wide accumulator; takes them
        away.
        """
        self._drain(params, self.grads, self.untouched)
        self.untouched = False

    def pack(self, params: dict[str, nn.Parameter], dtype: torch.dtype) -> Tensor:
        """Returns the members' gradients of one microbatch end to end; takes them away."""
        return self._drain(
            params, torch.empty(self.plan.numel, dtype=dtype, device=self.params.device), True
        )

    def _drain(self, params: dict[str, nn.Parameter], into: Tensor, first: bool) -> Tensor:
        """`first`: the gradients replace what the buffer holds; else they are added to it."""
        for member, offset in zip(self.plan.members, self.plan.offsets, strict=True):
            grad, part = params[member.name].grad, into[offset : offset + member.numel]
            params[member.name].grad = None
            if grad is not None and grad.device != into.device:
                raise InternalError(
                    f"The gradient of {member.name} is on {grad.device}, its sum on {into.device}."
                )
            if first and (grad is None or grad.is_sparse):
                part.zero_()
            if grad is None:
                continue
            if grad.is_sparse:
                _add_rows(grad, part)
            elif first:
                part.copy_(grad.flatten())
            else:
                part.add_(grad.flatten())
        if first:
            for begin, end in self.plan.gaps:
                into[begin:end].zero_()
        return into


def _add_rows(grad: Tensor, part: Tensor) -> None:
    """The rows of a table that were read (`ops.embedding`), to its flat elements."""
    part.view(grad.shape).index_add_(0, grad._indices()[0], grad._values().to(part.dtype))
