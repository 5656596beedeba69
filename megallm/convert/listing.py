"""What conversion supports, as a page of docs/ and of `megallm convert --list`: made of the tables.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterator

from megallm.convert.families import FAMILIES
from megallm.convert.family import Family
from megallm.models.config import ModelConfig
from megallm.models.layer_plan import letters_of
from megallm.models.presets import PRESETS

HEADS = {"lm": "language", "mlm": "masked", "classification": "classes, value", "none": "body"}
_PAGE = """# Models

Made by `megallm convert --list > docs/models.md` from the tables in `megallm/convert` and `megallm/models/presets.py`.

## Hugging Face families, in and out

"""
_SIZES = """
## Presets

`model.preset: NAME` has the sizes of a published `config.json`; parameters are those of the built model.
Layers: `f` sees all, `w` has the sliding window, `n` is without rotary positions (`model.layer_pattern`).

"""


def page() -> str:
    """Returns the page as markdown."""
    families = ["| `model_type` | class | models | heads |", "|---|---|---|---|", *_families()]
    title = "| preset | family | parameters | layers | hidden | context |"
    sizes = [title, "|---|---|---|---|---|---|", *_sizes()]
    return _PAGE + "\n".join(families) + "\n" + _SIZES + "\n".join(sizes) + "\n"


def _families() -> Iterator[str]:
    for family in FAMILIES.values():
        yield f"| `{family.name}` | {family.architecture} | {family.models} | {_heads(family)} |"


def _heads(family: Family) -> str:
    return ", ".join(words for head, words in HEADS.items() if family.architecture_of(head))


def _sizes() -> Iterator[str]:
    for name in PRESETS:
        model = ModelConfig(preset=name).resolve()
        letters = letters_of(model.layer_pattern, model.sliding_window, model.num_layers)
        pattern = model.layer_pattern or letters[0]
        layers = f"{model.num_layers}" + ("" if set(letters) == {"f"} else f" `{pattern}`")
        count = f"{model.num_params() / 1e6:,.1f} M"
        active = model.num_params(active=True) / 1e6
        count += f" ({active:,.1f} M a token)" if model.moe.num_experts else ""
        sizes = f"{layers} | {model.hidden_size} | {model.max_positions}"
        yield f"| {name} | {model.family} | {count} | {sizes} |"
