"""Frozen nested dataclasses <-> one YAML file <-> dotted overrides such as `layout.tp=2`. No torch.

The dataclass is the only description: names, types, defaults, and (as the comment beside a field)
its documentation. Scalars are read by the type of the field they go to, so `3e-4` is a number for a
float field and stays text for a text field, and none of YAML 1.1's surprises (`no` as false, `1:30`
as 90) exists here. Everything that is wrong with a file and its overrides is collected and raised
as one UsageError.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from megallm.base import suggest
from megallm.base.errors import UsageError
from megallm.base.field_docs import field_docs
from megallm.base.paths import expand_home

Config = TypeVar("Config")

MAX_BYTES = 1 << 20  # of a configuration file
MAX_NODES = 10_000  # after aliases are followed: a "billion laughs" file stops here
MAX_DEPTH = 32
COMMAND_LINE = "command line"  # where an override stands, in messages

_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_RADIX_INT = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_MAX_DIGITS = 100  # 1e6 is a fine number of steps; the digits of 1e999999999 would fill the memory
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")
_UNIONS = (types.UnionType, typing.Union)
_BAD = object()  # a value that could not be read; its problem is on the list


@dataclass(frozen=True)
class Scalar:
    """One YAML scalar as written; `plain` means that it was not quoted."""

    text: str
    plain: bool
    where: str


@dataclass(frozen=True)
class Items:
    """A YAML sequence."""

    items: tuple[Node, ...]
    where: str


@dataclass
class Table:
    """A YAML mapping: key -> (where the key stands, value)."""

    items: dict[str, tuple[str, Node]]
    where: str


Node = Scalar | Items | Table


def load(cls: type[Config], path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read `path` (None: defaults only), apply `key=value` overrides in order, and build a `cls`.

    Raises one UsageError that lists every problem as `file:line: sentence` or `command line:
    sentence`.
    """
    problems: list[str] = []
    root = Table({}, "defaults") if path is None else _read(Path(path), problems)
    for override in overrides:
        _apply_override(cls, root, override, problems)
    config = _build(cls, cls, root, "", problems)
    raise_problems(problems)
    return config


def loads(cls: type[Config], text: str, name: str = "text") -> Config:
    """Reads a configuration, as `load` does, from a string; `name` stands for the file in messages.
    """
    problems: list[str] = []
    config = _build(cls, cls, _parse(text, name, problems), "", problems)
    raise_problems(problems)
    return config


def raise_problems(problems: list[str], hint: str = "") -> None:
    """Raise one UsageError that carries every sentence of the list, then the hint; return when
    there are none.
    """
    if not problems:
        return
    lines = problems if len(problems) == 1 else [f"{len(problems)} problems in the configuration:", *problems]
    raise UsageError("\n  ".join([*lines, *([hint] if hint else [])]))


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the configuration as plain JSON values, in the order of the fields."""
    return _plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """Returns YAML that `load` turns into an equal configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def schema(cls: type) -> dict[str, Any]:
    """Returns the JSON schema of a configuration class, with the comments beside its fields as
    descriptions.
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | _schema_of(cls)


def leaves(cls: type, prefix: str = "") -> Iterator[str]:
    """Yields every dotted name that can be set, e.g. `layout.tp`."""
    for name, hint in _hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def get(config: Any, key: str) -> Any:
    """Returns the value at a dotted name, e.g. `get(config, "layout.tp")`."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def replace(config: Config, values: dict[str, Any]) -> Config:
    """Returns a copy with the values at the given dotted names."""
    direct: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        head, _, rest = key.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            direct[head] = value
    for head, inner in nested.items():
        direct[head] = replace(getattr(config, head), inner)
    return dataclasses.replace(config, **direct)


# Reading YAML into nodes.


