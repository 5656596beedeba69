"""Collectives between the ranks of one host over shared memory: a backend of torch.distributed for
tensors of the CPU, in place of gloo. The work is done by csrc/collectives.

A group whose ranks are on several hosts, or where a rank lacks the extension, is gloo's: its ranks
tell each other when it is made. Sums are made in the order of the ranks, 16-bit floats in fp32 and
rounded once; every rank gets the same bits, and a reduce-scatter those of an all-reduce. A peer
that has ended is noticed within 0.1 s, and raises a DistNetworkError as the time limit does.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megallm.base import extension
from megallm.base.errors import InternalError

NAME = "shm"
# The numbers of csrc/collectives/reduce.hpp.
TYPES = {
    dtype: number
    for number, dtype in enumerate((
        torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool,
    ))
}  # fmt: skip
OPERATIONS = ("SUM", "AVG", "MAX", "MIN", "PRODUCT")
_NUMBERS = {int(getattr(dist.ReduceOp, name)): n for n, name in enumerate(OPERATIONS)}
BOOT = Path("/proc/sys/kernel/random/boot_id")


class SharedMemoryWork(dist.Work):
    """A call under way; it keeps its tensors alive. `handle` None: it has run.

    `landing` is where results come that `out` has no contiguous memory for.
    """

    def __init__(self, handle: Any, tensors: tuple[Tensor, ...], landing: Landing = ()) -> None:
        super().__init__()
        self.handle, self.tensors, self.landing = handle, tensors, landing

    @property
    def under_way(self) -> bool:
        """Whether its tensors are still read or written."""
        return self.handle is not None and not self.handle.done()

    def is_completed(self) -> bool:
        """Returns whether it has run; its results are in place then."""
        if self.under_way:
            return False
        if self.landing:
            self.wait()
        return True

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait until it has run; DistNetworkError when a peer is gone or the time is over."""
        if self.handle is not None:
            self.handle.wait(timeout.total_seconds() if timeout else 0.0)
        for out, landed in self.landing:
            out.detach().copy_(landed)
        self.handle, self.tensors, self.landing = None, (), ()
        return True

    def result(self) -> list[Tensor]:
        """Returns the tensors of the call while it is under way."""
        return list(self.tensors)


Landing = tuple[tuple[Tensor, Tensor], ...]


