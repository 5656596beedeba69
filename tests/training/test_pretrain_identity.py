"""Whether a checkpoint belongs to a configuration: also one that was written before some keys existed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megallm.base.config import replace
from megallm.base.errors import UsageError
from megallm.checkpoint import store
from megallm.checkpoint.io import Part
from megallm.models.config import ModelConfig
from megallm.parallel.mesh import Mesh
from megallm.training.config import PretrainConfig
from megallm.training.resuming import describe, ledger_and_changes
from megallm.training.validate import check

MODEL = ModelConfig(family="gpt2", num_layers=2, hidden_size=16, num_heads=2, vocab_size=300)
CONFIG = check(
    replace(PretrainConfig(model=MODEL), {"data.sources": {"p": 1.0}, "data.seq_len": 8, "data.tokenizer": "bytes"})
)
LATER = ("causal", "norm_place", "embedding_norm", "token_types", "head", "head_bias", "num_labels", "pooler")


def saved(folder: Path, **changes: object) -> Path:
    """A checkpoint of `CONFIG` as it was written when models had none of the LATER keys."""
    meta = describe(CONFIG) | {"ledger": {"step": 3}}
    model = {key: value for key, value in meta["model"].items() if key not in LATER} | changes
    part = Part("x", (1,), (0,), torch.zeros(1))
    return store.save(folder, 3, [part], meta | {"model": model}, Mesh.single())


def test_an_older_checkpoint_is_that_of_the_same_model(tmp_path):
    assert ledger_and_changes(saved(tmp_path), describe(CONFIG), (), ())[0] == {"step": 3}


def test_what_differs_is_named(tmp_path):
    step = saved(tmp_path)
    other = check(replace(CONFIG, {"model.causal": False, "data.objective": "mlm", "model.head": "mlm"}))
    with pytest.raises(UsageError, match=r"model\.causal: checkpoint True, configuration False") as caught:
        ledger_and_changes(step, describe(other), (), ())
    text = str(caught.value)
    assert "model.head: checkpoint 'lm', configuration 'mlm'" in text
    assert "data.objective: checkpoint 'next_token', configuration 'mlm'" in text
    wider = dataclasses.asdict(dataclasses.replace(CONFIG.model, hidden_size=32))
    with pytest.raises(UsageError, match=r"model\.hidden_size: checkpoint 16, configuration 32"):
        ledger_and_changes(step, describe(CONFIG) | {"model": wider}, (), ())
