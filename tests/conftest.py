"""`--without-extension` hides megallm._index, so that a run exercises the numpy twins.

In a run of several processes the files that take longest come first.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

from megallm.base import extension

ROOT = Path(__file__).parents[1]
# The files that take longest, so that no process is left with one of them at the end; the first mostly waits.
LONG = (
    "system/test_slurm.py", "oracle/test_oracle.py", "system/test_resume.py", "system/test_experts.py",
    "system/test_bad_input.py", "system/test_huggingface.py", "system/test_objectives.py",
    "inference/test_generator.py", "inference/test_chat.py",
)  # fmt: skip
LONG_MARKERS = ("chaos", "slow", "oracle_full", "gpu")


# Without these every property would have to hold within 200 ms an example, on any machine and at any load.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-extension", action="store_true", help="use the numpy twins of megallm._index")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--without-extension"):
        sys.modules[extension.MODULE] = None  # an import of it raises ImportError


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under pytest-xdist, files of LONG before the others, each in its own order; hours for tests that take long."""
    for item in items:
        if any(item.get_closest_marker(name) for name in LONG_MARKERS):
            item.add_marker(pytest.mark.timeout(4 * 3600))
    if "PYTEST_XDIST_WORKER" in os.environ:
        places = {ROOT / "tests" / name: place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: places.get(item.path, len(LONG)))


def pytest_report_header(config: pytest.Config) -> str:
    status = extension.status()
    return f"{status.name}: {'loaded' if status.loaded else 'not loaded'}, {status.detail}"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
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
         *map(str, (ROOT / "csrc/index").glob("*.cpp")), "-o", str(target)],
        check=True, timeout=600,
    )  # fmt: skip
    spec = importlib.util.spec_from_file_location("_index", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
