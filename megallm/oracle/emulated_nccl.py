"""A process group with nccl's rules on a CPU, gloo underneath: what would hang or race on GPUs
hangs or fails here.

The rules (torch's ProcessGroupNCCL): a communicator is made at its first use and the host waits
until every member has come to it; an unbatched `isend` or `irecv` uses a communicator of its pair
of ranks, both directions on one, collectives and batches that of the group (pytorch issues 108378,
113281); work on one communicator runs in order of issue, tags are ignored; tensors of the host are
refused, except by the world, which has gloo for them.

What a kernel may still read or write must be left alone until `wait`: outputs hold NaN until then,
and inputs and outputs that were changed or freed before are told.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from megallm.base.errors import InternalError
from megallm.oracle.emulated_device import is_on_host

NAME = "emulated"
POISON = 255  # in every byte: NaN, or -1
Job = Callable[[dist.ProcessGroup, list[Tensor], list[Tensor]], Sequence[dist.Work]]


class RuleBroken(InternalError):
    """Code did what nccl does not allow, or reads and writes that race with a kernel there."""


class Communicator:
    """Ranks that have met, and a thread that runs their work in order of issue, as a stream does.

    Construction blocks until every member has come.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self.jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (job := self.jobs.get()) is not None:
            job()

    def close(self) -> None:
        """End the thread after what was issued before."""
        self.jobs.put(None)
        self.thread.join()


