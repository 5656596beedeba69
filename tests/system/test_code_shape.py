"""How the house is built: import floors, budgets and the words that may not appear. Each rule has a bad example.

A rule is a function from one parsed file to the sentences that it breaks; `test_the_package` runs all rules over
megallm, `test_each_rule_catches_its_bad_example` shows that each of them can fail.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import io
import re
import string
import subprocess
import sys
import tokenize
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from megallm.curate.config import CurateConfig
from megallm.training.config import PretrainConfig
from megallm.training.kinds import KINDS

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
    "rewards": {"base", "data"},
    "optim": {"base", "ops", "parallel"},
    "checkpoint": {"base", "parallel"},
    "convert": {"base", "data", "ops", "parallel", "models", "checkpoint"},
    "engine": {"base", "ops", "parallel", "models", "optim", "checkpoint", "losses", "inference"},
    "inference": {"base", "ops", "parallel", "models", "checkpoint", "data", "convert"},
}
FLOORS["peft"] = {"base", "ops", "parallel", "models", "optim", "checkpoint", "convert", "engine"}
FLOORS["planning"] = {"base", "parallel", "models", "optim"}
FLOORS["evaluation"] = {"base", "data", "losses", "engine", "inference"}
_LOWER = set(FLOORS)
FLOORS["run"] = _LOWER
FLOORS["training"] = _LOWER | {"run"}
FLOORS["oracle"] = _LOWER | {"training"}
FLOORS["launch"] = {"base"}
FLOORS["report"] = {"base", "run", "parallel"}
FLOORS["cli"] = _LOWER | {"run", "training", "oracle", "launch", "report"}

# Modules that must import while torch cannot: packages end with a dot, and their exceptions stand in WITH_TORCH.
PURE = (
    "base.", "cli.", "data.", "run.config", "run.changes",
    "training.config", "training.validate", "training.rules.", "training.reading", "training.kinds",
    "training.files", "training.from_text", "training.other_names",
    "ops.backends", "ops.low_precision", "models.compute", "parallel.config",
    "parallel.layout", "parallel.shard",
    "parallel.zigzag", "parallel.startup", "ops.tiles",
    "parallel.schedule", "parallel.simulate", "parallel.picture", "models.config", "models.presets", "models.stages",
    "optim.config", "optim.lr", "optim.groups", "optim.rules", "convert.megatron.",
    "optim.buckets", "checkpoint.plan", "checkpoint.manifest", "checkpoint.shard_file",
    "checkpoint.writer", "convert.rules", "convert.families",
    "convert.layer_keys", "convert.listing", "models.layer_plan",
    "convert.folder", "convert.hf_config", "convert.tokenizer_files", "engine.config", "inference.request",
    "losses.advantage", "peft.config", "rewards.", "training.finetune", "training.preference_config",
    "training.distill_config", "training.starting", "training.shared_prefix", "training.rl_config",
    "training.advantages", "training.rl_metrics", "training.collapse",
    "inference.blocks", "inference.rotation", "inference.samples", "inference.scheduler",
    "report.", "launch.environment", "launch.process", "launch.rank", "launch.local", "launch.start",
)  # fmt: skip
WITH_TORCH = ("data.loader", "base.device", "base.shared_memory")

# Packages of the model's side, which trainers reach through `engine`; and their pure modules that say what a
# configuration may hold, which rules compare with each other.
MODEL_SIDE = {"ops", "parallel", "models", "optim", "peft", "checkpoint", "convert", "inference"}
DESCRIPTIONS = {
    "models.config", "models.presets", "models.stages", "ops.low_precision", "ops.backends", "optim.config",
    "optim.groups", "optim.lr", "parallel.layout", "parallel.schedule", "parallel.zigzag", "parallel.config",
    "convert.hf_config", "models.compute", "peft.config",
}  # fmt: skip
BESIDE_THE_ENGINE: dict[str, set[str]] = {
    "training.loop": {"checkpoint.store"},  # the names of steps
    "training.guard": {"checkpoint.store"},  # saves the weights that a bad step was computed with
    "training.rerun": {"checkpoint.reader", "peft.adapted"},  # and opens them
    "training.saving": {"checkpoint.async_save", "checkpoint.store"},  # saves what a trainer yields
    "training.resuming": {"checkpoint.store", "checkpoint.reader", "convert.convert", "convert.weights"},  # its meta
    # where weights come from
    "training.weights": {"checkpoint.reader", "checkpoint.store", "convert.convert", "convert.weights"},
    "training.starting": {"checkpoint.manifest", "convert.tokenizer_files"},  # the run that another starts from
    # the one place of trainers that knows adapters: they stand beside a base that is named and not written
    "training.adapters": {
        "checkpoint.reader", "models.decoder", "peft.adalora", "peft.checkpoint", "peft.export", "peft.inject",
        "peft.dropout", "peft.noise", "peft.sources", "peft.start",
    },
    "training.references": {"peft.reference"},  # the policy without its adapters
    "training.distill": {"peft.reference"},  # the student without its adapters teaches it
    # a reward model without a trainer: what `generate` finds beside weights, and adapters
    "training.scoring": {"inference.generate", "peft.adapted"},
    "training.reading": {"checkpoint.manifest"},  # `data stream --from`
    "training.rollout": {"inference.answer", "inference.samples", "inference.sampling"},  # what it asks and gets
    "training.episodes": {"inference.generator", "inference.samples", "inference.sampling"},  # turn by turn
    "training.model_rewards": {"inference.sampling"},  # how a judge answers
    "training.partial": {"checkpoint.io", "checkpoint.reader"},  # unfinished answers are a part of the state
    "training.novelty": {"checkpoint.io", "checkpoint.reader"},  # a part of the state, as arrays
    "training.replay": {"checkpoint.io", "checkpoint.reader"},  # old answers are a part of the state
    "training.grpo": {"checkpoint.reader", "peft.reference"},  # the replay buffer; the policy without its adapters
    "training.ppo": {"checkpoint.reader"},  # the critic's part of a checkpoint
    "training.kept_tokenizer": {"convert.folder", "convert.tokenizer_files"},  # copies a tokenizer, no weights
}

# 38,000 lines and 300 settings were planned; with ten trainers and 45 families, at 100 columns a line, it is more
# (docs/log.md).
# A package's own budget is a ratchet with room for what is planned.
MAX_LINES, MAX_LINES_OF_OTHERS, MAX_FIELDS = 57_000, 2_200, 450
MAX_LINES_OF = {
    "data": 7_800,  # text, indexed, stream, Megatron's order: 4,900; chat (formats, templates, packing, cache): 2,100
    "curate": 4_800, "convert": 4_850, "training": 9_200, "cli": 3_700, "parallel": 3_900,
    "peft": 2_500,  # six methods, their files as PEFT writes and reads them, merging
    "models": 3_200,  # with the slots of adapters, heads of values and classes
    "optim": 1_600, "checkpoint": 2_300, "base": 1_850, "ops": 3_000,
    "run": 1_700, "inference": 3_000, "launch": 2_600, "engine": 1_300,
    "oracle": 4_400,  # with a referee of its own for every adapter and loss that fine-tunes; counts as tests
    "losses": 1_500,  # every loss of post-training that TRL and the papers name, distillation and offline RL
}  # fmt: skip
MAX_COLUMNS, MIN_ROWS = 100, 3
PRAGMAS = ("# noqa", "# type: ignore", 'r"', "https://")  # r": regular expressions are not cut
# Files whose lines are still as long as those of tests (120): tables of settings and keys, examples of formats.
WIDE = {
    "base.config", "convert.hf_config", "convert.layer_keys", "convert.megatron.translate", "data.indexed.dataset",
    "models.config", "checkpoint.manifest", "curate.config", "curate.datatrove_blocks",
}  # fmt: skip
DOCUMENTED = set(FLOORS) - {"oracle"}  # packages whose public functions' docstrings all begin with a verb
_VERBS = """
Add Adjust Advance Allocate Answer Append Apply Ask Attach Await Begin Bring Broadcast Build Call Cast Check
Choose Clear Clip Close Collect Compare Complete Compute Concatenate Continue Convert Copy Corrupt Count Create
Curate Cut Declare Delete Dequantise Describe Divide Do Draw Drop Encode End Enter Errors: Exchange Fill Find
Finish Format Free Gather Give Go Hand Hash Hold Ignore Initialise Join Judge Keep Let Load Look Make Map Mark
Mask Measure Merge Move Multiply Name Normalise Note Open Parse Place Plan Play Prepare Print Publish Put
Quantise Quantize Raise Read Record Reduce Refuse Register Release Remove Rename Replace Reshard Resolve Restore
Return Rotate Run Save Say Scale Scatter See Send Set Shift Show Simulate Sort Split Spread Stack Start Stop
Store Sum Take Tell Tokenise Train Translate Turn Unshard Update Use Verify Wait Walk Write Yield
"""
VERBS = set(_VERBS.split())

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
def trainers_see_the_engine(source: Source) -> Iterator[Finding]:
    """Of the model's side a trainer sees the engine; what else `training` imports has a reason in a table."""
    if source.package != "training":
        return
    allowed = DESCRIPTIONS | BESIDE_THE_ENGINE.get(source.name, set())
    for name, line in source.imports():
        parts = name.split(".")
        if parts[0] != "megallm" or len(parts) < 3 or parts[1] not in MODEL_SIDE:
            continue
        if ".".join(parts[1:3]) not in allowed:
            yield line, f"{source.name} imports {name}: of the model's side a trainer sees engine only"


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
        if any(ast.unparse(each) == "triton.jit" for each in node.decorator_list):
            continue  # a kernel takes pointers and numbers alone
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
    if source.name in ("ops.backends", "base.optional"):
        return
    for name, line in source.imports():
        if name.partition(".")[0] in OPTIONAL:
            yield line, f"{name} is optional: only base.optional and ops.backends may load it"


