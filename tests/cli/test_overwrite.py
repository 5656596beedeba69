"""One rule for outputs that are there (refused, unless --overwrite) and for `~` in paths (issue R, B.17)."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from megallm.base import config as configs
from megallm.base.errors import UsageError
from megallm.base.files import check_new
from megallm.checkpoint import store
from megallm.cli.main import main
from megallm.cli.table import VERBS
from megallm.data.indexed.dataset import IndexedWriter
from megallm.training.config import PretrainConfig
from megallm.training.kinds import KINDS

TEXT = "The river runs by the old mill, and the miller is there. " * 20


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{k} {TEXT}"}) + "\n" for k in range(30)))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"buy {k} now"}) + "\n" for k in range(30)))
    (tmp_path / "c.yaml").write_text("input: {files: [a.jsonl]}\nsteps: [exact]\n")
    with IndexedWriter(tmp_path / "d", np.dtype("<u2")) as writer:
        writer.add(np.arange(900, dtype="<u2"), np.full(30, 30))
        writer.commit()
    return tmp_path


VERBS_THAT_WRITE = {  # words, and the files that they write
    "preprocess": ("preprocess --input a.jsonl --output o --tokenizer bytes", "o_text_document.idx"),
    "preprocess, shards": ("preprocess --input a.jsonl b.jsonl --output o --tokenizer bytes --shards 2 --append-eod",
                           "o-00001-of-00002_text_document.bin"),
    "preprocess, rejects": ("preprocess --input a.jsonl --output o --tokenizer bytes --on-error skip",
                            "o.rejects.jsonl"),
    "tokenizer train": ("tokenizer train --input a.jsonl --output tok --vocab-size 300", "tok/tokenizer.json"),
    "data merge": ("data merge d d --output o", "o.bin"),
    "data split": ("data split d --output o --shares 1,1", "o-1.idx"),
    "synth": ("synth --count 3 --output o.jsonl", "o.jsonl"),
    "synth, packed": ("synth --count 3 --output o.jsonl.gz", "o.jsonl.gz"),
    "curate train-classifier": ("curate train-classifier --good a.jsonl --bad b.jsonl --output o.npz", "o.npz"),
    "curate train-lm": ("curate train-lm --input a.jsonl --output o.arpa", "o.arpa"),
    "curate": ("curate c.yaml --output out", "out/kept/part-000000.jsonl.gz"),
    "schedule, json": ("schedule --kind 1f1b --pp 2 --micros 2 --json o.json", "o.json"),
    "schedule, draw": ("schedule --kind 1f1b --pp 2 --micros 2 --draw o.svg", "o.svg"),
    "schedule, trace": ("schedule --kind 1f1b --pp 2 --micros 2 --trace o.json", "o.json"),
    "oracle": ("oracle --list --json o.json", "o.json"),
    "data stream": ("data stream run.yaml --steps 0:2 --json o.jsonl", "o.jsonl"),
    "ckpt dump": ("ckpt dump steps --output o.safetensors", "o.safetensors"),
}  # fmt: skip


def prepare(words: str, place: Path) -> list[str]:
    if "run.yaml" in words:
        settings = {"run": {"dir": "run"}, "model": {"preset": "gpt2"}, "data": {"sources": {"d": 1}, "seq_len": 8}}
        (place / "run.yaml").write_text(json.dumps(settings))
    if words.startswith("ckpt dump"):
        from megallm.checkpoint.io import Part
        from megallm.parallel.mesh import Mesh

        store.save(place / "steps", 1, [Part("w", (4,), (0,), torch.arange(4.0))], {}, Mesh.single())
    return words.split()


@pytest.mark.parametrize("case", VERBS_THAT_WRITE)
def test_b17_what_is_there_is_refused_and_overwrite_allows_it(place, capsys, case):
    words, file = VERBS_THAT_WRITE[case]
    command = prepare(words, place)
    (place / file).parent.mkdir(parents=True, exist_ok=True)
    mine = b"something of mine"
    (place / file).write_bytes(mine)
    listing = sorted(place.rglob("*"))
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "exists, and nothing is overwritten unasked" in error and "--overwrite" in error
    assert file.split("/")[0] in error
    assert (place / file).read_bytes() == mine
    left = set(place.rglob("*")) - set(listing)
    assert all(path.name in ("work", ".lock") or "00000-of" in path.name for path in left), left
    assert main([*command, "--overwrite"]) == 0, capsys.readouterr().err
    assert (place / file).exists() == (case != "preprocess, rejects") or (place / file).stat().st_size == 0
    assert not (place / file).exists() or (place / file).read_bytes() != mine


def test_b17_every_verb_with_an_output_has_the_option(capsys):
    without = {*KINDS, "rewards try", "rewards list",
               "config", "doctor", "completion", "data show", "data trace", "data verify", "data stats",
               "ckpt ls", "ckpt show", "ckpt verify", "ckpt diff", "chat", "presets", "watch", "launch", "ckpt pin",
               "ckpt unpin", "replay", "profile"}  # fmt: skip
    for words in VERBS:
        with contextlib.suppress(SystemExit):
            main([*words.split(), "--help"])
        assert ("--overwrite" in capsys.readouterr().out) == (words not in without), words


def test_b17_the_same_command_of_several_shards_goes_on(place, capsys):
    """What one machine has done is not repeated, and is no reason to refuse the others."""
    words = ["preprocess", "--input", "a.jsonl", "b.jsonl", "--output", "o", "--tokenizer", "bytes", "--shards", "2"]
    assert main([*words, "--shard", "0"]) == 0
    before = (place / "o-00000-of-00002_text_document.bin").stat().st_mtime_ns
    capsys.readouterr()
    assert main(words) == 0
    assert [one["documents"] for one in json.loads(capsys.readouterr().out)] == [30, 30]
    assert (place / "o-00000-of-00002_text_document.bin").stat().st_mtime_ns == before
    (place / "a.jsonl").write_text('{"text": "another"}\n')
    assert main(words) == 2


def test_b17_convert_replaces_only_what_conversion_made(place, capsys):
    from tests.convert.tiny import case, make

    make(place / "hf", case("llama", "LlamaConfig"))
    words = ["convert", "--to", "megallm", "--input", "hf", "--output", "out"]
    assert main(words) == 0 and main(words) == 2
    (place / "out" / "left").write_text("")
    assert main([*words, "--overwrite"]) == 0 and not (place / "out" / "left").exists()
    assert sorted(path.name for path in place.glob("out*")) == ["out"]
    (place / "home").mkdir()
    (place / "home" / "letter.txt").write_text("mine")
    capsys.readouterr()
    for words in ("--input hf --output home", "--input hf --output hf"):
        assert main(["convert", "--to", "megallm", *words.split(), "--overwrite"]) == 2
    (place / "out" / "metrics.jsonl").write_text("{}")
    assert main(["convert", "--to", "megallm", "--input", "hf", "--output", "out", "--overwrite"]) == 2
    assert "a run was trained in it" in capsys.readouterr().err and (place / "home" / "letter.txt").exists()


@pytest.mark.parametrize(
    ("kind", "refused"),
    [("file", True), ("empty file", False), ("folder", True), ("empty folder", False), ("dangling link", True),
     ("link", True), ("absent", False), ("pipe", False)],
)  # fmt: skip
def test_b17_what_counts_as_being_there(tmp_path, kind, refused):
    path, other = tmp_path / "x", tmp_path / "other"
    other.write_text("")
    if "file" in kind:
        path.write_text("" if "empty" in kind else "x")
    elif "folder" in kind:
        path.mkdir()
        if kind == "folder":
            (path / "x").write_text("")
    elif "link" in kind:
        path.symlink_to(tmp_path / "nowhere" if "dangling" in kind else other)
    elif kind == "pipe":
        os.mkfifo(path)
    if refused:
        with pytest.raises(UsageError, match="exists"):
            check_new(path)
    else:
        check_new(path)
    check_new(path, overwrite=True)


# ~


def test_b17_a_tilde_is_the_home_folder_in_every_path_of_a_configuration(tmp_path, monkeypatch):
    """`run.dir: ~/x` made a folder named `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("run: {dir: ~/x}\ndata: {sources: {~/d: 1}, tokenizer: '~/tok'}\n")
    config = configs.load(PretrainConfig, tmp_path / "c.yaml", ["model.hf=~/hf"])
    assert config.run.dir == f"{tmp_path}/x" and config.data.tokenizer == f"{tmp_path}/tok"
    assert config.data.sources == {f"{tmp_path}/d": 1.0} and config.model.hf == f"{tmp_path}/hf"
    assert configs.load(PretrainConfig, None, ["data.sources={~/e: 2}"]).data.sources == {f"{tmp_path}/e": 2.0}
    with pytest.raises(UsageError, match="there is no user whose home folder ~nobody-here"):
        configs.load(PretrainConfig, None, ["run.dir=~nobody-here/x"])
    assert configs.load(PretrainConfig, None, ["run.dir=a~/x"]).run.dir == "a~/x"


@pytest.mark.parametrize(
    "words",
    [
        "synth --count 2 --output=~/o.jsonl", "tokenizer train --input=~/a.jsonl --vocab-size 300 --output=~/tok",
        "preprocess --input ~/a.jsonl --output ~/o --tokenizer bytes", "data merge ~/d ~/d --output=~/m",
        "curate ~/c.yaml --output=~/out input.files=[~/a.jsonl]", "schedule --kind gpipe --pp 2 --micros 2 --json=~/s",
    ],
)  # fmt: skip
def test_b17_a_tilde_is_the_home_folder_in_every_flag(place, monkeypatch, words):
    monkeypatch.setenv("HOME", str(place))
    before = set(place.iterdir())
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    assert main(words.split()) == 0
    assert len(set(place.iterdir()) - before) > 1 and not list((place / "elsewhere").iterdir())


def test_b17_a_prompt_that_begins_like_a_path_stays_a_text():
    from argparse import Namespace

    from megallm.cli.main import expand_paths

    args = expand_paths(Namespace(prompt=["~/x is a path"], stop=["~/"], json="~/o", prefixes=["~/a", "b"], top_k=1))
    home = os.path.expanduser("~")
    assert vars(args) == {"prompt": ["~/x is a path"], "stop": ["~/"], "json": f"{home}/o",
                          "prefixes": [f"{home}/a", "b"], "top_k": 1}  # fmt: skip