class SharedMemoryGroup(dist.ProcessGroup):
    """The group of ranks on one host; see the module."""

    def __init__(
        self, native: Any, store: dist.Store, rank: int, size: int, timeout: timedelta
    ) -> None:
        super().__init__(rank, size)
        self.native, self.store, self.place, self.ranks = native, store, rank, size
        self.options = SimpleNamespace(_timeout=timeout)
        self.flying: list[SharedMemoryWork] = []  # those nobody may hold on to until they have run
        self.further: dist.ProcessGroupGloo | None = None

    def getBackendName(self) -> str:
        """Returns torch's name of this backend."""
        return NAME

    def _get_backend(self, device: torch.device) -> SharedMemoryGroup:
        return self

    def shutdown(self) -> None:
        """End what is under way, with an error where it is waited for, and leave the others."""
        self.native.close()
        self.flying.clear()

    abort = shutdown

    def _work(self, handle: Any, tensors: tuple[Tensor, ...], landing: Landing) -> SharedMemoryWork:
        work = SharedMemoryWork(handle, tensors, landing)
        if handle is not None:
            self.flying = [each for each in self.flying if each.under_way]
            self.flying.append(work)
        elif landing:
            work.wait()
        return work

    # What torch.distributed calls

    def allreduce(self, tensors: list[Tensor], opts: Any) -> SharedMemoryWork:
        """Reduce in place."""
        (x,) = tensors
        kind, op = _reduction(x, opts)
        dense, landing = _out(x, filled=True)
        handle = self.native.all_reduce(dense.data_ptr(), dense.numel(), kind, op, opts.asyncOp)
        return self._work(handle, (dense,), landing)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> SharedMemoryWork:
        """Broadcast in place."""
        (x,) = tensors
        dense, landing = _out(x, filled=True)
        handle = self.native.broadcast(dense.data_ptr(), dense.nbytes, opts.rootRank, opts.asyncOp)
        return self._work(handle, (dense,), landing)

    def all_gather_single(self, out: Tensor, x: Tensor, opts: Any) -> SharedMemoryWork:
        """Gather into one tensor."""
        self._check_sizes("all_gather", out, x)
        sent, (dense, landing) = _dense(x), _out(out)
        addresses = sent.data_ptr(), dense.data_ptr()
        handle = self.native.all_gather(*addresses, sent.nbytes, opts.asyncOp)
        return self._work(handle, (sent, dense), landing)

    _allgather_base = all_gather_single

    def reduce_scatter_single(self, out: Tensor, x: Tensor, opts: Any) -> SharedMemoryWork:
        """Reduce and scatter one tensor."""
        self._check_sizes("reduce_scatter", x, out)
        kind, op = _reduction(x, opts)
        sent, (dense, landing) = _dense(x), _out(out)
        addresses = sent.data_ptr(), dense.data_ptr()
        handle = self.native.reduce_scatter(*addresses, dense.numel(), kind, op, opts.asyncOp)
        return self._work(handle, (sent, dense), landing)

    _reduce_scatter_base = reduce_scatter_single

    def all_to_all_single(
        self, out: Tensor, x: Tensor, received: list[int], sent: list[int], opts: Any
    ) -> SharedMemoryWork:
        """Exchange rows."""
        mine, (dense, landing) = _dense(x), _out(out)
        if out.dtype != x.dtype:
            raise ValueError(f"all_to_all of {x.dtype} into {out.dtype}.")
        runs = self._runs(x, sent), self._runs(out, received)
        addresses = mine.data_ptr(), dense.data_ptr()
        handle = self.native.all_to_all(*addresses, *runs, opts.asyncOp)
        return self._work(handle, (mine, dense), landing)

    alltoall_base = all_to_all_single

    def gather(
        self, outs: list[list[Tensor]], inputs: list[Tensor], opts: Any
    ) -> SharedMemoryWork:
        """Gather on one rank."""
        (x,) = inputs
        sent, made = _dense(x), [_out(out) for out in (outs[0] if outs else [])]
        for dense, _ in made:
            if dense.nbytes != sent.nbytes:
                raise ValueError(f"gather of {sent.nbytes} bytes into {dense.nbytes}.")
        places = [dense.data_ptr() for dense, _ in made]
        arguments = sent.data_ptr(), places, sent.nbytes, opts.rootRank, opts.asyncOp
        handle = self.native.gather(*arguments)
        landing = tuple(pair for _, pairs in made for pair in pairs)
        return self._work(handle, (sent, *(dense for dense, _ in made)), landing)

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> SharedMemoryWork:
        """Send; what the other end has room for leaves at once."""
        (x,) = tensors
        sent = _dense(x)
        return self._work(self.native.send(sent.data_ptr(), sent.nbytes, peer, tag), (sent,), ())

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> SharedMemoryWork:
        """Take the next message of a tag."""
        (x,) = tensors
        dense, landing = _out(x)
        handle = self.native.receive(dense.data_ptr(), dense.nbytes, peer, tag)
        return self._work(handle, (dense,), landing)

    def barrier(self, opts: Any) -> SharedMemoryWork:
        """Wait for all members."""
        return self._work(self.native.all_reduce(0, 0, 0, 0, opts.asyncOp), (), ())

    def gloo(self) -> dist.ProcessGroupGloo:
        """Returns the same ranks' gloo group, for what is not made here; collective the first time.
        """
        if self.further is None:
            store = dist.PrefixStore("further", self.store)
            limit = self.options._timeout
            self.further = dist.ProcessGroupGloo(store, self.place, self.ranks, limit)
        return self.further

    def _check_sizes(self, name: str, whole: Tensor, part: Tensor) -> None:
        if whole.numel() != part.numel() * self.ranks or whole.dtype != part.dtype:
            raise ValueError(
                f"{name} over {self.ranks} ranks: {list(whole.shape)} {whole.dtype} is not "
                f"{self.ranks} times {list(part.shape)} {part.dtype}."
            )

    def _runs(self, x: Tensor, rows: list[int]) -> list[int]:
        if not rows:
            rows = [len(x) // self.ranks] * self.ranks
        if len(rows) != self.ranks or sum(rows) != len(x) or min(rows) < 0:
            raise ValueError(f"all_to_all: {rows} does not divide {len(x)} rows.")
        row = x.element_size() * x.shape[1:].numel()
        return [count * row for count in rows]


def _by_gloo(name: str) -> Callable[..., dist.Work]:
    def call(self: SharedMemoryGroup, *args: Any, **kwargs: Any) -> dist.Work:
        return getattr(self.gloo(), name)(*args, **kwargs)

    call.__name__ = name
    return call


# Not used by us, but a part of what a group of torch can do.
for _name in ("allgather", "reduce_scatter", "alltoall", "reduce", "scatter", "recv_anysource"):
    setattr(SharedMemoryGroup, _name, _by_gloo(_name))


def _on_cpu(x: Tensor) -> Tensor:
    if x.device.type != "cpu" or x.layout != torch.strided:
        raise InternalError(f"Shared memory moves dense tensors of the CPU; this is {x.device}.")
    return x


def _dense(x: Tensor) -> Tensor:
    return _on_cpu(x).contiguous()


def _out(x: Tensor, filled: bool = False) -> tuple[Tensor, Landing]:
    """Returns memory for a result, and what is to be copied then; `filled`: with what `x` holds."""
    if _on_cpu(x).is_contiguous():
        return x, ()
    like = torch.empty(x.shape, dtype=x.dtype)
    landed = like.copy_(x.detach()) if filled else like
    return landed, ((x, landed),)


def _reduction(x: Tensor, opts: Any) -> tuple[int, int]:
    op = _NUMBERS.get(int(opts.reduceOp.op))
    if op is None or x.dtype not in TYPES:
        raise InternalError(
            f"Reducing {x.dtype} by {opts.reduceOp} is not possible over shared memory: "
            f"{', '.join(OPERATIONS)} of {', '.join(map(str, TYPES))} are."
        )
    return TYPES[x.dtype], op


# Making a group


def register() -> str:
    """Make the backend known to torch.distributed; returns its name."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu"])
    return NAME


def create(options: Any, further: Any) -> SharedMemoryGroup | dist.ProcessGroupGloo:
    """Returns the group of the ranks that call this: over shared memory where all can, else gloo's.
    """
    rank, size = options.group_rank, options.group_size
    store, timeout = options.store, options.timeout
    module = extension.collectives()
    native = _meet(module, store, rank, size, timeout)
    if native is None:
        return dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout)
    return SharedMemoryGroup(native, store, rank, size, timeout)


def _meet(
    module: ModuleType | None, store: dist.Store, rank: int, size: int, timeout: timedelta
) -> Any:
    """Returns the memory that the ranks share, None on all of them where one cannot have it."""
    if size > 64:  # of MAX_RANKS, which a rank without the extension cannot ask
        return None
    host = None if module is None else [*_host(), module.VERSION]
    cores = sorted(os.sched_getaffinity(0))
    told = [json.loads(text) for text in _exchange(store, "host", rank, size, [host, cores])]
    if module is None or any(each is None or each != host for each, _ in told):
        return None
    # Spinning helps where every rank has a core of its own.
    spins = len({core for _, theirs in told for core in theirs}) >= size
    limits = timeout.total_seconds(), spins
    nonce, native = secrets.randbits(63), None
    if rank == 0:
        native = _open(module, "", nonce, rank, size, *limits)
        found = None if native is None else [f"/proc/{os.getpid()}/fd/{native.fd}", nonce]
        store.set("memory", json.dumps(found))
    else:
        found = json.loads(store.get("memory"))
        if found is not None:
            native = _open(module, *found, rank, size, *limits)
    opened = _exchange(store, "opened", rank, size, native is not None)
    return native if all(json.loads(text) for text in opened) else None


def _host() -> list[str | int]:
    """Returns what tells this machine, and this view of its processes, from others."""
    try:
        return [BOOT.read_text().strip(), os.readlink("/proc/self/ns/pid"), os.getuid()]
    except OSError:
        return [secrets.token_hex(16)]


def _open(module: ModuleType, *args: Any) -> Any:
    try:
        return module.Group(*args)
    except RuntimeError:
        return None


def _exchange(store: dist.Store, key: str, rank: int, size: int, value: Any) -> list[bytes]:
    store.set(f"{key}/{rank}", json.dumps(value))
    return store.multi_get([f"{key}/{each}" for each in range(size)])
