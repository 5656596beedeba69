"""One module for every verb that trains: a kind is a row, `megallm config --kind` shows its configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest

from megallm.cli import main as cli
from megallm.cli import train
from megallm.cli.table import TRAINING, VERBS
from megallm.run.config import JobConfig
from megallm.training.kinds import KINDS, Kind
from megallm.training.rules.problem import Problem, Rules


@dataclass(frozen=True)
class RowsConfig:
    """What the kind of this test reads."""

    path: str = "rows.jsonl"  # a file of rows


@dataclass(frozen=True)
class OtherConfig(JobConfig):
    """The configuration of a kind that is a row in a table and nothing else."""

    data: RowsConfig = field(default_factory=RowsConfig)


def no_rows(config):
    if not config.data.path:
        yield Problem("rows", "data.path is empty.", ({"data.path": "rows.jsonl"},))


@pytest.fixture
def other(monkeypatch):
    kind = Kind("other", OtherConfig, "nowhere", Rules(given=(no_rows,)), lambda config: None, lambda config: None)
    monkeypatch.setitem(KINDS, "other", kind)


def call(capsys, *argv) -> tuple[int, str, str]:
    code = cli.main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_kind_is_a_verb():
    assert set(TRAINING) == KINDS.keys() == train.COMMANDS.keys()
    assert all(VERBS[name].module == "megallm.cli.train" for name in KINDS)


def test_config_shows_another_kind(other, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("model: {preset: tiny-1m, vocab_size: 300}\n")
    code, out, _ = call(capsys, "config", path, "--kind", "other", "data.path=x", "--json")
    assert code == 0 and json.loads(out)["data"] == {"path": "x"}
    assert call(capsys, "config", path, "data.path=x")[0] == 2, "pretrain has no such key"
    code, out, _ = call(capsys, "config", "--kind", "other", "--schema")
    assert code == 0 and "a file of rows" in out and "sources" not in out
    code, _, err = call(capsys, "config", path, "--kind", "other", "data.path=''")
    assert code == 2 and "data.path is empty. Nearest valid: data.path=rows.jsonl." in err
    assert call(capsys, "config", path, "--kind", "nonsense")[0] == 2