@rule
def vague_names(source: Source) -> Iterator[Finding]:
    if VAGUE & set(source.name.split(".")):
        yield 1, f"{source.name} says nothing about what is in it"


@rule
def docstrings(source: Source) -> Iterator[Finding]:
    if source.name.rpartition(".")[2] != "__init__" and not ast.get_docstring(source.tree):
        yield 1, "the module has no docstring"


@rule
def columns(source: Source) -> Iterator[Finding]:
    """100 columns; tables, fields of dataclasses with their documentation, regular expressions and texts apart."""
    if source.package == "oracle" or source.name in WIDE:
        return
    free = _tables(source) | {line for node in ast.walk(source.tree) for line in _wide_lines(node)}
    for number, line in enumerate(source.text.splitlines(), start=1):
        if len(line) > MAX_COLUMNS and number not in free and not any(mark in line for mark in PRAGMAS):
            yield number, f"{len(line)} columns; at most {MAX_COLUMNS}"


def _tables(source: Source) -> set[int]:
    """Lines of the statements that end in `# fmt: skip`."""
    lines = source.text.splitlines()
    ends = {number for number, line in enumerate(lines, start=1) if line.endswith("# fmt: skip")}
    return {
        line
        for node in ast.walk(source.tree)
        if isinstance(node, ast.stmt) and node.end_lineno in ends
        for line in range(node.lineno, node.end_lineno + 1)
    }


