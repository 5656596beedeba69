"""The moments at which a unit (embedding, one block, head) of a stage is about to be used or done
with.

Whoever shards parameters listens: gather before use, let go after it, reduce gradients when they
are complete. The moments in the backward pass come from two identities around the unit, not from
hooks on parameters: the backward of the outer one runs before the unit's, that of the inner one
after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class Units(Protocol):
    """Listens to the use of the units named by `keys`."""

    def before_forward(self, keys: tuple[str, ...]) -> None: ...

    def after_forward(self, keys: tuple[str, ...]) -> None: ...

    def before_backward(self, keys: tuple[str, ...]) -> None: ...

    def after_backward(self, keys: tuple[str, ...]) -> None: ...


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        on_backward: Callable[[tuple[str, ...]], None],
        keys: tuple[str, ...],
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.on_backward, ctx.keys = on_backward, keys
        ctx.set_materialize_grads(False)  # what nobody differentiates stays without a gradient
        views = tuple(x.view_as(x) for x in xs)
        ctx.mark_non_differentiable(
            *(view for view, x in zip(views, xs, strict=True) if not x.requires_grad)
        )
        return views

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple:
        ctx.on_backward(ctx.keys)
        return None, None, *grads


Result = TypeVar("Result", Tensor, tuple[Tensor, ...])


def run_unit(
    units: Units | None,
    keys: tuple[str, ...],
    function: Callable[..., Result],
    x: Tensor,
    *rest: Any,
    once: bool = False,
) -> Result:
    """Returns `function(x, *rest)`, a tensor or several, and tells `units` of the four moments
    around it.

    The backward pass uses the weights wherever an *output* needs a gradient: also where the input
    needs none, because everything below is frozen. Then nothing ends the unit's own backward pass;
    the stage's end releases it (`Listener.stage_done`). A look-up of tokens needs its weights only
    `once`, unless an adapter multiplies what it found.
    """
    if units is None:
        return function(x, *rest)
    units.before_forward(keys)
    training = torch.is_grad_enabled()
    inside = x
    if training and x.requires_grad:
        (inside,) = _Gate.apply(units.after_backward, keys, x)
    out = function(inside, *rest)
    several = out if isinstance(out, tuple) else (out,)
    if training and not once and any(y.requires_grad for y in several):
        gated = _Gate.apply(units.before_backward, keys, *several)
        out = gated if isinstance(out, tuple) else gated[0]
    units.after_forward(keys)
    return out


def unit_of(name: str) -> str:
    """Returns the unit of a parameter, from its logical name."""
    first, _, rest = name.partition(".")
    if first in ("layers", "mtp"):
        return f"{first}.{rest.partition('.')[0]}"
    if first in ("final_norm", "head"):
        return "head"
    return first if first in ("embedding_norm", "prompt", "critic") else "embedding"
