"""Pretraining on indexed datasets: the next token, or tokens that were hidden."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megallm.base.errors import DataError
from megallm.data.batches import BatchReader, Share
from megallm.engine.engine import Engine, Loss, Mesh
from megallm.losses.language import MaskedDiffusion, NextToken
from megallm.run.changes import Change
from megallm.training.config import PretrainConfig
from megallm.training.held_out import HeldOut
from megallm.training.kept_tokenizer import keep_tokenizer
from megallm.training.pretrain_identity import PretrainIdentity
from megallm.training.reading import (
    check_tokenizers,
    first_held_out,
    held_out_readers,
    open_reader,
    tokenizer_warning,
)
from megallm.training.supervised import Evaluation, SupervisedRun, run_supervised
from megallm.training.trainer import Ledger

LOSSES: dict[str, Loss] = {
    "next_token": NextToken(),
    "mlm": NextToken(),
    "diffusion": MaskedDiffusion(),
}


class PretrainRun(SupervisedRun):
    """Reads the stream of documents, or Megatron-LM's samples."""

    identity = PretrainIdentity
    config: PretrainConfig

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config)
        self.log_samples = config.data.log_samples

    def check_data(self) -> str | None:
        """Returns a warning when nothing says which tokenizer made the sources."""
        check_tokenizers(self.config)
        return tokenizer_warning(self.config)

    def keep(self, changes: Sequence[Change]) -> None:
        """Copy the tokenizer into the run folder."""
        changed = any(change.key == "data.tokenizer" for change in changes)
        keep_tokenizer(self.config, replace=changed)

    def reader(self, share: Share, first_step: int, state: dict[str, Any]) -> BatchReader:
        """Returns what this rank's replica reads, the same on every rank of a replica."""
        return open_reader(self.config, share, first_step, state)

    def loss(self) -> Loss:
        """Returns the loss of the objective, with a term for each further token that the model
        predicts.
        """
        mtp = self.config.model.mtp
        return NextToken(mtp.depth, mtp.weight) if mtp.depth else LOSSES[self.config.data.objective]

    def evaluation(self, engine: Engine, share: Share, ledger: Ledger) -> Evaluation:
        """Returns the mean loss over `eval.batches` global batches of the validation split.

        In the stream order they are always the first ones, in Megatron-LM's each evaluation reads
        the next ones. What cannot be read is said before the first step.
        """
        config = self.config
        try:
            readers = held_out_readers(config, share)
        except DataError as error:
            raise DataError(f"{error} Or train without a held-out loss: eval.batches=0.") from error
        objective = LOSSES[config.data.objective]
        batches = config.eval.batches
        return HeldOut(
            engine, objective, readers, batches, lambda: first_held_out(config, ledger.step)
        )

    def next_command(self) -> str:
        """Returns the command that shows what a model of this objective can do."""
        run = Path(self.config.run.dir)
        if self.config.data.objective == "next_token":
            return f'megallm generate --model {run} --prompt "..."'
        return f"megallm convert --to hf --input {run} --output DIR"


def run(
    config: PretrainConfig,
    mesh: Mesh,
    resume: str,
    own_log: bool = False,
    allowed: Sequence[str] = (),
) -> None:
    """Train on a checked and resolved configuration; see `run_supervised`."""
    run_supervised(PretrainRun(config), mesh, resume, own_log, allowed)