def _wide_lines(node: ast.AST) -> Iterator[int]:
    """Lines of fields of a dataclass, and of texts of several lines that are no docstring."""
    if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(one) for one in node.decorator_list):
        for field in node.body:
            if isinstance(field, ast.AnnAssign):
                yield from range(field.lineno, field.end_lineno + 1)
    if isinstance(node, (ast.Assign, ast.Return)):
        for text in ast.walk(node):
            if isinstance(text, (ast.Constant, ast.JoinedStr)) and text.end_lineno > text.lineno:
                yield from range(text.lineno, text.end_lineno + 1)


@rule
def only_tables_are_not_formatted(source: Source) -> Iterator[Finding]:
    """`# fmt: skip` stands behind a table: a collection, or a call, of several rows."""
    if source.package == "oracle":
        return
    for number, line in enumerate(source.text.splitlines(), start=1):
        if line.endswith("# fmt: skip"):
            ending = [node for node in ast.walk(source.tree) if _end(node) == number]
            if not any(_is_table(inner) for node in ending for inner in ast.walk(node)):
                yield number, "`# fmt: skip` behind something that is no table"


def _end(node: ast.AST) -> int | None:
    """The last line of a statement, of the head of one with a body."""
    if isinstance(node, ast.For):
        return node.iter.end_lineno
    return node.end_lineno if isinstance(node, (ast.stmt, ast.expr)) else None


