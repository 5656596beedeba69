"""base.config: what is read, what is refused, and that every problem names its place."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.base import config as cfg
from megallm.base.errors import UsageError


@dataclass(frozen=True)
class Inner:
    tp: int = 1  # ranks of one kind
    ratio: float = 0.5
    kind: Literal["a", "beta", "gamma"] = "a"
    on: bool = False


@dataclass(frozen=True)
class Outer:
    """A test tree."""

    name: str = "x"
    # Above the field.
    maybe: int | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    many: tuple[int, ...] = ()
    sources: dict[str, float] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


def problems_of(text: str, *overrides: str, tmp_path=None) -> list[str]:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        cfg.load(Outer, path, overrides)
    lines = str(caught.value).replace(f"{path}:", "c.yaml:").split("\n  ")
    return lines if len(lines) == 1 else lines[1:]


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)
floats = st.floats(allow_nan=False, allow_infinity=False)
inners = st.builds(
    Inner, tp=st.integers(), ratio=floats, kind=st.sampled_from(["a", "beta", "gamma"]), on=st.booleans()
)
outers = st.builds(
    Outer,
    name=texts | st.sampled_from(["no", "1e-4", "null", "~", "true", "1:30", "'", "#", "a: b", "- x", "2024"]),
    maybe=st.none() | st.integers(),
    betas=st.tuples(floats, floats),
    many=st.lists(st.integers()).map(tuple),
    sources=st.dictionaries(texts, floats, max_size=3),
    inner=inners,
)


@settings(max_examples=200, deadline=None)
@given(outers)
def test_yaml_round_trip(config):
    assert cfg.loads(Outer, cfg.to_yaml(config)) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("1_000", 1000.0), ("1_000.5", 1000.5), (".5", 0.5), ("5.", 5.0), ("-1E+3", -1000.0), ("7", 7.0)],
)
def test_numbers_that_yaml_1_1_reads_as_text(text, value):
    assert cfg.loads(Outer, f"inner: {{ratio: {text}}}").inner.ratio == value
    assert cfg.load(Outer, None, [f"inner.ratio={text}"]).inner.ratio == value


def test_integers():
    assert cfg.loads(Outer, "maybe: 1_000").maybe == 1000
    assert cfg.loads(Outer, "maybe: 010").maybe == 10  # not octal
    assert cfg.loads(Outer, "maybe: 2e3").maybe == 2000


def test_text_is_what_was_written():
    assert cfg.loads(Outer, "name: no").name == "no"
    assert cfg.loads(Outer, "name: 1:30").name == "1:30"
    assert cfg.loads(Outer, "name: ${HOME}").name == "${HOME}"


def test_overrides_in_order_and_dotted_keys_of_mappings(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("inner: {tp: 2, on: true}\nsources: {old: 1}\n")
    config = cfg.load(
        Outer, path, ["inner.tp=4", "inner={ratio: 0.25}", "sources./data/a.b=2", "maybe=null", "betas=[0.1, 0.2]"]
    )
    assert config.inner == Inner(tp=4, ratio=0.25, on=True)
    assert config.sources == {"old": 1.0, "/data/a.b": 2.0}
    assert config.betas == (0.1, 0.2)
    assert cfg.load(Outer, path, ["sources={new: 3}"]).sources == {"new": 3.0}


def test_all_problems_at_once_with_their_lines(tmp_path):
    text = "inner:\n  ttp: 2\n  kind: betta\n  on: yes\nname: x\nname: y\nratio: 2\nbetas: [1, x]\nmany: 3\n"
    found = problems_of(text, "inner.tp=two", "nonsense", "inner.ratio=.nan", tmp_path=tmp_path)
    expected = [
        ("c.yaml:6:", "'name' is given twice, first on line 5"),
        ("command line:", "'nonsense' is not of the form key=value"),
        ("c.yaml:2:", "unknown key 'inner.ttp'. Did you mean 'inner.tp'? Keys of inner are: tp, ratio, kind, on."),
        ("c.yaml:3:", "inner.kind is 'betta'; it must be one of a, beta, gamma. Did you mean 'beta'?"),
        ("c.yaml:4:", "inner.on is 'yes'; it must be true or false."),
        ("command line:", "inner.tp is 'two'; it must be an integer such as 8."),
        ("command line:", "inner.ratio is '.nan'; it must be a finite number"),
        ("c.yaml:7:", "unknown key 'ratio'. Did you mean 'inner.ratio'?"),
        ("c.yaml:8:", "betas[1] is 'x'; it must be a finite number"),
        ("c.yaml:9:", "many is '3'; it must be a list, each an integer"),
    ]
    assert len(found) == len(expected)
    for line, (place, sentence) in zip(found, expected, strict=True):
        assert line.startswith(place) and sentence in line


@pytest.mark.parametrize(
    ("text", "place", "sentence"),
    [
        ("name: x\nmaybe: 1.5\n", "c.yaml:2:", "must be an integer such as 8 or null"),
        ("maybe: '3'\n", "c.yaml:1:", "maybe is '3'"),
        ("name:\n", "c.yaml:1:", "name is empty; it must be text"),
        ("inner: [1]\n", "c.yaml:1:", "inner must be a mapping of tp"),
        ("betas: [1, 2, 3]\n", "c.yaml:1:", "betas has 3 values"),
        ("sources: {a: x}\n", "c.yaml:1:", "sources.a is 'x'"),
        ("sources: {a: 1, a: 2}\n", "c.yaml:1:", "'a' is given twice"),
        ("- a\n", "c.yaml:1:", "must be a mapping of sections"),
        ("a: b: c\n", "c.yaml:1:", "mapping values are not allowed here"),
        ("name: x\n\tmaybe: 1\n", "c.yaml:2:", "not valid YAML"),
        ("name: x\n---\nname: y\n", "c.yaml:2:", "another document"),
        ("? [a]\n: 1\n", "c.yaml:1:", "a key must be"),
        ("<<: {name: y}\n", "c.yaml:1:", "unknown key '<<'"),
        (
            "name: !!python/object/apply:os.system ['touch owned']\n",
            "c.yaml:1:",
            "python/object/apply:os.system' is refused",
        ),
        ("name: !!str x\n", "c.yaml:1:", "is refused"),
        ("name: &a [*a]\n", "c.yaml:1:", ""),
        ("name: " + "[" * 5000 + "\n", "c.yaml:1:", "nested deeper"),
        ("name: \x00\n", "c.yaml", "not valid YAML"),
    ],
)
def test_refusals(text, place, sentence, tmp_path):
    (line,) = problems_of(text, tmp_path=tmp_path)
    assert line.startswith(place) and sentence in line


def test_billion_laughs(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (line,) = problems_of("\n".join(lines), tmp_path=tmp_path)
    assert "aliases expand to more than" in line


def test_a_few_aliases_are_fine():
    assert cfg.loads(Outer, "betas: &b [0.5, 0.5]\nsources: {a: &w 2, b: *w}\n").sources == {"a": 2.0, "b": 2.0}


def test_unreadable_files(tmp_path):
    for path, sentence in [(tmp_path / "no.yaml", "No such file"), (tmp_path, "cannot be read")]:
        with pytest.raises(UsageError, match=sentence):
            cfg.load(Outer, path)
    bad = tmp_path / "latin.yaml"
    bad.write_bytes(b"name: x\nmaybe: \xff\n")
    with pytest.raises(UsageError, match="latin.yaml:2: the file is not UTF-8"):
        cfg.load(Outer, bad)
    bad.write_bytes(b"#" * (cfg.MAX_BYTES + 1))
    with pytest.raises(UsageError, match="larger than"):
        cfg.load(Outer, bad)


def test_empty_file_and_empty_sections_are_the_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("\ufeff# nothing\ninner:\n")
    assert cfg.load(Outer, path) == Outer()


@pytest.mark.parametrize("value", ["{a", "[1", '"x'])
def test_broken_override_values(value):
    with pytest.raises(UsageError, match="command line: the value of sources is not valid YAML"):
        cfg.load(Outer, None, [f"sources={value}"])


def test_schema_carries_docs_defaults_and_choices():
    schema = cfg.schema(Outer)
    json.dumps(schema)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["maybe"] == {
        "anyOf": [{"type": "integer"}, {"type": "null"}],
        "default": None,
        "description": "Above the field.",
    }
    inner = schema["properties"]["inner"]["properties"]
    assert inner["tp"]["description"] == "ranks of one kind"
    assert inner["kind"]["enum"] == ["a", "beta", "gamma"]
    assert schema["properties"]["betas"]["maxItems"] == 2


def test_leaves_get_and_replace():
    assert list(cfg.leaves(Outer))[-4:] == ["inner.tp", "inner.ratio", "inner.kind", "inner.on"]
    config = cfg.replace(Outer(), {"inner.tp": 3, "inner.on": True, "name": "y"})
    assert (cfg.get(config, "inner.tp"), config.inner.on, config.name) == (3, True, "y")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.0e+12", 10**12), ("1e6", 10**6), ("1E+3", 1000), ("8.0", 8), ("8.", 8), (".5e1", 5), ("1.50e1", 15),
        ("1_000.0", 1000), ("+8.0", 8), ("100e-2", 1), ("0x10", 16), ("0o17", 15), ("9007199254740993.0", 2**53 + 1),
        ("1e30", 10**30),
    ],
)  # fmt: skip
def test_any_whole_yaml_number_is_an_integer(text, value):
    """Issue R item 9: docs/stream.md's own 1.0e+12 was refused."""
    assert cfg.loads(Whole, f"number: {text}").number == value
    assert cfg.loads(Whole, f"several: [{text}]").several == (value,)


def test_whole_numbers_where_only_some_are_choices():
    assert cfg.loads(Whole, "choice: 1.0").choice == 1 and cfg.loads(Whole, "choice: 0x1").choice == 1
    with pytest.raises(UsageError, match="must be one of 0, 1"):
        cfg.loads(Whole, "choice: 2.0")


@pytest.mark.parametrize(
    "text",
    ["2.5", "1e-1", "'8.0'", "1e100", "1e999999999", "1e-9999999999999999999", "1:30", ".inf", "0x", ".", "1" * 5000],
)
def test_what_is_no_whole_number_is_refused(text):
    """Nor does a number of a thousand million digits fill the memory."""
    with pytest.raises(UsageError, match="number is .* it must be an integer such as 8"):
        cfg.loads(Whole, f"number: {text}")


@dataclass(frozen=True)
class Whole:
    """Integers in all places."""

    number: int = 0
    several: tuple[int, ...] = ()
    choice: Literal[0, 1] = 0
