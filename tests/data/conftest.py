"""Golden files of Megatron-LM, and both forms of the index code: numpy twin and C++ extension."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megallm.base import extension

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def golden():
    return json.loads((ROOT / "tests/golden/golden.json").read_text())


@pytest.fixture(scope="session")
def golden_prefix():
    return str(ROOT / "tests/golden/a")


@pytest.fixture(params=[False, True], ids=["numpy", "c++"])
def native(request, monkeypatch):
    """Run the test with the twin and with the extension; the value is what to pass as `native`."""
    if request.param:
        module = request.getfixturevalue("compiled")
        monkeypatch.setattr(extension, "_load", lambda: (module, str(module.__file__)))
    return request.param


@pytest.fixture(autouse=True)
def own_verdicts(tmp_path_factory, monkeypatch):
    """What is kept from run to run lies in a folder of the test run, not in anybody's home."""
    from megallm.data.stream import state_cache
    from megallm.data.text import accelerated

    monkeypatch.setattr(accelerated, "CACHE", str(tmp_path_factory.mktemp("verdicts")))
    monkeypatch.setattr(state_cache, "FOLDER", str(tmp_path_factory.mktemp("bookmarks")))


@pytest.fixture
def make_dataset(tmp_path):
    """make_dataset(name, documents, dtype) writes documents (lists of sequences of ids) and returns the prefix."""
    from megallm.data.indexed.dataset import IndexedWriter

    def make(name, documents, dtype="<u2"):
        prefix = str(tmp_path / name)
        with IndexedWriter(prefix, np.dtype(dtype)) as writer:
            for sequences in documents:
                tokens = np.array([token for sequence in sequences for token in sequence], dtype)
                writer.add(tokens, np.array([len(s) for s in sequences], np.int32), np.array([len(sequences)]))
            writer.commit()
        return prefix

    return make
