"""How the house is built: import floors, budgets and the words that may not appear. Each rule has a bad example.

A rule is a function from one parsed file to the sentences that it breaks; `test_the_package` runs all rules over
megallm, `test_each_rule_catches_its_bad_example` shows that each of them can fail.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_FUNCTION_LINES_95, MAX_PARAMETERS = 400, 60, 40, 7

# What each package may import besides itself, the standard library and torch/numpy. Anything else is upward.
FLOORS: dict[str, set[str]] = {
    "base": set(),
    "losses": set(),
    "data": {"base"},
    "ops": {"base"},
    "parallel": {"base", "ops"},
    "models": {"base", "ops", "parallel"},
    "curate": {"base", "data"},
    "optim": {"base", "ops", "parallel"},
    "checkpoint": {"base", "parallel"},
    "convert": {"base", "data", "ops", "parallel", "models", "checkpoint"},
    "engine": {"base", "ops", "parallel", "models", "optim", "checkpoint", "losses", "inference"},
    "inference": {"base", "ops", "parallel", "models", "checkpoint", "data", "engine", "convert"},
}
FLOORS["peft"] = {"base", "ops", "parallel", "models", "checkpoint"}
FLOORS["planning"] = {"base", "parallel", "models", "optim"}
FLOORS["evaluation"] = {"base", "data", "losses", "engine", "inference"}
_LOWER = set(FLOORS)
FLOORS["run"] = _LOWER
FLOORS["training"] = _LOWER | {"run"}
FLOORS["oracle"] = _LOWER | {"training"}
FLOORS["launch"] = {"base"}
FLOORS["report"] = {"base", "run", "training"}
FLOORS["cli"] = _LOWER | {"run", "training", "oracle", "launch", "report"}

# Modules that must import while torch cannot: packages end with a dot, and their exceptions stand in WITH_TORCH.
PURE = (
    "base.", "cli.", "data.", "run.config", "run.changes",
    "training.config", "training.validate", "training.nearest", "training.reading",
    "training.ranges", "training.files", "training.from_text", "training.other_names", "training.expert_rules",
    "training.optimizing", "training.narrow_rules", "ops.backends", "ops.low_precision",
    "models.compute", "parallel.config",
    "parallel.layout", "parallel.shard",
    "parallel.zigzag", "ops.tiles",
    "parallel.schedule", "parallel.simulate", "parallel.picture", "models.config", "models.presets", "models.stages",
    "optim.config", "optim.lr", "optim.groups", "optim.rules",
    "optim.buckets", "checkpoint.plan", "checkpoint.manifest", "convert.rules", "convert.families",
    "convert.folder", "convert.hf_config", "convert.tokenizer_files", "engine.config", "inference.request",
    "inference.blocks", "inference.rotation", "inference.samples", "inference.scheduler",
    "launch.environment", "launch.process", "launch.rank", "launch.local", "launch.start",
)  # fmt: skip
WITH_TORCH = ("data.loader", "base.device")

OPTIONAL = {"transformer_engine", "flash_attn", "apex", "triton", "bitsandbytes", "liger_kernel", "deepspeed"}
NO_FLOAT_CAST = {"ops", "parallel", "models", "losses", "engine"}
ROOT_INIT = '''"""megallm: a 3D-parallel trainer for large language models."""

from megallm.base.version import VERSION as __version__

__all__ = ["__version__"]
'''
VAGUE = {"utils", "util", "helpers", "helper", "misc", "common"}


@dataclass(frozen=True)
class Source:
    """One file of the package, parsed."""

    name: str  # dotted, without the leading megallm.: parallel.mesh, cli.main, __main__
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    @cached_property
    def code_lines(self) -> set[int]:
        """Numbers of the lines that hold code: no docstring, no comment, no blank line."""
        skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in skip:
                lines.update(range(token.start[0], token.end[0] + 1))
        for node in ast.walk(self.tree):
            documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            if documented and ast.get_docstring(node) is not None:
                lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        return lines

    def functions(self) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
        """Each function with its number of code lines."""
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node, len(self.code_lines.intersection(range(node.lineno, node.end_lineno + 1)))

    def imports(self, lazy: bool = True) -> Iterator[tuple[str, int]]:
        """Dotted names that are imported, with their lines; `lazy` includes those inside functions."""
        nodes = ast.walk(self.tree) if lazy else _top_level(self.tree)
        for node in nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.name, node.lineno
            elif isinstance(node, ast.ImportFrom):
                yield "." * node.level + (node.module or ""), node.lineno
                for alias in node.names:
                    yield f"{node.module}.{alias.name}", node.lineno

    def calls(self) -> Iterator[tuple[str, ast.Call]]:
        """Every call with the dotted text of what is called."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                yield ast.unparse(node.func), node


