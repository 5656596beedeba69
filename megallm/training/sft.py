"""Supervised fine-tuning on conversations: the next token of what the assistant says; with another
head the class or the number of a text.
"""

from __future__ import annotations

from collections.abc import Sequence

from megallm.engine.engine import Loss, Mesh
from megallm.losses.language import NextToken
from megallm.losses.scores import Regression
from megallm.training.chat_run import ChatIdentity, ChatRun
from megallm.training.finetune import SftConfig
from megallm.training.supervised import run_supervised


class SftIdentity(ChatIdentity):
    """What a checkpoint of `megallm sft` remembers."""

    KIND = "sft"


class SftRun(ChatRun):
    """Reads conversations, or texts with labels."""

    identity = SftIdentity
    config: SftConfig

    def __init__(self, config: SftConfig) -> None:
        self.neftune_alpha = config.sft.neftune_alpha
        self.hidden_dropout = config.sft.hidden_dropout
        super().__init__(config)

    def loss(self) -> Loss:
        """Returns the loss of the head: cross-entropy with what else is told of the tokens that
        count, or the squared error of a value.
        """
        if self.config.kind == "regression":
            return Regression()
        if self.config.kind == "classification":
            return NextToken(measured=("mean_token_accuracy",))
        mtp, measured = self.config.model.mtp, ("entropy", "mean_token_accuracy")
        return NextToken(mtp.depth, mtp.weight, self.config.sft.dft, measured)


def run(
    config: SftConfig,
    mesh: Mesh,
    resume: str,
    own_log: bool = False,
    allowed: Sequence[str] = (),
) -> None:
    """Train on a checked and resolved configuration; see `run_supervised`."""
    run_supervised(SftRun(config), mesh, resume, own_log, allowed)
