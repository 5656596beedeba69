"""The reference model of an engine with adapters: the same weights with other adapters, or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from megallm.base.errors import UsageError
from megallm.engine.engine import Engine
from megallm.parallel.shard import named_shards
from megallm.parallel.tensor import ADAPTER, without_adapters
from megallm.peft.slots import slots_of, use


@contextmanager
def off(engine: Engine) -> Iterator[None]:
    """Run the engine as the base model inside the context; collective over the world.

    Raises UsageError where a part of the base is trained itself (`modules_to_save`): the model
    without its adapters is not the one that training began with.
    """
    trained = [
        name
        for stage in engine.model.stages.values()
        for name, param, _ in named_shards(stage)
        if param.requires_grad and ADAPTER not in name
    ]
    if engine.mesh.largest(len(trained)):
        told = trained[0] if trained else "a part of another stage"
        raise UsageError(
            f"{told} of the base is trained itself (peft.modules_to_save), so that switching "
            "adapters off gives no reference model: build a second engine from the base for it."
        )
    with ExitStack() as stack:
        for stage in engine.model.stages.values():
            stack.enter_context(without_adapters(stage))
        yield


@contextmanager
def using(engine: Engine, *names: str) -> Iterator[None]:
    """Use these adapters and no others inside the context, such as a frozen copy as reference."""
    stages = engine.model.stages.values()
    before = [(m.adapter, m.adapter.active) for stage in stages for _, m in slots_of(stage)]
    for stage in stages:
        use(stage, names)
    try:
        yield
    finally:
        for adapters, active in before:
            adapters.active = active
