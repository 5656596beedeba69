"""What starts from the weights of the base, once these are there."""

from __future__ import annotations

from torch import Tensor

from megallm.engine.engine import Engine
from megallm.peft.lora import LowRank
from megallm.peft.slots import slots_of


def start_from_base(engine: Engine, known: frozenset[str] = frozenset()) -> None:
    """Give parameters of adapters that start from the base's weights (DoRA's magnitudes) that
    start; those in `known` keep theirs.

    To be called after the base's weights were filled and before the first step; collective over the
    world. Where no adapter needs it, it does nothing.
    """
    with engine.parameters.gathered():
        made = {name: x for name, x in _starts(engine).items() if name not in known}
    for name, shard, box, tensor in engine.masters():
        if name in made:
            whole = shard.box(engine.mesh.layout, engine.mesh.coords)
            tensor.copy_(made[name][box.slices(whole)])
    engine.parameters.publish()


def _starts(engine: Engine) -> dict[str, Tensor]:
    """This rank's pieces by logical name."""
    found = {}
    for stage in engine.model.stages.values():
        for at, module in slots_of(stage):
            for name, adapter in module.adapter.named_modules():
                if isinstance(adapter, LowRank):
                    for key, values in adapter.starts().items():
                        found[f"{at}.adapter.{name}.{key}"] = values
    return found
