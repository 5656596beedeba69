"""Issue R, C.19: a folder of text to a trained model in one command; tiny presets; a verb that lists presets."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import sys
from pathlib import Path

import pytest
import yaml

from megallm.base.config import load
from megallm.base.errors import DataError, UsageError
from megallm.cli import main as cli
from megallm.models.config import ModelConfig
from megallm.models.presets import PRESETS
from megallm.training import from_text
from megallm.training.config import PretrainConfig
from megallm.training.from_text import FromTextRequest, Machine, Survey, Text
from megallm.training.validate import check
from tests.system.commands import megallm


def call(capsys, *argv) -> tuple[int, str, str]:
    code = cli.main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def books(tmp_path, monkeypatch) -> Path:
    """Two plain files of 60 paragraphs of made-up words, in a folder of a folder."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(80)]
    (tmp_path / "books/more").mkdir(parents=True)
    for name in ("books/one.txt", "books/more/two.md"):
        (tmp_path / name).write_text("\n\n".join(" ".join(draw.choices(words, k=25)) for _ in range(60)))
    return tmp_path / "books"


TWO_CORES = Machine(2, 0)


def request(text: Path, preset: str = "tiny", run: str = "runs/x", machine: Machine = TWO_CORES) -> FromTextRequest:
    return FromTextRequest(str(text), preset, run, machine)


