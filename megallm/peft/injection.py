"""What a method is given to fill a stage."""

from __future__ import annotations

from dataclasses import dataclass

from megallm.models.config import ModelConfig
from megallm.peft.config import PeftConfig
from megallm.peft.targets import Target


@dataclass(frozen=True)
class Injection:
    """What is put into every stage: a configuration, the resolved model, the targets that were
    chosen of the whole model, and the seed of dropout."""

    config: PeftConfig
    model: ModelConfig
    chosen: tuple[Target, ...]
    seed: int = 0
