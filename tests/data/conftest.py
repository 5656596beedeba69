"""Golden files of Megatron-LM, and both forms of the index code: numpy twin and C++ extension."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sysconfig
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


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The installed extension, or one compiled here when megallm was installed without a compiler."""
    module = extension.index()
    if module is not None:
        return module
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("NO C++ COMPILER AND NO EXTENSION: only the numpy twins are tested")
    pybind11 = pytest.importorskip("pybind11")
    target = tmp_path_factory.mktemp("index") / f"_index{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(
        [compiler, "-O1", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-fvisibility=hidden",
         f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}",
         str(ROOT / "csrc/index/index.cpp"), "-o", str(target)],
        check=True, timeout=120,
    )  # fmt: skip
    spec = importlib.util.spec_from_file_location("_index", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[False, True], ids=["numpy", "c++"])
def native(request, monkeypatch):
    """Run the test with the twin and with the extension; the value is what to pass as `native`."""
    if request.param:
        module = request.getfixturevalue("compiled")
        monkeypatch.setattr(extension, "_load", lambda: (module, str(module.__file__)))
    return request.param


@pytest.fixture
def make_dataset(tmp_path):
    """make_dataset(name, documents, dtype) writes documents (lists of sequences of ids) and returns the prefix."""
    from megallm.data.indexed import IndexedWriter

    def make(name, documents, dtype="<u2"):
        prefix = str(tmp_path / name)
        with IndexedWriter(prefix, np.dtype(dtype)) as writer:
            for sequences in documents:
                tokens = np.array([token for sequence in sequences for token in sequence], dtype)
                writer.add(tokens, np.array([len(s) for s in sequences], np.int32), np.array([len(sequences)]))
            writer.commit()
        return prefix

    return make
