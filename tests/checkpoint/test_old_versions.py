"""FAULTS row 54: checkpoints of every schema so far are read and go on as they went; a newer one says what it needs.

tests/checkpoint/fixtures/schema-N-NAME is a run folder as an earlier megallm left it after step 4 of 8, on two
tensor-parallel ranks in fp64, and the losses of all 8 steps there. A schema gets its fixture when it is made.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from megallm.base.errors import CheckpointError, NewerCheckpoint
from megallm.checkpoint import manifest, store, tools
from megallm.checkpoint.manifest import MANIFEST, SCHEMA, Manifest, digest
from megallm.checkpoint.reader import CheckpointReader
from megallm.cli.main import main
from tests.system.commands import megallm

FIXTURES = Path(__file__).with_name("fixtures")
FOLDERS = sorted(FIXTURES.glob("schema-*"))
NAMES = [folder.name for folder in FOLDERS]


def test_every_schema_has_a_fixture():
    found = {int(re.fullmatch(r"schema-(\d+)-\w+", name)[1]) for name in NAMES}
    assert found == set(range(1, SCHEMA + 1))


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_every_byte_of_a_fixture_is_read(folder):
    assert tools.verify_checkpoint(folder / "run")["ok"]
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 100_000
    with CheckpointReader(folder / "run" / "checkpoints" / "step-00000004") as reader:
        assert {"embedding.weight", "optim.exp_avg.layers.0.mlp.down.weight"} <= set(reader.names())
        assert reader.meta["ledger"]["step"] == 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the configuration and the data that the fixtures were trained on."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copy(FIXTURES / "config.yaml", folder / "config.yaml")
    lines = [json.dumps({"text": f"line {i} of a text that a fixture was trained on"}) + "\n" for i in range(40)]
    (folder / "text.jsonl").write_text("".join(lines))
    words = ("--tokenizer", "bytes", "--json-keys", "text", "--append-eod", "--workers", "1")
    given = ("--input", str(folder / "text.jsonl"), "--output", str(folder / "text"))
    assert main(["preprocess", *given, *words]) == 0
    return folder


@pytest.fixture
def place(data, tmp_path):
    return shutil.copytree(data, tmp_path / "place")


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_a_run_of_an_earlier_version_goes_on_as_it_did(folder, place):
    """At another layout than it was saved at; the losses are those of the version that wrote it."""
    shutil.copytree(folder / "run", place / "run")
    words = ("config.yaml", "train.stop_at=null", "--resume", "must")
    done = megallm("pretrain", *words, cwd=place)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = json.loads((folder / "losses.json").read_text())
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert {str(row["step"]): row["train/loss"] for row in rows} == pytest.approx(expected, rel=1e-9)


def newer(folder: Path, **changes) -> None:
    """Give a manifest other values, with its hash right again."""
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    del content["xxh3_128"]
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in (content | changes).items())
    body = ("{\n" + ",\n".join(lines)).encode()
    path.write_bytes(body + f',\n"xxh3_128": "{digest(body)}"\n}}\n'.encode())


def test_a_checkpoint_of_a_later_version_is_refused_and_not_renamed(tmp_path):
    """An older step beside it is not quietly gone on from: that would set the newer ones aside as damaged."""
    root = shutil.copytree(FOLDERS[0] / "run" / "checkpoints", tmp_path / "checkpoints")
    shutil.copytree(root / "step-00000004", root / "step-00000005")
    newer(root / "step-00000005", schema=SCHEMA + 1, needs="9.8.0", extra=[1])
    sentence = f"schema {SCHEMA + 1}; this megallm, .*, reads schema {SCHEMA}. It needs megallm >= 9.8.0"
    for read in (store.latest, store.latest_whole, CheckpointReader, tools.resolve_step):
        with pytest.raises(NewerCheckpoint, match=sentence):
            read(root / "step-00000005" if read is CheckpointReader else root)
    assert "needs megallm >= 9.8.0" in tools.ls(tmp_path)[1]["problem"]
    assert sorted(path.name for path in root.iterdir()) == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("schema", [0, -1, "1", 1.0, None, True])
def test_what_is_no_schema_is_damage(tmp_path, schema):
    root = shutil.copytree(FOLDERS[0] / "run" / "checkpoints", tmp_path / "checkpoints")
    shutil.copytree(root / "step-00000004", root / "step-00000005")
    newer(root / "step-00000005", schema=schema)
    found, warnings = store.latest_whole(root)
    assert found == root / "step-00000004" and "It has schema" in warnings[0]


def test_every_rank_hears_of_a_later_version(tmp_path, cluster, cuts, tensors):
    name, tensor = max(tensors.items(), key=lambda item: item[1].numel())
    newer(cluster.save(tmp_path, 1, cuts.axis(name, tensor, 3, 0), meta={}), schema=SCHEMA + 1)
    results = cluster.run(3, lambda mesh: store.latest_whole(tmp_path, mesh))
    assert [type(result) for result in results] == [NewerCheckpoint] * 3


def test_a_run_with_a_later_checkpoint_ends_with_74(place):
    shutil.copytree(FOLDERS[0] / "run", place / "run")
    newer(place / "run" / "checkpoints" / "step-00000004", schema=SCHEMA + 1, needs="9.8.0")
    done = megallm("pretrain", "config.yaml", "--resume", "auto", cwd=place)
    assert done.code == 74 and "needs megallm >= 9.8.0" in done.err, (done.code, done.err)


def test_what_this_version_writes_says_what_it_needs():
    data = Manifest(1, {}, {}, {}).encode()
    assert json.loads(data)["needs"] == manifest.NEEDS and manifest.decode(data, "it").step == 1
    with pytest.raises(CheckpointError):
        manifest.decode(data[:-1], "it")
