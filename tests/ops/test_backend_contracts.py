"""Our calls of optional libraries against the signatures in their own sources: downloaded, parsed, never installed.

Downloads are kept in tests/.cache. Transformer Engine is the only library of which anything is called; a new user of
`backends.require` has to be added here.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "tests/.cache"
# Where libraries are asked for -> (name that is called through, its module). Triton's kernels are compiled in
# tests/ops/test_triton_attention.py, which no list of signatures replaces.
CALLS = {
    "megallm/ops/te_linear.py": {
        "self.te": "transformer_engine.pytorch", "recipe": "transformer_engine.common.recipe",
    },
}  # fmt: skip
COMPILED = {"megallm/ops/triton_attention.py"}
DISTRIBUTIONS = ("transformer-engine",)


@cache
def sources() -> dict[str, str]:
    """Text by path inside the wheels; a skip that says why where there are none."""
    CACHE.mkdir(exist_ok=True)
    found: dict[str, str] = {}
    for name in DISTRIBUTIONS:
        pattern = f"{name.replace('-', '_')}-*.whl"
        if not list(CACHE.glob(pattern)):
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(CACHE)]
            done = subprocess.run([*command, name], capture_output=True, text=True, timeout=60, check=False)
            if done.returncode:
                pytest.skip(f"NO SOURCES OF {name.upper()}: {done.stderr.strip().splitlines()[-1:]}")
        (wheel, *_) = sorted(CACHE.glob(pattern))
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.endswith(".py"):
                    found[member] = archive.read(member).decode()
    return found


class Missing(Exception):
    """A name, or a parameter, that the library does not have."""


def definition(files: dict[str, str], module: str, name: str) -> ast.ClassDef | ast.FunctionDef:
    """Where a module gets a name from, through its imports."""
    base = module.replace(".", "/")
    path, package = (f"{base}.py", base.rpartition("/")[0]) if f"{base}.py" in files else (f"{base}/__init__.py", base)
    if path not in files:
        raise Missing(f"no module {module}")
    for node in ast.walk(ast.parse(files[path])):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and any((each.asname or each.name) == name for each in node.names):
            up = package.split("/")[: len(package.split("/")) - node.level + 1]
            origin = [*up, *filter(None, [node.module])] if node.level else [str(node.module)]
            original = next(each.name for each in node.names if (each.asname or each.name) == name)
            return definition(files, ".".join(origin), original)
    raise Missing(f"{module} has no {name}")


def signature(node: ast.ClassDef | ast.FunctionDef) -> inspect.Signature:
    """Of a function, a class by its `__init__`, or a dataclass by its fields."""
    kinds, parameters = inspect.Parameter, []
    if isinstance(node, ast.ClassDef):
        inits = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
        if not inits:
            fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
            return inspect.Signature([
                kinds(ast.unparse(each.target), kinds.POSITIONAL_OR_KEYWORD, default=kinds.empty if each.value is None else each)
                for each in fields
            ])  # fmt: skip
        node = inits[0]
    given = node.args
    named = [*given.posonlyargs, *given.args]
    defaults = [kinds.empty] * (len(named) - len(given.defaults)) + list(given.defaults)
    parameters += [kinds(a.arg, kinds.POSITIONAL_OR_KEYWORD, default=d) for a, d in zip(named, defaults, strict=True)]
    if given.vararg:
        parameters.append(kinds(given.vararg.arg, kinds.VAR_POSITIONAL))
    parameters += [
        kinds(a.arg, kinds.KEYWORD_ONLY, default=kinds.empty if d is None else d)
        for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    if given.kwarg:
        parameters.append(kinds(given.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature([each for each in parameters if each.name != "self"])


def uses(path: str) -> Iterator[tuple[str, list[str], ast.Call | None]]:
    """What a file of ours takes from a library: (module, attributes, the call if it is one)."""
    tree = ast.parse((ROOT / path).read_text())
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            text = ast.unparse(node)
            for prefix, module in CALLS[path].items():
                if text.startswith(prefix + "."):
                    yield module, text[len(prefix) + 1 :].split("."), called.get(id(node))


def problems(files: dict[str, str], path: str) -> list[str]:
    """What a library no longer takes of what a file of ours gives it."""
    found = []
    for module, names, call in uses(path):
        try:
            node = definition(files, module, names[0])
            for name in names[1:]:  # a constant of a class
                fields = [each for each in node.body if isinstance(each, ast.Assign)]
                if name not in {ast.unparse(target) for each in fields for target in each.targets}:
                    raise Missing(f"{names[0]} has no {name}")
            if call is not None:
                assert not any(isinstance(each, ast.Starred) for each in call.args), "cannot be checked"
                signature(node).bind(*call.args, **{str(each.arg): each.value for each in call.keywords})
        except (Missing, TypeError) as error:
            found.append(f"{module}.{'.'.join(names)}: {error}")
    return found


@pytest.mark.parametrize("path", CALLS)
def test_every_call_has_the_signature_of_the_library(path: str) -> None:
    assert problems(sources(), path) == []


def test_the_calls_are_found() -> None:
    found = {(names[-1], call is not None) for path in CALLS for _, names, call in uses(path)}
    assert found == {
        ("Linear", True), ("autocast", True), ("fp8_autocast", True), ("DelayedScaling", True), ("HYBRID", False),
        ("E4M3", False), ("Float8CurrentScaling", True), ("Float8BlockScaling", True),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("common/recipe/__init__.py", "amax_history_len: int", "history: int", "'amax_history_len'"),
        ("pytorch/module/linear.py", "params_dtype: Optional[torch.dtype] = None,", "", "'params_dtype'"),
        ("pytorch/module/linear.py", "sequence_parallel: bool = False", "sequence_parallel: bool", "'sequence_para"),
        ("pytorch/quantization.py", "amax_reduction_group: Opt", "group: Opt", "'amax_reduction_group'"),
        ("pytorch/__init__.py", "import Linear\n", "import Linear as Renamed\n", "has no Linear"),
        ("common/recipe/__init__.py", "    HYBRID = ", "    MIXED = ", "Format has no HYBRID"),
    ],
)
def test_a_version_that_changed_something_is_noticed(file: str, old: str, new: str, said: str) -> None:
    files, path = dict(sources()), f"transformer_engine/{file}"
    assert old in files[path]
    files[path] = files[path].replace(old, new)
    found = problems(files, "megallm/ops/te_linear.py")
    assert found and said in found[0], found


def test_no_other_file_asks_for_such_a_library() -> None:
    asking = set()
    for path in (ROOT / "megallm").rglob("*.py"):
        text = path.read_text()
        calls = (node for node in ast.walk(ast.parse(text if "require(" in text else "")) if isinstance(node, ast.Call))
        if any(ast.unparse(call.func) in ("backends.require", "require") for call in calls):
            asking.add(str(path.relative_to(ROOT)))
    assert asking == set(CALLS) | COMPILED