def _is_table(node: ast.AST) -> bool:
    if isinstance(node, ast.Dict):
        return len(node.keys) >= MIN_ROWS
    return isinstance(node, (ast.Tuple, ast.List, ast.Set)) and len(node.elts) >= MIN_ROWS


@rule
def docstrings_begin_with_a_verb(source: Source) -> Iterator[Finding]:
    """`Returns the ...`, `Yields ...`, `Fill ...`, `Number of ...`: a sentence, not a headless clause or a noun."""
    if source.package not in DOCUMENTED:
        return
    for node, _ in source.functions():
        text = ast.get_docstring(node)
        if text is None or node.name.startswith("_") or "property" in map(ast.unparse, node.decorator_list):
            continue
        first, second = [*re.findall(r"[^\s,;]+", text)[:2], ""][:2]
        stems = {first, first.removesuffix("s"), first.removesuffix("es"), first.removesuffix("ies") + "y"}
        if not stems & VERBS and (first, second) != ("Number", "of"):
            yield node.lineno, f"the docstring of {node.name} begins with '{first}', which is no verb"


@rule
def nothing_outside(source: Source) -> Iterator[Finding]:
    """No path of a machine, and nothing beside the repository."""
    for number, line in enumerate(source.text.splitlines(), start=1):
        if "../shared" in line or '"/home/' in line or "'/home/" in line:
            yield number, "a path outside the repository"


# One public name, one thing. A constant is read beside its module, and the oracle names its own twin of a layer or a
# rule as the package does; everything else that stands at the top of two modules means the same in both, as these do.
SAME_MEANING = {"Arrays", "Attempt", "Batch", "Backend", "Progress", "load", "log", "main", "run"}


def public_names(source: Source) -> Iterator[tuple[str, int]]:
    """Classes, functions and type aliases at the top of a module, with their lines."""
    for node in source.tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            continue
        yield from ((name, node.lineno) for name in names if not name.startswith("_") and not name.isupper())


def shared_names(package: list[Source], allowed: set[str]) -> list[str]:
    """Public names that stand in two modules or more, as sentences."""
    where: dict[str, list[str]] = {}
    for source in package:
        if source.package != "oracle":
            for name, line in public_names(source):
                where.setdefault(name, []).append(f"megallm/{source.name.replace('.', '/')}.py:{line}")
    return [
        f"{name} means several things: {', '.join(found)}"
        for name, found in sorted(where.items())
        if len(found) > 1 and name not in allowed
    ]


def test_one_public_name_means_one_thing(package):
    assert shared_names(package, SAME_MEANING) == []


def test_a_name_with_two_meanings_is_found():
    two = [Source("data.x", "class Reader:\n    pass"), Source("checkpoint.x", "X = 1\n\ndef Reader(): ...")]
    assert shared_names(two, set()) == ["Reader means several things: megallm/data/x.py:1, megallm/checkpoint/x.py:3"]
    assert shared_names(two, {"Reader"}) == [] and shared_names(two[:1], set()) == []
    assert shared_names([Source("data.x", "LIMIT = 1\n_a = 2"), Source("ops.x", "LIMIT = 1\n_a = 2")], set()) == []


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


def code_lines(package: list[Source]) -> dict[str, int]:
    """Code lines by package."""
    found: dict[str, int] = {}
    for source in package:
        found[source.package] = found.get(source.package, 0) + len(source.code_lines)
    return found


def over_budget(lines: dict[str, int]) -> list[str]:
    """Sentences about packages that have grown, and about all of them; the oracle counts as tests."""
    total = sum(count for name, count in lines.items() if name != "oracle")
    found = [f"all packages have {total} code lines; at most {MAX_LINES}"] if total > MAX_LINES else []
    for name, count in lines.items():
        most = MAX_LINES_OF.get(name, MAX_LINES_OF_OTHERS)
        if count > most:
            found.append(f"{name} has {count} code lines; at most {most}: shorten it, or say here why it must grow")
    return found


def test_code_lines_keep_their_budgets(package):
    assert over_budget(code_lines(package)) == []