class _Loader(yaml.SafeLoader):
    """PyYAML's composer without tags and without deep nesting."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        tag = None if self.check_event(yaml.AliasEvent) else event.tag
        if tag is not None:
            raise yaml.MarkedYAMLError(
                problem=f"the tag '{tag}' is refused: only plain values are read", problem_mark=event.start_mark
            )
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"values are nested deeper than {MAX_DEPTH} levels", problem_mark=event.start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _read(path: Path, problems: list[str]) -> Table:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UsageError(
                f"{path}: the file is larger than {MAX_BYTES} bytes; a configuration is a short YAML file."
            )
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}:{line}: the file is not UTF-8 text; save it as UTF-8.") from error
    except OSError as error:
        if "=" in str(path) and not path.exists():
            raise UsageError(
                f"{path} is a setting, and a CONFIG file is wanted before it: CONFIG.yaml {path}."
            ) from error
        raise UsageError(f"{path}: the configuration file cannot be read: {error.strerror}.") from error
    return _parse(text, str(path), problems)


def _parse(text: str, name: str, problems: list[str]) -> Table:
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UsageError(f"{name}{line}: {error.problem or error.context}; this is not valid YAML here.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{name}: {str(error).splitlines()[0]}; this is not valid YAML.") from error
    if root is None:
        return Table({}, f"{name}:1")
    node = _Converter(name, problems).node(root, ())
    if isinstance(node, Table):
        return node
    problems.append(f"{node.where}: the file must be a mapping of sections, such as 'layout:' with 'tp: 2' below it.")
    return Table({}, node.where)


class _Converter:
    """Turns PyYAML nodes into ours; counts what aliases expand to."""

    def __init__(self, name: str, problems: list[str]) -> None:
        self.name = name
        self.problems = problems
        self.count = 0

    def node(self, node: yaml.Node, above: tuple[int, ...]) -> Node:
        where = f"{self.name}:{node.start_mark.line + 1}"
        self.count += 1
        if self.count > MAX_NODES or id(node) in above:
            raise UsageError(f"{where}: aliases expand to more than {MAX_NODES} values; write the values out.")
        above = (*above, id(node))
        if isinstance(node, yaml.ScalarNode):
            return Scalar(node.value, node.style is None, where)
        if isinstance(node, yaml.SequenceNode):
            return Items(tuple(self.node(item, above) for item in node.value), where)
        table: dict[str, tuple[str, Node]] = {}
        for key, value in node.value:
            at = f"{self.name}:{key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append(f"{at}: a key must be a single word or text, not a list or a mapping.")
                continue
            if key.value in table:
                first = table[key.value][0].rpartition(":")[2]
                self.problems.append(f"{at}: the key '{key.value}' is given twice, first on line {first}; keep one.")
                continue
            table[key.value] = (at, self.node(value, above))
        return Table(table, where)


def _apply_override(cls: type, root: Table, override: str, problems: list[str]) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        problems.append(f"{COMMAND_LINE}: '{override}' is not of the form key=value, such as layout.tp=2.")
        return
    value = _override_value(text.strip(), key, problems)
    if value is None:
        return
    table, hint, names = root, cls, key.split(".")
    for depth, name in enumerate(names):
        hint = _hints(hint).get(name) if dataclasses.is_dataclass(hint) else None
        rest = ".".join(names[depth + 1 :])
        old = table.items.get(name, (COMMAND_LINE, None))[1]
        if not rest or hint is None:
            merged = _merge(old, value) if dataclasses.is_dataclass(hint) else value
            table.items[".".join(names[depth:])] = (COMMAND_LINE, merged)
            return
        inner = old if isinstance(old, Table) else Table({}, COMMAND_LINE)
        table.items[name] = (COMMAND_LINE, inner)
        if typing.get_origin(hint) is dict:
            inner.items[rest] = (COMMAND_LINE, value)
            return
        table = inner


def _override_value(text: str, key: str, problems: list[str]) -> Node | None:
    """Lists, mappings and quoted text are YAML; anything else is one scalar as typed."""
    if text[:1] not in ("{", "[", '"', "'"):
        return Scalar(text, True, COMMAND_LINE)
    try:
        return _relocate(_parse(f"value: {text}", COMMAND_LINE, problems).items["value"][1])
    except UsageError:
        problems.append(f"{COMMAND_LINE}: the value of {key} is not valid YAML: {text[:80]}")
        return None


def _merge(old: Node | None, new: Node) -> Node:
    """Returns a section given as a mapping changes the keys it names and leaves the others."""
    if not (isinstance(old, Table) and isinstance(new, Table)):
        return new
    return Table(old.items | new.items, new.where)


def _relocate(node: Node) -> Node:
    """Returns the same node, said to stand on the command line."""
    if isinstance(node, Scalar):
        return dataclasses.replace(node, where=COMMAND_LINE)
    if isinstance(node, Items):
        return Items(tuple(_relocate(item) for item in node.items), COMMAND_LINE)
    items = {key: (COMMAND_LINE, _relocate(value)) for key, (_, value) in node.items.items()}
    return Table(items, COMMAND_LINE)


# Building dataclasses from nodes.


def _build(root_cls: type, cls: type, node: Node, prefix: str, problems: list[str]) -> Any:
    hints = _hints(cls)
    if isinstance(node, Scalar) and node.plain and node.text in _NULLS:
        return cls()  # a section with nothing below it
    if not isinstance(node, Table):
        problems.append(f"{node.where}: {prefix[:-1]} must be a mapping of {', '.join(hints)}.")
        return cls()
    values = {}
    for name, (where, child) in node.items.items():
        if name not in hints:
            problems.append(f"{where}: {_unknown(root_cls, hints, prefix, name)}")
        elif dataclasses.is_dataclass(hints[name]):
            values[name] = _build(root_cls, hints[name], child, f"{prefix}{name}.", problems)
        else:
            value = _convert(hints[name], child, f"{prefix}{name}", problems)
            if value is not _BAD:
                values[name] = value
    return cls(**values)


def _unknown(root_cls: type, hints: dict[str, Any], prefix: str, name: str) -> str:
    full, known = f"{prefix}{name}", list(leaves(root_cls))
    close = suggest.nearest(name, [hint for hint in hints if suggest.plain(hint) == suggest.plain(name)])
    other = close or suggest.plain(full) in vars(root_cls).get("OTHER_NAMES", {})
    typo = None if other else suggest.typo_of(full, [*known, *(f"{prefix}{hint}" for hint in hints)])
    elsewhere = None if close or typo else _pointer(root_cls, full, known)
    if elsewhere is not None:
        return f"unknown key '{full}'. {elsewhere}"
    last = suggest.plain(name.rpartition(".")[2])
    same = [leaf for leaf in known if suggest.plain(leaf.rpartition(".")[2]) == last]
    close = close or (None if same and "." in name else suggest.nearest(name, hints, cutoff=0.5))
    close = typo or (f"{prefix}{close}" if close else next(iter(same), None)) or suggest.nearest(full, known, 0.75)
    hint, section = f" Did you mean '{close}'?" if close else "", f"Keys{f' of {prefix[:-1]}' if prefix else ''}"
    return f"unknown key '{full}'.{hint} {section} are: {', '.join(hints)}."


def _pointer(root_cls: type, key: str, known: list[str]) -> str | None:
    """Returns what another system's name of a setting is called here, by the class's `OTHER_NAMES`;
    None when unknown.
    """
    table = vars(root_cls).get("OTHER_NAMES", {})
    for name in (key, key.rpartition(".")[2]):
        found = table.get(suggest.plain(name.lstrip("-")))
        if found is not None:
            first, _, note = found.partition(" ")
            return f"Here that is {first}{note and ' ' + note}." if first in known else found
    return None


def _convert(hint: Any, node: Node, key: str, problems: list[str]) -> Any:
    """Returns the value of the type `hint`, or _BAD with a sentence added to `problems`."""
    hint, optional = _unwrap(hint)
    if isinstance(node, Scalar) and node.plain and node.text in _NULLS and optional:
        return None
    value = _BAD
    origin = typing.get_origin(hint)
    if isinstance(node, Scalar) and origin is Literal:
        choices = {str(choice): choice for choice in typing.get_args(hint)}
        value = choices.get(node.text, choices.get(str(_to_int(node)), _BAD))
    elif isinstance(node, Scalar) and hint in _SCALARS:
        value = _SCALARS[hint](node)
    elif isinstance(node, Scalar) and typing.get_origin(hint) in _UNIONS:
        tried = (_convert(one, node, key, []) for one in typing.get_args(hint))
        value = next((found for found in tried if found is not _BAD), _BAD)
    elif isinstance(node, Items) and origin is tuple:
        return _convert_items(hint, node, key, problems)
    elif isinstance(node, Table) and dataclasses.is_dataclass(hint):
        return _build(hint, hint, node, f"{key}.", problems)
    elif isinstance(node, Table) and origin is dict:
        inner = typing.get_args(hint)[1]
        table = {
            expand_home(name): _convert(inner, child, f"{key}.{name}", problems)
            for name, (_, child) in node.items.items()
        }
        return _BAD if _BAD in table.values() else table
    if value is _BAD:
        shown, close = "a list" if isinstance(node, Items) else "a mapping", ""
        if isinstance(node, Scalar):
            shown = f"'{node.text[:80]}'" if node.text or not node.plain else "empty"
            if origin is Literal:
                close = suggest.did_you_mean(node.text, [str(choice) for choice in typing.get_args(hint)])
            elif hint is bool and node.text.casefold() in suggest.BOOLEANS:
                close = f" Did you mean '{suggest.BOOLEANS[node.text.casefold()]}'?"
        null = " or null" if optional else ""
        problems.append(f"{node.where}: {key} is {shown}; it must be {_expected(hint)}{null}.{close}")
    return value


def _convert_items(hint: Any, node: Items, key: str, problems: list[str]) -> Any:
    args = typing.get_args(hint)
    size = None if args[-1] is Ellipsis else len(args)
    if size is not None and size != len(node.items):
        problems.append(f"{node.where}: {key} has {len(node.items)} values; it must be {_expected(hint)}.")
        return _BAD
    values = tuple(_convert(args[0], item, f"{key}[{i}]", problems) for i, item in enumerate(node.items))
    return _BAD if _BAD in values else values


def _to_int(node: Scalar) -> Any:
    """Returns the whole number that a scalar is, however it is written: 8, 8.0, 1e6, 1.0e+12,
    0x10.
    """
    if len(node.text) > _MAX_DIGITS:
        return _BAD
    if node.plain and _INT.fullmatch(node.text):
        return int(node.text.replace("_", ""))
    if node.plain and _RADIX_INT.fullmatch(node.text):
        return int(node.text, 0)
    if not (node.plain and _FLOAT.fullmatch(node.text)):
        return _BAD
    try:
        number = Decimal(node.text.replace("_", ""))  # exact, where a float would round
    except InvalidOperation:  # an exponent of 19 digits
        return _BAD
    whole = abs(number.adjusted()) < _MAX_DIGITS and number == number.to_integral_value()
    return int(number) if whole else _BAD


def _to_float(node: Scalar) -> Any:
    if not (node.plain and _FLOAT.fullmatch(node.text)):
        return _BAD
    value = float(node.text.replace("_", ""))
    return value if math.isfinite(value) else _BAD


def _to_bool(node: Scalar) -> Any:
    return _BOOLS.get(node.text, _BAD) if node.plain else _BAD


def _to_str(node: Scalar) -> Any:
    return _BAD if node.plain and (node.text in _NULLS or node.text in _BOOLS) else expand_home(node.text)


_SCALARS = {int: _to_int, float: _to_float, bool: _to_bool, str: _to_str}
_EXPECTED = {int: "an integer such as 8", float: "a finite number such as 3e-4", bool: "true or false", str: "text"}


def _expected(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return f"a mapping of {', '.join(_hints(hint))}"
    if typing.get_origin(hint) in _UNIONS:
        return " or ".join(_expected(one) for one in args)
    if origin is Literal and len(args) == 1:
        return f"'{args[0]}'"
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in args)
    if origin is tuple:
        count = "" if args[-1] is Ellipsis else f" of {len(args)} values"
        return f"a list{count}, each {_expected(args[0])}"
    if origin is dict:
        inner, optional = _unwrap(args[1])
        return f"a mapping such as {{name: value}}, each value {_expected(inner)}{' or null' * optional}"
    return _EXPECTED[hint]


# Looking at classes.


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _unwrap(hint: Any) -> tuple[Any, bool]:
    """`X | None` -> (X, True); a number or a word, `int | Literal["auto"]`, stays as it is."""
    if typing.get_origin(hint) in _UNIONS:
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return (inner[0], True) if len(inner) == 1 else (hint, False)
    return hint, False


def _schema_of(hint: Any) -> dict[str, Any]:
    hint, optional = _unwrap(hint)
    if optional:
        return {"anyOf": [_schema_of(hint), {"type": "null"}]}
    if dataclasses.is_dataclass(hint):
        return _schema_of_class(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if typing.get_origin(hint) in _UNIONS:
        return {"anyOf": [_schema_of(one) for one in args]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple:
        items: dict[str, Any] = {"type": "array", "items": _schema_of(args[0])}
        return items if args[-1] is Ellipsis else items | {"minItems": len(args), "maxItems": len(args)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema_of(args[1])}
    return {"type": {int: "integer", float: "number", bool: "boolean", str: "string"}[hint]}


def _schema_of_class(cls: type) -> dict[str, Any]:
    docs, defaults = field_docs(cls), cls()
    properties = {}
    for name, hint in _hints(cls).items():
        entry = _schema_of(hint)
        if not dataclasses.is_dataclass(hint):
            entry["default"] = _plain(getattr(defaults, name))
        if docs.get(name):
            entry["description"] = docs[name]
        properties[name] = entry
    description = inspect.cleandoc(cls.__doc__ or "")
    return {"type": "object", "description": description, "properties": properties, "additionalProperties": False}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
