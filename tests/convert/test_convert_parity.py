"""Every family: logits equal to transformers, and Hugging Face -> megallm -> Hugging Face bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megallm.checkpoint.reader import Reader
from megallm.checkpoint.tools import resolve
from megallm.convert import convert, families, verify
from megallm.convert.convert import ConvertRequest, NotEqual
from megallm.convert.rules import rule
from megallm.convert.weights import Cast, HfReader

from tests.convert.tiny import CASES, case, make


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("wanted", CASES, ids=lambda one: one.name)
def test_logits_and_round_trip(wanted, tmp_path):
    original = make(tmp_path / "hf", wanted)
    done = convert.run(ConvertRequest("megallm", str(original), str(tmp_path / "ours"), verify=True))
    assert done["max_rel_error"] <= 1e-5
    back = tmp_path / "back"
    done = convert.run(ConvertRequest("hf", str(tmp_path / "ours"), str(back), verify=True))
    assert done["max_rel_error"] <= 1e-5
    before, after = loaded(original), loaded(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
