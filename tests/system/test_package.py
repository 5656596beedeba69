"""Issue R, C.22: what is installed: a source distribution that builds, a failed build that says so, the metadata."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pybind11
import pytest

import megallm
from megallm.base import extension
from megallm.base.version import VERSION
from megallm.cli import main as cli
from megallm.cli.doctor import _lines
from tests.system.commands import ROOT

INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def setup_py(tree: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *words], cwd=tree, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | environment,
    )  # fmt: skip


def copy_of(source: Path, target: Path) -> Path:
    """What setup.py needs of the tree; building in the tree itself would leave files there."""
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(source / name, target)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_index_not*")
    for name in ("csrc", "megallm", "docs", "tools"):
        shutil.copytree(source / name, target / name, ignore=ignore)
    return target


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The source distribution, built and unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = copy_of(ROOT, folder / "tree")
    done = setup_py(tree, "sdist", "-d", str(folder))
    assert done.returncode == 0, done.stderr
    (packed,) = folder.glob("megallm-*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    return folder / packed.name.removesuffix(".tar.gz")


def missing_headers(tree: Path) -> list[str]:
    """Files that the extension's sources include with quotes and that are not beside them."""
    sources = [path for path in (tree / "csrc").rglob("*") if path.suffix in (".cpp", ".hpp", ".cu", ".cuh")]
    return [
        f"{path.name}: {name}" for path in sources for name in INCLUDE.findall(path.read_text())
        if not (path.parent / name).exists()
    ]  # fmt: skip


def test_the_source_distribution_has_every_header_and_module(unpacked):
    """The issue's: csrc/index/text.hpp was missing, so the extension was silently not built."""
    assert (unpacked / "csrc/index/text.hpp").exists() and missing_headers(unpacked) == []
    for folder, pattern in (
        ("csrc", "*.?pp"), ("csrc", "*.cu*"), ("megallm", "*.py"), ("docs", "*.md"), ("docs", "*.svg"),
        ("tools", "*.sh"),
    ):  # fmt: skip
        wanted = {path.relative_to(ROOT) for path in (ROOT / folder).rglob(pattern)}
        assert wanted == {path.relative_to(unpacked) for path in (unpacked / folder).rglob(pattern)}
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()


def test_a_missing_header_is_noticed(unpacked, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(unpacked / "csrc", tree / "csrc")
    (tree / "csrc/index/text.hpp").unlink()
    assert missing_headers(tree)


def test_a_compiler_finds_every_header(unpacked):
    """The compiler's own reading of each source; tools/install.sh builds the whole."""
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    paths = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    for source in (unpacked / "csrc/index").glob("*.cpp"):
        words = [compiler, "-std=c++17", "-E", *paths, str(source), "-o", os.devnull]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr


def test_the_metadata(unpacked):
    text = (unpacked / "PKG-INFO").read_text()
    for line in ("Author: The megallm developers", f"Version: {VERSION}"):
        assert re.search(f"^{line}$", text, re.MULTILINE), line
    assert re.search("^(License|License-Expression): Apache-2.0$", text, re.MULTILINE)
    assert re.search("^(Home-page|Project-URL): .*https://", text, re.MULTILINE)
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert "Copyright 2026 The megallm developers" in licence


def test_the_version_is_written_once():
    assert megallm.__version__ == VERSION
    pattern = re.compile(rf'(?i)version\W+"{re.escape(VERSION)}"')
    files = [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *(ROOT / "megallm").rglob("*.py")]
    assert [path.name for path in files if pattern.search(path.read_text())] == ["version.py"]


@pytest.fixture
def built_without_compiler(unpacked, tmp_path) -> Path:
    """`build` as pip does it, on a machine without a compiler; the folder of the package."""
    tree = copy_of(unpacked, tmp_path / "tree")
    nowhere = str(tmp_path / "no-compiler")
    done = setup_py(tree, "build", "--build-lib", "lib", CC=nowhere, CXX=nowhere, LDSHARED=nowhere)
    assert done.returncode == 0, done.stderr
    return tree / "lib"


def test_a_build_without_a_compiler_is_told_by_doctor_and_by_the_first_run(built_without_compiler, tmp_path):
    """The issue's: with `pip install -q` nothing ever said it."""
    kept = built_without_compiler / "megallm" / extension.REASON.name
    assert "no-compiler" in kept.read_text()
    # An editable install of the tests' interpreter would give `megallm._index` of another tree.
    code = "import sys; sys.meta_path[:] = [one for one in sys.meta_path if 'ditable' not in str(one)]\n"
    code += "from megallm.base.extension import status; print(status().detail)\n"
    code += "from megallm.cli.main import main\n"
    code += "main(['preprocess', '--input', 't.txt', '--output', 'd', '--tokenizer', 'bytes'])"
    (tmp_path / "t.txt").write_text("text")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"PYTHONPATH": str(built_without_compiler)},
    )  # fmt: skip
    assert "not built when megallm was installed" in done.stdout and "no-compiler" in done.stdout
    assert "megallm: note: the extension megallm._index is not used: not built when" in done.stderr, done.stderr


def test_doctor_has_the_reason():
    found = {"extension": {"name": "x", "loaded": False, "detail": "not built (why)"}}
    found |= {key: {} for key in ("required", "optional", "backends")} | {"gpus": []}
    found["cuda_kernels"] = "not built (no nvcc)"
    found |= dict.fromkeys(("megallm", "python", "platform", "cores", "memory_gib", "launcher", "gloo", "sandbox"), "")
    lines = "\n".join(_lines(found))
    assert "extension x: not loaded, not built (why)" in lines and "kernels for GPUs: not built (no nvcc)" in lines


@pytest.mark.parametrize(("environment", "told"), [({}, 1), ({"RANK": "0"}, 1), ({"RANK": "3"}, 0),
                                                   ({"SLURM_PROCID": "2"}, 0)])  # fmt: skip
def test_one_rank_tells_it(capsys, monkeypatch, environment, told):
    monkeypatch.setattr(extension, "status", lambda: extension.Status("x", False, "why"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cli.main(["data", "verify", "nowhere"])
    assert capsys.readouterr().err.count("note: the extension x is not used: why.") == told
    cli.main(["presets"])
    assert "extension" not in capsys.readouterr().err
