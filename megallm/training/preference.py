"""Training on pairs of a chosen and a rejected answer: DPO and its kin, ORPO, SimPO, CPO."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from megallm.base.errors import UsageError
from megallm.data.loader import Batch
from megallm.engine.engine import Engine, Mesh, StepStats
from megallm.losses.preference import Preference, with_prompt
from megallm.training.preference_config import WITH_MARGIN, DpoConfig, DpoOptions
from megallm.training.reference_run import ReferenceIdentity, ReferenceRun
from megallm.training.supervised import run_supervised

_NORMALIZED = {"reference_free": True, "length_normalized": True}
# What a name stands for beyond a function of `losses.preference`; what is given wins.
DEFAULTS: dict[str, dict[str, Any]] = {
    "orpo": {"kind": "orpo", "nll": 1.0, **_NORMALIZED},
    "simpo": {"kind": "sigmoid", "beta": 2.0, "gamma": 1.0, **_NORMALIZED},
    "cpo": {"kind": "sigmoid", "nll": 1.0, "reference_free": True},
}


def loss_of(options: DpoOptions) -> Preference:
    """Returns the loss of a section `dpo`. Errors: UsageError for options that do not go
    together.
    """
    given = {"beta": options.beta, "nll": options.rpo_alpha, "gamma": options.gamma}
    chosen: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    for key in ("reference_free", "length_normalized"):
        chosen |= {key: True} if vars(options)[key] else {}
    names = tuple(options.losses)
    usual = DEFAULTS.get(names[0]) if len(names) == 1 else None
    values = usual or {"kind": names, "weights": tuple(options.losses.values())}
    try:
        return Preference(
            label_smoothing=options.label_smoothing,
            discopop_tau=options.discopop_tau,
            **values | chosen,
        )
    except ValueError as error:
        raise UsageError(f"dpo: {error}") from error


class DpoIdentity(ReferenceIdentity):
    """What a checkpoint of `megallm dpo` remembers."""

    KIND = "dpo"
    config: DpoConfig

    def own(self) -> dict[str, Any]:
        """Returns the loss besides."""
        options = dataclasses.asdict(self.config.dpo)
        del options["watch_steps"]
        return super().own() | {"dpo": options}


class DpoRun(ReferenceRun):
    """Reads pairs: chosen, rejected, chosen, ..."""

    identity = DpoIdentity
    config: DpoConfig
    advice = (
        "This is what DPO does where both answers are alike: set dpo.rpo_alpha=1, which adds the "
        "likelihood of the chosen answers (docs/preferences.md)."
    )

    def __init__(self, config: DpoConfig) -> None:
        super().__init__(config)
        self._loss = loss_of(config.dpo)
        self.beta, self.watch_steps = self._loss.beta, config.dpo.watch_steps

    def loss(self) -> Preference:
        """Returns the loss of pairs."""
        return self._loss

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with another model."""
        return not self._loss.reference_free

    @property
    def not_shared(self) -> str | None:
        """Returns that ORPO's prompts count, for experts' balance once an answer."""
        if "orpo" in self._loss.kinds and self.config.model.moe.num_experts:
            return "dpo.loss orpo trains prompts, whose tokens experts balance once an answer"
        return None

    def read_data(self, mesh: Mesh) -> None:
        """Make the rows ready. Errors: UsageError for margins that the loss cannot use."""
        super().read_data(mesh)
        if self.rows.has_margins and not set(self.config.dpo.losses) & set(WITH_MARGIN):
            raise UsageError(
                f"The rows have margins, which dpo.loss {', '.join(self.config.dpo.losses)} cannot "
                f"use: take one of {', '.join(WITH_MARGIN)}, or leave the column margin out."
            )

    def named(self, batch: Batch) -> list[Batch]:
        """Returns the pairs; a chosen answer is the first of its row."""
        return [batch | {"slots": torch.arange(len(batch["samples"])) % 2}]

    def complete(self, engine: Engine, batches: list[Batch]) -> list[Batch]:
        """Returns the pairs with the reference's numbers; for ORPO with the prompts counted, whose
        likelihood is part of it.
        """
        batches = self.with_reference([one for batch in batches for one in self.named(batch)])
        return [with_prompt(batch) for batch in batches] if "orpo" in self._loss.kinds else batches

    def first_loss(self, stats: StepStats) -> float | None:
        """Returns ln 2 of sigmoid, 1 / (4 beta^2) of ipo, ...; None where rows have margins."""
        return None if self.rows.has_margins else self._loss.first_loss()


def run(
    config: DpoConfig,
    mesh: Mesh,
    resume: str,
    own_log: bool = False,
    allowed: Sequence[str] = (),
) -> None:
    """Train on a checked and resolved configuration; see `run_supervised`."""
    run_supervised(DpoRun(config), mesh, resume, own_log, allowed)
