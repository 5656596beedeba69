"""Whether a checkpoint belongs to a configuration: also one that was written before some keys existed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megallm.base.config import replace
from megallm.base.errors import CheckpointError, UsageError
from megallm.checkpoint import store
from megallm.checkpoint.io import Part
from megallm.convert.convert import imported_meta
from megallm.models.config import ModelConfig
from megallm.parallel.mesh import Mesh
from megallm.training.config import PretrainConfig
from megallm.training.pretrain_identity import PretrainIdentity
from megallm.training.resuming import Identity, ledger_and_changes
from megallm.training.validate import check

MODEL = ModelConfig(family="gpt2", num_layers=2, hidden_size=16, num_heads=2, vocab_size=300)
CONFIG = check(
    replace(PretrainConfig(model=MODEL), {"data.sources": {"p": 1.0}, "data.seq_len": 8, "data.tokenizer": "bytes"})
)
LATER = ("causal", "norm_place", "embedding_norm", "token_types", "head", "head_bias", "num_labels", "pooler")


def saved(folder: Path, **changes: object) -> Path:
    """A checkpoint of `CONFIG` as it was written when models had none of the LATER keys."""
    meta = PretrainIdentity(CONFIG).values | {"ledger": {"step": 3}}
    model = {key: value for key, value in meta["model"].items() if key not in LATER} | changes
    part = Part("x", (1,), (0,), torch.zeros(1))
    return store.save(folder, 3, [part], meta | {"model": model}, Mesh.single())


def test_an_older_checkpoint_is_that_of_the_same_model(tmp_path):
    assert ledger_and_changes(saved(tmp_path), PretrainIdentity(CONFIG), (), ())[0] == {"step": 3}


def test_what_differs_is_named(tmp_path):
    step = saved(tmp_path)
    other = check(replace(CONFIG, {"model.causal": False, "data.objective": "mlm", "model.head": "mlm"}))
    with pytest.raises(UsageError, match=r"model\.causal: checkpoint True, configuration False") as caught:
        ledger_and_changes(step, PretrainIdentity(other), (), ())
    text = str(caught.value)
    assert "model.head: checkpoint 'lm', configuration 'mlm'" in text
    assert "data.objective: checkpoint 'next_token', configuration 'mlm'" in text
    wider = dataclasses.asdict(dataclasses.replace(CONFIG.model, hidden_size=32))
    of_wider = PretrainIdentity(CONFIG)
    of_wider.values["model"] = wider
    with pytest.raises(UsageError, match=r"model\.hidden_size: checkpoint 16, configuration 32"):
        ledger_and_changes(step, of_wider, (), ())


class OtherIdentity(Identity):
    """A kind of training that is not pre-training."""

    KIND = "other"


def test_a_checkpoint_of_another_kind_is_refused_with_a_way_out(tmp_path):
    step = saved(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        ledger_and_changes(step, OtherIdentity(CONFIG), (), ())
    assert "was written by `megallm pretrain`; `megallm other` does not go on from it" in str(caught.value)
    assert "model.hf=DIR" in str(caught.value)


def test_any_kind_goes_on_from_its_own_checkpoint_and_from_an_import(tmp_path):
    identity = OtherIdentity(CONFIG)
    assert set(identity.values) == {"kind", "model", "precision", "seed"}
    part = Part("x", (1,), (0,), torch.zeros(1))
    own = store.save(tmp_path / "own", 3, [part], identity.values | {"ledger": {"step": 3}}, Mesh.single())
    assert ledger_and_changes(own, identity, (), ()) == ({"step": 3}, [])
    imported = imported_meta(CONFIG.model, torch.float32)
    given = store.save(tmp_path / "import", 0, [part], imported, Mesh.single())
    assert ledger_and_changes(given, identity, (), ()) == ({}, [])
    other = OtherIdentity(check(replace(CONFIG, {"run.seed": 7})))
    with pytest.raises(UsageError, match=r"\* run\.seed: checkpoint 1234, configuration 7"):
        ledger_and_changes(own, other, (), ())
