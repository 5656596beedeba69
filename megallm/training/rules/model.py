"""Rules about the model: keys of `model.moe`, `model.mla` and `model.mtp` that nothing would read,
experts without a layer, and the vocabulary. Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megallm.models.config import SECTIONS, ModelConfig
from megallm.models.presets import FAMILIES, PRESETS
from megallm.training.rules.problem import Facts, Problem, Rules

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


def model_sections(facts: Facts) -> Iterator[Problem]:
    """Yields keys of the sections that nothing reads."""
    config, model = facts.config, facts.model
    for name, switch in SWITCHES.items():
        keys = _changed(config.model, model, name)
        if not getattr(getattr(model, name), switch):
            for key in keys:
                sentence = (
                    f"model.{name}.{key} is given, but model.{name}.{switch} is 0 and "
                    "nothing reads it."
                )
                yield Problem("sections", sentence, ({f"model.{name}.{key}": None},))
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


def _unread_of_experts(model: ModelConfig, keys: list[str]) -> Iterator[Problem]:
    for key, (needed, off) in NEEDED.items():
        if key in keys and not getattr(model.moe, needed):
            sentence = (
                f"model.moe.{key} is given, but model.moe.{needed} is {off} and nothing reads it."
            )
            yield Problem("sections", sentence, ({f"model.moe.{key}": None},))


def _no_layer(model: ModelConfig) -> Iterator[Problem]:
    layers = model.num_layers
    if not any(model.moe.has_experts(layer) for layer in range(layers)):
        sentence = (
            f"model.moe.first_dense {model.moe.first_dense} leaves no layer for the "
            "experts: the model has "
        )
        yield Problem(
            "sections",
            sentence + f"model.num_layers {layers}.",
            ({"model.moe.first_dense": layers - 1},),
        )


def vocabulary(facts: Facts) -> Iterator[Problem]:
    """Yields a vocabulary that is smaller than the tokenizer's."""
    vocab, needed = facts.model.vocab_size, facts.tokenizer_vocab
    if needed is not None and vocab < needed:
        sentence = (
            f"model.vocab_size {vocab} is smaller than the tokenizer's {needed}: some "
            "tokens would have no row."
        )
        yield Problem("vocabulary", sentence, ({"model.vocab_size": needed},))


RULES = Rules(
    resolved={
        model_sections: (
            "model.num_layers",
            "model.moe.num_experts",
            "model.mla.kv_lora_dim",
            "model.mtp.depth",
        ),
        vocabulary: ("model.vocab_size",),
    }
)
