"""CPU offload of activations: what blocks keep for the backward pass waits in CPU memory, copied
beside the computation and back before its use.

A block's tensors leave as they are saved; when the backward pass first asks for one of them, those
of the block before start to come back too.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megallm.base.device import HostCopyStream

MIN_BYTES = 1024  # a copy of less costs more than it frees


class Offload:
    """The offloaded activations of one pipeline stage; one microbatch's blocks run between two
    `begin`s.
    """

    def __init__(self, device: torch.device) -> None:
        self.copies = HostCopyStream(device)
        self.latest: weakref.ref[_Group] | None = None
        self.bytes_away = 0  # copied so far, for whoever wants to know that it happens

    def begin(self) -> None:
        """Begin a microbatch, whose blocks follow."""
        self.latest = None

    @contextmanager
    def block(self, staying: Iterable[Tensor | None]) -> Iterator[None]:
        """Let what autograd saves inside leave the device, but for memory of the `staying` tensors
        (weights, tables).
        """
        group = _Group(self, staying, self.latest)
        with torch.autograd.graph.saved_tensors_hooks(group.pack, _unpack):
            yield
        group.close()
        self.latest = weakref.ref(group)


class _Away:
    """One saved tensor in CPU memory; autograd holds it, and it holds its group."""

    def __init__(self, group: _Group, tensor: Tensor) -> None:
        self.group, self.uses = group, 0
        self.host = group.owner.copies.to_host(tensor)
        self.coming: tuple[Tensor, object] | None = None

    def request(self) -> None:
        """Start to come back, unless that has begun or every use of it is over."""
        if self.coming is None and self.uses > 0:
            self.coming = self.group.owner.copies.to_device(self.host)

    def take(self) -> Tensor:
        """Returns the tensor, back; let go of after its last use (a second backward pass fetches it
        again).
        """
        copies = self.group.owner.copies
        tensor = copies.wait(*(self.coming or copies.to_device(self.host)))
        self.uses -= 1
        if self.uses <= 0:
            self.coming = None
        return tensor


class _Group:
    """The saved tensors of one block; a tensor that is saved twice leaves once."""

    def __init__(
        self, owner: Offload, staying: Iterable[Tensor | None], before: weakref.ref[_Group] | None
    ) -> None:
        self.owner, self.before = owner, before
        self.staying = {x.untyped_storage().data_ptr() for x in staying if x is not None}
        self.saved: dict[
            tuple, tuple[Tensor, _Away]
        ] = {}  # the tensors too, or their memory would be given to others
        self.members: weakref.WeakSet[_Away] = weakref.WeakSet()

    def pack(self, tensor: Tensor) -> Kept:
        if tensor.nbytes < MIN_BYTES or tensor.untyped_storage().data_ptr() in self.staying:
            return tensor
        shape, stride = tensor.shape, tensor.stride()
        if sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) == tensor.numel() - 1:
            tensor = tensor.detach().as_strided(
                (tensor.numel(),), (1,)
            )  # without gaps: any view of it is one copy
        else:
            stride = None
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in self.saved:
            away = _Away(self, tensor)
            self.saved[key] = (tensor, away)
            self.members.add(away)
            self.owner.bytes_away += tensor.nbytes
        away = self.saved[key][1]
        away.uses += 1
        return away, shape, stride

    def close(self) -> None:
        """Close the block: it has run."""
        self.saved.clear()

    def request(self) -> None:
        for away in self.members:
            away.request()


Kept = Tensor | tuple[_Away, torch.Size, tuple[int, ...] | None]


def _unpack(kept: Kept) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    away, shape, stride = kept
    away.group.request()
    before = away.group.before and away.group.before()
    if before is not None:
        before.request()
    return away.take() if stride is None else away.take().as_strided(shape, stride)
