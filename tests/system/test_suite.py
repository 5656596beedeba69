"""The suite about itself: what the quick selection touches, which tests run on the numpy twins."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.conftest import LONG
from tests.system.commands import ROOT

PACKAGE, TESTS = ROOT / "megallm", ROOT / "tests"
QUICK = (TESTS / "quick.txt").read_text().splitlines()
PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


@cache
def modules_imported(path: Path) -> set[str]:
    """Names like data.order of all modules of megallm that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    modules = {name.removeprefix("megallm.") for name in found if name.startswith("megallm.")}
    return {name for name in modules if (PACKAGE / f"{name.replace('.', '/')}.py").exists()}


def files_of(selection: list[str]) -> list[Path]:
    """The test files that a selection of files, folders and single tests takes from."""
    places = [ROOT / line.partition("::")[0] for line in selection]
    return [path for place in places for path in (place.rglob("test_*.py") if place.is_dir() else [place])]


def untouched(selection: list[str]) -> list[str]:
    """Packages no module of which any file of the selection imports."""
    touched = {name.partition(".")[0] for path in files_of(selection) for name in modules_imported(path)}
    return [name for name in PACKAGES if name not in touched]


def test_the_quick_selection_touches_every_package():
    """tests/quick.txt, which `bash tests/run.sh --quick` runs."""
    assert len(PACKAGES) >= 16 and untouched(QUICK) == []
    assert all(path.is_file() for path in files_of(QUICK)) and len(set(QUICK)) == len(QUICK)
    folders = {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")}
    assert {path.relative_to(TESTS).parts[0] for path in files_of(QUICK)} == folders


@pytest.mark.parametrize("package", ["curate", "inference", "launch"])
def test_a_package_that_the_quick_selection_leaves_out_is_noticed(package):
    """Tests of other packages may touch it too; what is left says so only where none does."""
    named = {line: [m for path in files_of([line]) for m in modules_imported(path)] for line in QUICK}
    rest = [line for line in QUICK if not any(m.startswith(f"{package}.") for m in named[line])]
    assert package in untouched(rest)


def test_single_tests_of_the_quick_selection_exist():
    for line in (line for line in QUICK if "::" in line):
        path, _, name = line.partition("::")
        function, _, parameter = name.partition("[")
        assert re.search(rf"^def {function}\(", (ROOT / path).read_text(), flags=re.M), line
        rows = "".join(path.read_text() for path in (PACKAGE / "oracle").glob("*.py"))
        assert not parameter or f'"{parameter.removesuffix("]")}"' in rows, line


def test_no_property_has_a_limit_in_seconds():
    """Hypothesis fails an example of more than 200 ms by default; the profile of tests/conftest.py has no limit."""
    assert settings.default.deadline is None
    assert HealthCheck.too_slow in settings.default.suppress_health_check
    named = re.compile(r"deadline=(?!None)[\w.]")
    assert not [path for path in TESTS.rglob("*.py") if named.search(path.read_text())]


def test_the_long_files_that_start_first_exist():
    assert all((TESTS / name).is_file() for name in LONG)


def test_the_files_that_run_without_the_extension_are_all_that_read_by_its_order():
    """Modules of megallm.data that import the extension, whoever imports those, and the tests of any of them."""
    files = [path for path in (PACKAGE / "data").rglob("*.py") if path.stem != "__init__"]
    imports = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): modules_imported(path) for path in files}
    reached = {name for name, seen in imports.items() if "base.extension" in seen}
    assert reached == {"data.megatron.order", "data.megatron.blend"}
    while more := {name for name, seen in imports.items() if seen & reached} - reached:
        reached |= more
    wanted = {path.stem for path in (TESTS / "data").glob("test_*.py") if modules_imported(path) & reached}
    names = re.findall(r"--without-extension tests/data/test_\{([\w,]+)\}\.py", (TESTS / "run.sh").read_text())
    assert len(names) == 1 and {f"test_{name}" for name in names[0].split(",")} == wanted