def _top_level(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that run at import: everything but the insides of functions and of `if TYPE_CHECKING`."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            stack.extend(ast.iter_child_nodes(node))


# The rules: each yields (line, sentence).

Finding = tuple[int, str]
RULES: dict[str, Callable[[Source], Iterator[Finding]]] = {}


def rule(check: Callable[[Source], Iterator[Finding]]) -> Callable[[Source], Iterator[Finding]]:
    RULES[check.__name__] = check
    return check


@rule
def floors(source: Source) -> Iterator[Finding]:
    """Imports go to the own package or to lower floors."""
    if source.name in ("__init__", "__main__"):
        return
    if source.package not in FLOORS:
        yield 1, f"the package {source.package} has no row in FLOORS"
        return
    for name, line in source.imports():
        if name.startswith("."):
            yield line, "relative import: write megallm.package.module"
        parts = name.split(".")
        if parts[0] == "megallm" and len(parts) > 1:
            allowed = FLOORS[source.package] | {source.package}
            if parts[1] not in allowed:
                yield line, f"{source.package} imports {name}, which is not on a lower floor"


@rule
def file_length(source: Source) -> Iterator[Finding]:
    if len(source.code_lines) > MAX_FILE_LINES:
        yield 1, f"{len(source.code_lines)} code lines; at most {MAX_FILE_LINES}"


@rule
def function_length(source: Source) -> Iterator[Finding]:
    for node, length in source.functions():
        if length > MAX_FUNCTION_LINES:
            yield node.lineno, f"{node.name} has {length} code lines; at most {MAX_FUNCTION_LINES}"


@rule
def parameters(source: Source) -> Iterator[Finding]:
    for node, _ in source.functions():
        args = node.args
        names = [arg.arg for arg in args.posonlyargs + args.args + args.kwonlyargs]
        count = len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))
        if count > MAX_PARAMETERS:
            yield node.lineno, f"{node.name} has {count} parameters; at most {MAX_PARAMETERS}, then a dataclass"


@rule
def no_global(source: Source) -> Iterator[Finding]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield node.lineno, "global statement"


@rule
def no_environment(source: Source) -> Iterator[Finding]:
    if source.package in ("launch", "cli"):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.Attribute, ast.Name)) and ast.unparse(node) in ("os.environ", "os.getenv", "environ"):
            yield node.lineno, "environment variables are read in launch and cli only"


@rule
def no_broad_except(source: Source) -> Iterator[Finding]:
    """`except Exception` stands only at a process's boundary, and says so in a comment beside it."""
    lines = source.text.splitlines()
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        names = {"BaseException"} if node.type is None else {ast.unparse(item) for item in _items(node.type)}
        raises = any(isinstance(inner, ast.Raise) for inner in node.body)
        if names & {"Exception", "BaseException"} and not raises and "boundary" not in lines[node.lineno - 1]:
            yield node.lineno, "broad except"


