"""How adapters begin: from the seed, from a folder of PEFT's, or from the weights of the base."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import Tensor

from megallm.convert.weights import WeightSource
from megallm.engine.engine import Engine
from megallm.models.config import ModelConfig
from megallm.peft.config import PeftConfig
from megallm.peft.lora import LowRank
from megallm.peft.reading import AdapterFolder
from megallm.peft.slots import slots_of
from megallm.peft.sources import Joined


def resolve(config: PeftConfig, model: ModelConfig) -> PeftConfig:
    """Returns the configuration to prepare a model with: a folder that `adapter` names
    says which modules are adapted, with which rank and factor. Raises UsageError, CheckpointError.
    """
    if config.adapter is None:
        return config
    found = AdapterFolder(config.adapter, model, config.name).config
    kept = {key: getattr(config, key) for key in ("lr_b", "dropout", "adapter", "quantize")}
    return replace(found, **kept)


def fill(engine: Engine, base: WeightSource, configs: Sequence[PeftConfig]) -> None:
    """Fill an engine that was prepared with these resolved configurations: the base from `base`,
    adapters from their folders or the seed; collective over the world.
    """
    model = engine.config.model
    folders = [AdapterFolder(c.adapter, model, c.name) for c in configs if c.adapter is not None]
    engine.fill(Joined(*folders, base))
    start_from_base(engine, {name for folder in folders for name in folder.names()})


def start_from_base(engine: Engine, known: Collection[str] = ()) -> None:
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
