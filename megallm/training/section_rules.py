"""Keys of `model.moe`, `model.mla` and `model.mtp` that nothing would read, and experts without a
layer. Pure.

Each fault is a sentence and the nearest changes that mend it, for `validate`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from megallm.models.config import SECTIONS, ModelConfig
from megallm.models.presets import FAMILIES, PRESETS
from megallm.run.config import JobConfig

Fault = tuple[str, tuple[dict[str, Any], ...]]
SWITCHES = {
    "moe": "num_experts",
    "mla": "kv_lora_dim",
    "mtp": "depth",
}  # a section is off where this is 0
# Keys of experts that another key switches on, and that key as YAML shows it while it does not.
NEEDED = {
    "drop": ("capacity", "null"),
    "bias_rate": ("selection_bias", "false"),
    "shared_gate": ("shared_ffn_hidden_size", "0"),
}


def section_faults(config: JobConfig, model: ModelConfig) -> Iterator[Fault]:
    """Faults of the sections as they were given, `model` being the resolved one."""
    for name, switch in SWITCHES.items():
        keys = _changed(config.model, model, name)
        if not getattr(getattr(model, name), switch):
            for key in keys:
                sentence = f"model.{name}.{key} is given, but model.{name}.{switch} is 0 and nothing reads it."
                yield sentence, ({f"model.{name}.{key}": None},)
        elif name == "moe":
            yield from _unread_of_experts(model, keys)
            yield from _no_layer(model)


def _changed(given: ModelConfig, model: ModelConfig, name: str) -> list[str]:
    """Keys of a section that say something else than defaults, family and preset do; its switch is
    not among them.
    """
    section, values = SECTIONS[name], vars(getattr(given, name))
    known = dict(section.DEFAULTS)
    for table in (FAMILIES.get(model.family, {}), PRESETS.get(model.preset, {})):
        known |= table.get(name, {})
    keys = [field.name for field in dataclasses.fields(section) if field.name != SWITCHES[name]]
    return [key for key in keys if values[key] is not None and values[key] != known.get(key)]


def _unread_of_experts(model: ModelConfig, keys: list[str]) -> Iterator[Fault]:
    for key, (needed, off) in NEEDED.items():
        if key in keys and not getattr(model.moe, needed):
            sentence = (
                f"model.moe.{key} is given, but model.moe.{needed} is {off} and nothing reads it."
            )
            yield sentence, ({f"model.moe.{key}": None},)


def _no_layer(model: ModelConfig) -> Iterator[Fault]:
    layers = model.num_layers
    if not any(model.moe.has_experts(layer) for layer in range(layers)):
        sentence = f"model.moe.first_dense {model.moe.first_dense} leaves no layer for the experts: the model has "
        yield sentence + f"model.num_layers {layers}.", ({"model.moe.first_dense": layers - 1},)