def _items(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


@rule
def no_guessing(source: Source) -> Iterator[Finding]:
    """getattr with a default and hasattr hide which type a value has."""
    for name, call in source.calls():
        if name == "hasattr" or (name == "getattr" and len(call.args) > 2):
            yield call.lineno, f"{name} as control flow"


@rule
def no_print(source: Source) -> Iterator[Finding]:
    """Ranks write through launch.rank, commands through cli; nothing else prints."""
    if source.package == "cli" or source.name == "launch.rank":
        return
    for name, call in source.calls():
        if name == "print":
            yield call.lineno, "print outside cli"


@rule
def no_float_cast(source: Source) -> Iterator[Finding]:
    """`.float()` is a downcast in the float64 oracle: ops.precision.wide is meant."""
    if source.package not in NO_FLOAT_CAST:
        return
    for name, call in source.calls():
        if name.endswith(".float") and not call.args:
            yield call.lineno, "bare .float(): use wide()"


@rule
def no_code_from_data(source: Source) -> Iterator[Finding]:
    """Nothing read from a file or the network may run; a private pipe between our own processes says so beside it."""
    refused = {
        "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "marshal.load", "torch.load", "yaml.load",
        "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system", "joblib.load", "shelve.open",
    }  # fmt: skip
    lines = source.text.splitlines()
    for name, call in source.calls():
        if name in refused and "our own process" not in lines[call.lineno - 1]:
            yield call.lineno, f"{name} runs code from data"
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if name.endswith(".load") and _true(keywords.get("allow_pickle")):
            yield call.lineno, "allow_pickle runs code from data"
        if _true(keywords.get("shell")) or _true(keywords.get("trust_remote_code")):
            yield call.lineno, "a shell or remote code"


def _true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


@rule
def no_exit(source: Source) -> Iterator[Finding]:
    """cli.main returns the exit code; only a forked rank leaves by itself."""
    if source.name == "__main__":
        return
    for name, call in source.calls():
        if name in ("sys.exit", "exit", "quit"):
            yield call.lineno, f"{name} outside __main__"


@rule
def empty_inits(source: Source) -> Iterator[Finding]:
    """The package's own says its version, which lives in base.version."""
    if source.name.rpartition(".")[2] == "__init__" and source.code_lines and source.text != ROOT_INIT:
        yield 1, "an __init__ holds a docstring at most"


@rule
def optional_libraries(source: Source) -> Iterator[Finding]:
    if source.name == "ops.backends":
        return
    for name, line in source.imports():
        if name.partition(".")[0] in OPTIONAL:
            yield line, f"{name} is optional: only ops.backends may import it"


@rule
def vague_names(source: Source) -> Iterator[Finding]:
    if VAGUE & set(source.name.split(".")):
        yield 1, f"{source.name} says nothing about what is in it"


@rule
def docstrings(source: Source) -> Iterator[Finding]:
    if source.name.rpartition(".")[2] != "__init__" and not ast.get_docstring(source.tree):
        yield 1, "the module has no docstring"


@rule
def nothing_outside(source: Source) -> Iterator[Finding]:
    """No path of a machine, and nothing beside the repository."""
    for number, line in enumerate(source.text.splitlines(), start=1):
        if "../shared" in line or '"/home/' in line or "'/home/" in line:
            yield number, "a path outside the repository"


# The files and the tests.


def sources() -> list[Source]:
    found = []
    for path in sorted((ROOT / "megallm").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "megallm").with_suffix("").parts)
        found.append(Source(name, path.read_text(encoding="utf-8")))
    return found


@pytest.fixture(scope="module")
def package() -> list[Source]:
    return sources()


@pytest.mark.parametrize("name", RULES)
def test_the_package(package, name):
    broken = [f"megallm/{s.name.replace('.', '/')}.py:{line}: {text}" for s in package for line, text in RULES[name](s)]
    assert not broken, "\n" + "\n".join(broken)


def test_there_is_a_package(package):
    assert len(package) > 40 and {source.package for source in package} >= {"cli", "training"}