@dataclass
class EmulatedWork:
    """One collective, or one batch, under way: `sent` and `landing` are the stream's own copies."""

    name: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    sent: list[Tensor] = field(default_factory=list)
    landing: list[Tensor] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    error: RuntimeError | None = None
    seen: bool = False

    def start(self, communicator: Communicator, job: Job) -> EmulatedWork:
        """Issue it: from now on its tensors belong to the stream."""
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            self.sent = [
                x.detach().clone(memory_format=torch.contiguous_format) for x in self.inputs
            ]
            self.landing = [
                torch.empty_like(x, memory_format=torch.contiguous_format) for x in self.outputs
            ]
            for x in self.outputs:
                _poison(x)
        communicator.jobs.put(lambda: self._perform(communicator, job))
        return self

    def _perform(self, communicator: Communicator, job: Job) -> None:
        try:
            for work in job(communicator.gloo, self.sent_or_landing, self.landing):
                work.wait()
        except RuntimeError as error:  # gloo's: told where it is waited for
            self.error = error
        self.done.set()

    @property
    def sent_or_landing(self) -> list[Tensor]:
        """Returns what gloo reads; it works in place where input and output are one."""
        for x, y, mine, landed in zip(
            self.inputs, self.outputs, self.sent, self.landing, strict=False
        ):
            if x is y:
                landed.copy_(mine)
        return self.sent

    def is_completed(self) -> bool:
        """Whether it has run; its tensors are the caller's again then."""
        if self.done.is_set() and not self.outputs:
            self.wait()
        return self.done.is_set()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait, check that nobody touched the tensors, and put the results where they belong."""
        self.done.wait()
        if self.error is not None:
            raise self.error
        if self.seen:
            return True
        self.seen = True
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            for x in (*self.inputs, *self.outputs):
                if x.untyped_storage().nbytes() < x.numel() * x.element_size():
                    raise RuleBroken(f"A tensor of {self.name} was freed while it was in flight.")
            for x, mine in zip(self.inputs, self.sent, strict=True):
                if not any(x is y for y in self.outputs) and not _same_bytes(x, mine):
                    raise RuleBroken(f"An input of {self.name} was changed while it was in flight.")
            for x, landed in zip(self.outputs, self.landing, strict=True):
                if not _is_poisoned(x):
                    raise RuleBroken(
                        f"An output of {self.name} was written by others while it was in flight."
                    )
                x.data.copy_(landed)
        return True


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().flatten().view(torch.uint8)


def _poison(x: Tensor) -> None:
    if x.is_contiguous():
        x.data.flatten().view(torch.uint8).fill_(POISON)
    else:
        whole = torch.empty(x.shape, dtype=x.dtype)
        _poison(whole)
        x.data.copy_(whole)


def _is_poisoned(x: Tensor) -> bool:
    return bool((_bytes(x) == POISON).all())


def _same_bytes(x: Tensor, y: Tensor) -> bool:
    return torch.equal(_bytes(x), _bytes(y))


class EmulatedNccl(dist.ProcessGroup):
    """The group of some ranks. `communicators` are those made so far, `""` the group's own; `log`
    lists what was issued by this process, as (group's ranks, communicator, operation, elements).
    """

    made: list[EmulatedNccl] = []  # of this process, since `reset`
    log: list[tuple[tuple[int, ...], str, str, int]] = []

    def __init__(
        self, store: dist.Store, rank: int, ranks: tuple[int, ...], size: int, timeout: timedelta
    ) -> None:
        super().__init__(rank, size)
        self.store, self.ranks, self.timeout = store, ranks, timeout
        self.options = SimpleNamespace(_timeout=timeout)
        self.communicators: dict[str, Communicator] = {}
        # The world is `cpu:gloo,cuda:nccl`.
        self.host = None if ranks else self._gloo("host")
        EmulatedNccl.made.append(self)

    @staticmethod
    def reset() -> None:
        """Forget the groups of earlier worlds."""
        EmulatedNccl.made, EmulatedNccl.log = [], []

    def _gloo(self, key: str) -> dist.ProcessGroupGloo:
        store = dist.PrefixStore(key, self.store)
        return dist.ProcessGroupGloo(store, self.rank(), self.size(), self.timeout)

    def getBackendName(self) -> str:
        """Returns torch's name of this backend."""
        return NAME

    def _get_backend(self, device: torch.device) -> EmulatedNccl:
        return self

    def shutdown(self) -> None:
        """End the threads."""
        for communicator in self.communicators.values():
            communicator.close()
        self.communicators.clear()

    # Communicators

    def _own(self) -> Communicator:
        if "" not in self.communicators:
            store = dist.PrefixStore("own", self.store)
            made = Communicator(store, self.rank(), self.size(), self.timeout)
            self.communicators[""] = made
        return self.communicators[""]

    def _pair(self, peer: int) -> tuple[Communicator, int]:
        low, high = sorted((self.rank(), peer))
        key = f"{low}:{high}"
        if key not in self.communicators:
            place, store = int(self.rank() == high), dist.PrefixStore(key, self.store)
            self.communicators[key] = Communicator(store, place, 2, self.timeout)
        return self.communicators[key], int(peer == high)

    def _start(
        self,
        name: str,
        inputs: list[Tensor],
        outputs: list[Tensor],
        job: Job,
        communicator: Communicator | None = None,
    ) -> EmulatedWork | dist.Work:
        on_host = [is_on_host(x) for x in (*inputs, *outputs)]
        if any(on_host):
            if self.host is None or not all(on_host):
                raise RuleBroken(
                    f"{name} on ranks {list(self.ranks)} was given a tensor of the host: nccl "
                    "moves tensors of the device only."
                )
            return _together(job(self.host, inputs, outputs))
        communicator = communicator or self._own()
        where = next(key for key, each in self.communicators.items() if each is communicator)
        elements = sum(x.numel() for x in inputs or outputs)
        EmulatedNccl.log.append((self.ranks, where, name, elements))
        return EmulatedWork(name, inputs, outputs).start(communicator, job)

    # What torch.distributed calls

    def allreduce(self, tensors: list[Tensor], opts: Any) -> EmulatedWork | dist.Work:
        """Reduce in place."""
        return self._start(
            "all_reduce", tensors, tensors, lambda gloo, sent, out: [gloo.allreduce(out, opts)]
        )

    def broadcast(self, tensors: list[Tensor], opts: Any) -> EmulatedWork | dist.Work:
        """Broadcast in place; the source's tensor is read."""
        return self._start(
            "broadcast", tensors, tensors, lambda gloo, sent, out: [gloo.broadcast(out, opts)]
        )

    def all_gather_single(self, out: Tensor, x: Tensor, opts: Any) -> EmulatedWork | dist.Work:
        """Gather into one tensor."""
        return self._start(
            "all_gather", [x], [out],
            lambda gloo, sent, made: [gloo._allgather_base(made[0], sent[0], opts)],
        )  # fmt: skip

    _allgather_base = all_gather_single

    def reduce_scatter_single(self, out: Tensor, x: Tensor, opts: Any) -> EmulatedWork | dist.Work:
        """Sum and scatter one tensor."""
        return self._start(
            "reduce_scatter", [x], [out],
            lambda gloo, sent, made: [gloo._reduce_scatter_base(made[0], sent[0], opts)],
        )  # fmt: skip

    _reduce_scatter_base = reduce_scatter_single

    def all_to_all_single(
        self, out: Tensor, x: Tensor, received: list[int], sent: list[int], opts: Any
    ) -> EmulatedWork | dist.Work:
        """Exchange rows."""
        return self._start(
            "all_to_all", [x], [out],
            lambda gloo, mine, made: [
                gloo.alltoall_base(made[0], mine[0], received, sent, opts)
            ],
        )  # fmt: skip

    alltoall_base = all_to_all_single

    def gather(
        self, outs: list[list[Tensor]], inputs: list[Tensor], opts: Any
    ) -> EmulatedWork | dist.Work:
        """Gather on one rank; here for control messages only."""
        into = outs[0] if outs else []
        return self._start(
            "gather", inputs, into,
            lambda gloo, sent, made: [gloo.gather([made] if outs else [], sent, opts)],
        )  # fmt: skip

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> EmulatedWork:
        """Send on the communicator of the pair; blocks until that is made."""
        communicator, place = self._pair(peer)
        return self._start(
            "send", tensors, [], lambda gloo, sent, out: [gloo.send(sent, place, 0)], communicator
        )

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> EmulatedWork:
        """Receive on the communicator of the pair; blocks until that is made."""
        communicator, place = self._pair(peer)
        return self._start(
            "recv", [], tensors, lambda gloo, sent, out: [gloo.recv(out, place, 0)], communicator
        )

    def batch(self, operations: list[dist.P2POp]) -> EmulatedWork:
        """Run sends and receives as one on the group's communicator."""
        sends = [op for op in operations if op.op is dist.isend]
        receives = [op for op in operations if op.op is dist.irecv]

        def job(gloo: dist.ProcessGroup, sent: list[Tensor], out: list[Tensor]) -> list[dist.Work]:
            works = [gloo.send([x], op.group_peer, 0) for x, op in zip(sent, sends, strict=True)]
            return works + [
                gloo.recv([x], op.group_peer, 0) for x, op in zip(out, receives, strict=True)
            ]

        return self._start(
            "batch", [op.tensor for op in sends], [op.tensor for op in receives], job
        )

    def barrier(self, opts: Any) -> EmulatedWork:
        """Wait for all members, as an all-reduce."""
        return self.allreduce([torch.zeros(1, device="cpu")], dist.AllreduceOptions())


def _together(works: Sequence[dist.Work]) -> dist.Work:
    (work,) = works
    return work


_batch_isend_irecv = dist.batch_isend_irecv


def batch_isend_irecv(operations: list[dist.P2POp]) -> list[Any]:
    """Stands in for torch's, which coalesces for groups of its own class only."""
    group = operations[0].group
    if isinstance(group, EmulatedNccl):
        return [group.batch(operations)]
    return _batch_isend_irecv(operations)


def register() -> None:
    """Make the backend known to torch.distributed, under `NAME`; once a process."""
    if NAME in dist.Backend.backend_list:
        return

    def create(options: Any, further: Any) -> EmulatedNccl:
        ranks = tuple(options.global_ranks_in_group)
        return EmulatedNccl(
            options.store, options.group_rank, ranks, options.group_size, options.timeout
        )

    dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu"])
    dist.batch_isend_irecv = batch_isend_irecv
