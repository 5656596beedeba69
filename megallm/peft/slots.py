"""Named adapters in the slot of a module, and which of them are in use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from megallm.base.errors import UsageError
from megallm.parallel.tensor import Adaptable


class Adapters(nn.ModuleDict):
    """The adapters of one slot by name; those that are `active` change the result one after
    another."""

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()

    def forward(self, x: Tensor, y: Tensor, *where: Any) -> Tensor:
        """Returns what a slot is called with (`parallel.tensor.Linear.adapted`)."""
        for name in self.active:
            if name in self:
                y = self[name](x, y, *where)
        return y

    def in_use(self) -> Iterator[nn.Module]:
        """Yields the active adapters of this slot."""
        yield from (self[name] for name in self.active if name in self)


def put(module: Adaptable, name: str, adapter: nn.Module) -> None:
    """Put an adapter into the slot of `module`, on the meta device, and use it from now on."""
    if module.adapter is None:
        module.adapter = Adapters()
    module.adapter[name] = adapter
    module.adapter.active = (*module.adapter.active, name)


def slots_of(model: nn.Module) -> Iterator[tuple[str, Adaptable]]:
    """Yields every module with a filled slot under its logical name."""
    for name, module in model.named_modules():
        if isinstance(module, Adaptable) and module.adapter is not None:
            yield name, module


def use(model: nn.Module, names: Sequence[str]) -> None:
    """Use these adapters and no others; parameters of the others keep their values.

    Raises UsageError for a name that no slot of `model` has.
    """
    found = [module.adapter for _, module in slots_of(model)]
    known = {name for adapters in found for name in adapters}
    unknown = [name for name in names if name not in known]
    if unknown and found:
        raise UsageError(
            f"There is no adapter '{unknown[0]}'; the model has {', '.join(sorted(known))}."
        )
    for adapters in found:
        adapters.active = tuple(names)