def test_95_percent_of_the_functions_are_short(package):
    lengths = sorted(length for source in package for _, length in source.functions())
    assert lengths[int(0.95 * len(lengths))] <= MAX_FUNCTION_LINES_95


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other at import time, as sentences; `graph` is module -> imported modules."""
    found, done = [], set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def test_no_import_cycles(package):
    names = {source.name for source in package}
    graph = {
        source.name: {name.removeprefix("megallm.") for name, _ in source.imports(lazy=False)} & names
        for source in package
    }
    assert cycles(graph) == []


def test_a_cycle_is_found():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b -> c -> b"]


def test_pure_modules_import_without_torch(package):
    pure = [
        f"megallm.{source.name}"
        for source in package
        if source.name not in WITH_TORCH
        and not source.name.endswith("__init__")
        and any(source.name == entry or (entry[-1] == "." and source.name.startswith(entry)) for entry in PURE)
    ]
    for entry in PURE:
        assert any(name.removeprefix("megallm.").startswith(entry) for name in pure), f"nothing matches {entry}"
    assert import_without_torch(pure) == ""


def import_without_torch(modules: list[str]) -> str:
    code = "import sys, importlib\nsys.modules['torch'] = None\n"
    code += "".join(f"importlib.import_module({name!r})\n" for name in modules)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.stderr.strip()


def test_a_module_that_needs_torch_is_noticed():
    assert "ModuleNotFoundError" in import_without_torch(["megallm.parallel.mesh"])


def _function(lines: int, parameters: str = "") -> str:
    return f'"""D."""\n\n\ndef f({parameters}):\n' + "    x = 1\n" * lines


# Rule -> (module, text that it must refuse, text that it must accept).
EXAMPLES: dict[str, list[tuple[str, str, str]]] = {
    "floors": [
        ("ops.x", "from megallm.models import config", "from megallm.base import rng"),
        ("parallel.x", "def f():\n    import megallm.engine.engine", "import megallm.ops.norm"),
        ("parallel.x", "from .mesh import Mesh", "from megallm.parallel.mesh import Mesh"),
        ("losses.x", "from megallm.base.errors import UsageError", "import torch"),
        ("launch.x", "from megallm.training.config import RunConfig", "from megallm.base.errors import UsageError"),
        ("novel.x", "import os", None),
    ],
    "file_length": [("ops.x", "x = 1\n" * 401, "x = 1\n" * 400 + "# comment\n\n" * 50)],
    "function_length": [("ops.x", _function(60), _function(59))],
    "parameters": [("ops.x", _function(1, "a, b, c, d, e, f, g, h"), _function(1, "self, a, b, c, d, e, *, f, g"))],
    "no_global": [("ops.x", "def f():\n    global x\n    x = 1", "x = 1")],
    "no_environment": [
        ("base.x", "import os\nos.environ['A']", "import os\nos.getpid()"),
        ("engine.x", "import os\nos.getenv('A')", "x = 1"),
        ("engine.x", "from os import environ\nenviron['A']", "x = 1"),
    ],
    "no_broad_except": [
        ("ops.x", "try:\n    f()\nexcept Exception:\n    pass", "try:\n    f()\nexcept ValueError:\n    pass"),
        ("ops.x", "try:\n    f()\nexcept:\n    pass", "try:\n    f()\nexcept Exception:\n    g()\n    raise"),
        ("ops.x", "try:\n    f()\nexcept (OSError, BaseException):\n    pass", "x = 1"),
    ],
    "no_guessing": [
        ("ops.x", "getattr(a, 'b', None)", "getattr(a, 'b')"),
        ("ops.x", "hasattr(a, 'b')", "isinstance(a, int)"),
    ],
    "no_print": [("engine.x", "print('a')", "log.info('a')")],
    "no_float_cast": [("models.x", "y = x.float()", "y = wide(x)"), ("losses.x", "x.sum().float()", "float(x)")],
    "no_code_from_data": [
        ("data.x", "pickle.load(f)", "json.load(f)"),
        ("data.x", "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=False)"),
        ("data.x", "torch.load(f)", "safetensors.torch.load(f)"),
        ("base.x", "yaml.load(f)", "yaml.safe_load(f)"),
        ("base.x", "eval('1')", "ast.literal_eval('1')"),
        ("data.x", "subprocess.run('a', shell=True)", "subprocess.run(['a'])"),
        ("data.x", "Auto.from_pretrained(p, trust_remote_code=True)", "Auto.from_pretrained(p)"),
    ],
    "no_exit": [("engine.x", "sys.exit(1)", "raise UsageError('a')")],
    "empty_inits": [("ops.__init__", "from megallm.ops.norm import rms_norm", '"""Operations."""\n')],
    "optional_libraries": [("ops.x", "def f():\n    import flash_attn", "import torch")],
    "vague_names": [("ops.utils", "", None), ("data.helpers", "", None)],
    "docstrings": [("ops.x", "x = 1", '"""D."""\nx = 1')],
    "nothing_outside": [("ops.x", "open('../shared/golden/x')", "open('tests/golden/x')")],
}


def test_every_rule_has_an_example():
    assert EXAMPLES.keys() == RULES.keys()


@pytest.mark.parametrize(
    ("name", "module", "bad", "good"),
    [(name, *example) for name, examples in EXAMPLES.items() for example in examples],
)
def test_each_rule_catches_its_bad_example(name, module, bad, good):
    assert list(RULES[name](Source(module, bad))), "the bad example passed"
    if good is not None:
        assert not list(RULES[name](Source(module, good)))


@pytest.mark.parametrize("folder", ["examples", "bench", "tools"])
def test_what_scripts_import_from_the_package_is_there(folder):
    """A script that only its own command runs would otherwise be found broken by whoever runs it first."""
    missing, looked_up = [], 0
    for path in sorted((ROOT / folder).rglob("*.py")):
        if "work" in path.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megallm":
                for alias in node.names:
                    looked_up += 1
                    if not _exists(str(node.module), alias.name):
                        missing.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.module}.{alias.name}")
    assert looked_up and not missing, missing
    assert not _exists("megallm.training.reading", "open_held_out"), "the control"


def _exists(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name) or bool(importlib.util.find_spec(f"{module}.{name}"))
    except ModuleNotFoundError:
        return False
