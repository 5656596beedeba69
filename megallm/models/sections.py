"""Parts of a model's configuration that only some models have: experts, latent attention, extra predictions. No torch.

As in `models.config`, a field left at None is taken from the preset, then from the family, then from `DEFAULTS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self


@dataclass(frozen=True)
class Section:
    """A nested group of fields, all None until `resolve`."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}

    def resolve(self, table: Mapping[str, Any]) -> Self:
        """Fill the fields left at None from `table` (of a preset or family), then from the defaults."""
        values = dict(self.DEFAULTS) | dict(table)
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return type(self)(**(values | {name: value for name, value in given.items() if value is not None}))


@dataclass(frozen=True)
class MoeConfig(Section):
    """Mixture of experts in place of the feed-forward layer."""

    DEFAULTS = {"num_experts": 0}

    num_experts: int | None = None  # 0: dense feed-forward layers


@dataclass(frozen=True)
class MlaConfig(Section):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

    DEFAULTS = {"kv_lora_dim": 0}

    kv_lora_dim: int | None = None  # size of the latent that keys and values are made of; 0: ordinary attention


@dataclass(frozen=True)
class MtpConfig(Section):
    """Multi-token prediction: what lies further ahead than the next token."""

    DEFAULTS = {"depth": 0}

    depth: int | None = None  # tokens predicted beyond the next one; 0: none
