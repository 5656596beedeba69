"""Activation checkpointing, or activation recomputation, full or selective (arXiv 1604.06174,
2205.05198). What is random in a block is a function of `TOKEN_KEYS`, which come back with it: no
state of a generator is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Runner = InputRunner = Callable[..., Any]  # runner, input_runner
_AGAIN: ContextVar[bool] = ContextVar("again", default=False)
# Keys of the tokens `[B, T/cp]` of the microbatch that runs, for dropout
# (`ops.dropout.token_keys`).
TOKEN_KEYS: ContextVar[Tensor | None] = ContextVar("token_keys", default=None)


def runs_again() -> bool:
    """Returns whether the caller is being run a second time, in the backward pass."""
    return _AGAIN.get()


@contextmanager
def _second_run(keys: Tensor | None) -> Iterator[None]:
    again, current = _AGAIN.set(True), TOKEN_KEYS.set(keys)
    try:
        yield
    finally:
        _AGAIN.reset(again)
        TOKEN_KEYS.reset(current)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What surrounds the first run of a function and the second one."""
    return nullcontext(), _second_run(TOKEN_KEYS.get())


# What runs a function is chosen once, when a model is built; a module keeps the runner and not a
# bound method of its own, which would be a cycle that holds its memory until a collection.


def runner(recomputes: bool) -> Runner:
    """Returns what calls `function(*inputs)`; with `recomputes` it keeps only the inputs and calls
    again in the backward pass (activation checkpointing).
    """
    return _run_again if recomputes else _run


def _run(function: Callable[..., Any], *inputs: Any) -> Any:
    return function(*inputs)


def _run_again(function: Callable[..., Any], *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(
        function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts
    )


def input_runner(recomputes: bool) -> InputRunner:
    """Returns what calls `consume(make(x), *rest)`; with `recomputes`, `consume` keeps no copy of
    `make(x)`: the backward pass makes it again.

    For a cheap `make` that keeps its input and not its output, such as a norm. What `consume`
    gathers from it over tp is kept as it is.
    """
    return _consume_again if recomputes else _consume


def _consume(
    make: Callable[[Tensor], Tensor], x: Tensor, consume: Callable[..., Tensor], *rest: Any
) -> Tensor:
    return consume(make(x), *rest)


def _consume_again(
    make: Callable[[Tensor], Tensor], x: Tensor, consume: Callable[..., Tensor], *rest: Any
) -> Tensor:
    y = make(x)
    if not torch.is_grad_enabled():
        return consume(y, *rest)
    held = _RecomputedTensor(make, x.detach(), y)
    with torch.autograd.graph.saved_tensors_hooks(held.pack, held.unpack):
        return consume(y, *rest)


class _RecomputedTensor:
    """Stands in for one tensor in what autograd keeps; made once more however often it is asked
    for.
    """

    def __init__(self, make: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
        self.make, self.x, self.uses = make, x, 0
        self.address, self.numel, self.dtype = y.data_ptr(), y.numel(), y.dtype
        self.again: Tensor | None = None

    def pack(self, tensor: Tensor) -> Tensor | torch.Size:
        same = (
            tensor.data_ptr() == self.address
            and tensor.numel() == self.numel
            and tensor.dtype == self.dtype
        )
        if not (same and tensor.is_contiguous()):
            return tensor
        self.uses += 1
        return tensor.shape

    def unpack(self, kept: Tensor | torch.Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if self.again is None:
            with torch.no_grad():
                self.again = self.make(self.x)
        again, self.uses = self.again, self.uses - 1
        if not self.uses:
            self.again = None
        return again.view(kept)