def test_a_budget_that_is_exceeded_is_noticed():
    whole = [Source("ops.x", "x = 1\n" * (MAX_LINES_OF["ops"] + 1))]
    assert "ops has" in over_budget(code_lines(whole))[0]
    assert "all packages have" in over_budget(dict.fromkeys(string.ascii_letters, MAX_LINES_OF_OTHERS))[0]
    assert over_budget({"oracle": MAX_LINES_OF["oracle"], "ops": 10}) == []


def fields_of(classes: list[type]) -> set[tuple[type, str]]:
    """(class, field) of every setting of configurations and of the sections in them."""
    found: set[tuple[type, str]] = set()
    waiting = list(classes)
    while waiting:
        cls = waiting.pop()
        for name, hint in typing.get_type_hints(cls).items():
            inner = [one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)]
            waiting += inner
            if name in {field.name for field in dataclasses.fields(cls)} and not dataclasses.is_dataclass(hint):
                found.add((next(base for base in cls.__mro__ if name in vars(base).get("__annotations__", {})), name))
    return found


def test_configurations_have_at_most_300_settings():
    """Every key that a person can set in a file, counted once wherever it is used."""
    classes = [kind.config for kind in KINDS.values()] + [CurateConfig]
    assert 150 < len(fields_of(classes)) <= MAX_FIELDS
    assert len(fields_of([PretrainConfig])) == len(fields_of([PretrainConfig, PretrainConfig]))


def test_settings_are_counted_in_sections_and_lists():
    many = dataclasses.make_dataclass("Many", [(f"key{i}", int) for i in range(MAX_FIELDS)])
    assert len(fields_of([dataclasses.make_dataclass("Outer", [("many", many), ("one", int)])])) == MAX_FIELDS + 1
    assert len(fields_of([dataclasses.make_dataclass("Outer", [("many", tuple[many, ...])])])) == MAX_FIELDS + 1


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
    "trainers_see_the_engine": [
        ("training.x", "from megallm.parallel.mesh import Mesh", "from megallm.engine.engine import Engine, Mesh"),
        ("training.x", "def f():\n    from megallm.convert import weights", "import megallm.models.config"),
        ("training.rules.x", "from megallm.models.moe import route", "from megallm.parallel.schedule import SCHEDULES"),
        ("training.x", "from megallm.checkpoint import store", None),
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
    "columns": [
        ("ops.x", f"x = '{'a ' * 60}'", f"TABLE = (1, 2, {'3, ' * 60})  # fmt: skip"),
        ("ops.x", f"x = 1  # {'a ' * 60}", f'PATTERN = r"{"a" * 120}"'),
        ("ops.x", f"class A:\n    b: int = 1  # {'a ' * 60}", f"@dataclass\nclass A:\n    b: int = 1  # {'a ' * 60}"),
        ("ops.x", f'def f():\n    """{"a " * 60}"""', f"x = '''\n{'a' * 120}\n'''"),
    ],
    "only_tables_are_not_formatted": [
        ("ops.x", "f(a,  b)  # fmt: skip", "TABLE = {1: 2, 3:  4, 5: 6}  # fmt: skip"),
        ("ops.x", "def f(a,  b): pass  # fmt: skip", "x = f([1,  2, 3])  # fmt: skip"),
        ("ops.x", "x = [1,  2]  # fmt: skip", "for x in (1,  2, 3):  # fmt: skip\n    pass"),
    ],
    "docstrings_begin_with_a_verb": [
        ("training.x", 'def f():\n    """Of what has travelled."""', 'def f():\n    """Returns what has travelled."""'),
        ("training.x", 'def f():\n    """Have the parameters here."""', 'def f():\n    """Gather the parameters."""'),
        ("training.x", 'def f():\n    """The share of a rank."""', 'def f():\n    """Number of ranks."""'),
        ("training.x", 'def f():\n    """Whether it fits."""', 'def _f():\n    """Whether it fits."""'),
        ("training.x", 'def f():\n    """Rows of a step."""', 'def f():\n    """Copies rows."""'),
    ],
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


def test_what_trainers_import_beside_the_engine_is_needed(package):
    """A row whose import is gone must go too."""
    for module, names in BESIDE_THE_ENGINE.items():
        imported = {name.removeprefix("megallm.") for s in package if s.name == module for name, _ in s.imports()}
        assert names <= imported, (module, names - imported)


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