def test_one_command_trains_goes_on_and_names_generate(books):
    """The issue's command, once to step 2, again to step 3, and then the command that it names."""
    small = ("train.steps=3", "data.seq_len=16", "train.global_batch=2", "train.micro_batch=1", "log.plot=false")
    command = ("pretrain", "--text", "books", "--preset", "tiny", *small)
    done = megallm(*command, "train.stop_at=2", cwd=books.parent)
    assert done.code == 0, done.err
    assert "2 files" in done.out and "120 documents (paragraphs); preset tiny-1m" in done.out
    assert "val loss" in done.out and "next: megallm generate --model runs/books --prompt" in done.out
    made = books.parent / "runs/books/from_text"
    stamps = {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}
    again = megallm(*command, cwd=books.parent)
    assert again.code == 0 and "resumed at step 2" in again.out, again.err
    assert stamps == {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}
    rows = [json.loads(line) for line in (books.parent / "runs/books/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[-1]["val/loss"] > 0
    answer = megallm("generate", "--model", "runs/books", "--prompt", "The", "--max-new-tokens", "2", cwd=books.parent)
    assert answer.code == 0 and answer.out.startswith("The")


def test_preparing_makes_a_configuration_that_passes_its_own_check(books):
    said = []
    chosen = from_text.prepare_run(request(books), said.append)
    assert chosen["split_text"] == "paragraphs" and len(said) == 3
    config = load(PretrainConfig, request(books).config)
    assert check(config).model.vocab_size == chosen["vocab_size"] <= 2048
    assert call_config(request(books).config) == 0
    assert from_text.is_prepared(request(books)) and not (request(books).folder / "sample.jsonl").exists()
    for same in ("books", "./books/", "../" + books.parent.name + "/books"):
        assert from_text.is_prepared(request(Path(same)))


def call_config(path: Path) -> int:
    return cli.main(["config", str(path)])


@pytest.mark.parametrize(("what", "make"), [
    ("--preset changed", lambda books: request(books, "tiny-7m")),
    ("the text", lambda books: (books / "new.txt").write_text("more") and request(books)),
    ("the text", lambda books: os.utime(books / "one.txt", (1, 1)) or request(books)),
])  # fmt: skip
def test_another_text_or_preset_in_the_same_run_is_refused(books, what, make):
    from_text.prepare_run(request(books), lambda text: None)
    with pytest.raises(UsageError, match=what):
        from_text.is_prepared(make(books))


def test_what_an_interrupted_preparation_left_is_made_anew(books, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(from_text.preprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            from_text.prepare_run(request(books), lambda text: None)
    assert not from_text.is_prepared(request(books))
    from_text.prepare_run(request(books), lambda text: None)
    assert from_text.is_prepared(request(books))


@pytest.mark.parametrize("again", [False, True], ids=["the first time", "again"])
@pytest.mark.parametrize("call", range(1, 8))
def test_whenever_preparing_is_ended_it_can_be_begun_anew(books, again, call):
    """A folder that was just made, or half emptied, was taken for somebody else's, and the same command refused."""
    wanted, folder = request(books), Path("runs/x/from_text")
    if again:
        (folder / "tokenizer").mkdir(parents=True)
        for name in ("data.bin", "tokenizer/tokenizer.json", "sample.jsonl"):
            (folder / name).write_text("x")
        (folder / "choices.json").write_text(json.dumps({"state": "preparing", "made_for": {}}))
    count = 0

    def killed(frame, event, arg):
        nonlocal count
        count += event == "c_call" and arg in (os.mkdir, os.replace, os.unlink, os.rmdir, os.fsync)
        if count == call:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(killed)
    try:
        with pytest.raises(KeyboardInterrupt):
            from_text.prepare_run(wanted, print)
    finally:
        sys.setprofile(None)
    assert not from_text.is_prepared(wanted)


def test_a_folder_that_is_not_ours_is_never_removed(books):
    mine = request(books).folder / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("keep")
    with pytest.raises(UsageError, match="was not made by"):
        from_text.is_prepared(request(books))
    assert mine.read_text() == "keep"


@pytest.mark.parametrize(
    ("files", "split_text", "documents"),
    [
        ({"a.txt": b"one line\n" * 50}, "lines", 50),
        ({"a.txt": b"one\ntwo\n\n" * 30}, "paragraphs", 30),
        ({"a.txt": b"word"}, "file", 1),
        ({f"{i}.txt": b"a\n\nb\n\n" for i in range(120)}, "file", 120),
        ({"a.jsonl": b'{"text": "x"}\n' * 25, "b.txt": b"y\n"}, "paragraphs", 26),
        ({"a.txt.gz": gzip.compress(b"one line\n" * 50), ".hidden.txt": b"z", "x.py": b"q"}, "lines", 50),
        ({"a.txt.bz2": bz2.compress(b"x\n" * 20), "b.md.xz": lzma.compress(b"y\n" * 30)}, "lines", 50),
        ({"A.TXT": b"one line\n" * 50, "e.txt": b""}, "lines", 50),
    ],
)
def test_documents_are_files_paragraphs_or_lines(tmp_path, files, split_text, documents):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    survey = from_text.look(str(tmp_path))
    assert (survey.split_text(), survey.documents[survey.split_text()]) == (split_text, documents)


@pytest.mark.parametrize("documents", [1, 2, 3, 19, 20, 21, 1000, 10**6])
@pytest.mark.parametrize("machine", [Machine(1, 0), Machine(2, 0), Machine(64, 0), Machine(8, 1), Machine(8, 6)])
@pytest.mark.parametrize("preset", ["tiny-1m", "tiny-42m", "gpt2", "llama3.2-1b"])
def test_sizes_fit_whatever_the_text_and_the_machine(documents, machine, preset):
    text = Text("p", 37 * documents, documents)
    values = from_text.choose_settings(request(Path("t"), preset, machine=machine), preset, 300, text)
    config = load_values(values)
    resolved = check(config, machine.ranks)
    shares = [float(part) for part in config.data.split.split(",")]
    assert sum(shares[:2]) == documents and (shares[1] >= 1) == (config.eval.batches > 0) == (documents > 1)
    assert 100 <= resolved.train.steps <= 20_000 and resolved.layout.dp == machine.ranks


def load_values(values: dict) -> PretrainConfig:
    Path("c.yaml").write_text(yaml.safe_dump(values))
    return load(PretrainConfig, "c.yaml")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_tiny_preset_grows_with_the_text():
    named = [from_text._fitting(size) for size in (1, 5 << 20, 50 << 20, 1 << 30)]
    assert named == ["tiny-1m", "tiny-7m", "tiny-15m", "tiny-42m"]
    assert Survey((), 0, {"file": 3, "paragraphs": 2, "lines": 9}).split_text() == "lines"


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--text", "nowhere"], 65, "--text nowhere does not exist"),
        (["--text", "pipe"], 65, "--text pipe is a pipe"),
        (["--text", "empty"], 65, "It is empty."),
        (["--text", "other"], 65, "It has 1 other files, such as a.xyz."),
        (["--text", "blank"], 65, "without any text"),
        (["--text", "latin"], 65, "a.txt:1: invalid UTF-8"),
        (["--text", "good", "--preset", "tinny-1m"], 2, "Did you mean 'tiny-1m'?"),
        (["--text", "good", "--preset", "bert-base"], 2, "learns hidden tokens"),
        (["--text", "good", "seed=3"], 2, "run.seed"),
        (["--text", "good", "c.yaml"], 2, "Give either a CONFIG (c.yaml) or --text good"),
        (["c.yaml", "--preset", "tiny"], 2, "write model.preset=tiny"),
        ([], 2, "or train on a folder of text"),
        (["--text", "good", "train.stepz=3"], 2, "train.steps"),
    ],
)
def test_mistakes_have_a_sentence_and_leave_no_run(capsys, tmp_path, words, code, sentence):
    for name in ("empty", "other", "blank", "latin", "good"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "other/a.xyz").write_text("x")
    (tmp_path / "blank/a.txt").write_text(" \n")
    (tmp_path / "latin/a.txt").write_bytes("Pâte".encode("latin-1"))
    (tmp_path / "good/a.txt").write_text("x y\n" * 30)
    found, _, err = call(capsys, "pretrain", *words)
    assert found == code and sentence.casefold() in err.casefold(), err
    assert not list(tmp_path.glob("runs/*/checkpoints"))
    assert code != 2 or not (tmp_path / "runs").exists()  # before the text is read


def test_one_document_names_split_text(capsys):
    """The issue's: the run ended after 78 s with `holds no whole document` and never named --split-text."""
    Path("t.txt").write_text("all\n\nin one\n\n" * 40)
    words = ("--input", "t.txt", "--output", "d", "--tokenizer", "bytes")
    assert call(capsys, "preprocess", *words)[0] == 0
    Path("c.yaml").write_text("model: {preset: tiny-1m}\ndata: {sources: {d_text_document: 1}, seq_len: 32}\n")
    for verb in ("config", "pretrain"):
        code, _, err = call(capsys, verb, "c.yaml")
        assert code == 65 and "--split-text paragraphs" in err and "split 'valid'" in err


# Presets


@pytest.mark.parametrize(("name", "params"), [
    ("tiny-1m", 1.0), ("tiny-7m", 7.0), ("tiny-15m", 15.0), ("tiny-42m", 42.0),
])  # fmt: skip
def test_tiny_presets_have_the_size_in_their_name(name, params):
    model = ModelConfig(preset=name).resolve()
    assert abs(model.num_params() / 1e6 / params - 1) < 0.06
    assert model.num_heads % 2 == 0 and model.num_layers >= 4


def test_presets_are_listed(capsys):
    code, out, _ = call(capsys, "presets")
    assert code == 0 and all(name in out for name in PRESETS)
    rows = json.loads(call(capsys, "presets", "--json")[1])
    assert [row["name"] for row in rows] == list(PRESETS)
    assert all(row["params"] == ModelConfig(preset=row["name"]).resolve().num_params() for row in rows)


def test_errors_of_a_text_that_vanishes(books):
    with pytest.raises(DataError, match="does not exist"):
        from_text.find_files(str(books) + "x")
