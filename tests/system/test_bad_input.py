"""Bad input ends a real command with one sentence that names the place, the right exit code, and nothing written."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from megallm.checkpoint.manifest import MANIFEST
from tests.system.commands import TINY, Done, listing, make_corpus, megallm, start, write_config

USAGE, DATA, UNWRITABLE, CHECKPOINT = 2, 65, 73, 74
SECONDS = 60.0  # a hang, not slowness, is what this would catch on a busy machine


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def copied(tmp_path, corpus) -> Path:
    """A copy of the corpus that a test may damage; the prefix."""
    for suffix in (".bin", ".idx", ".meta.json"):
        shutil.copy(corpus + suffix, tmp_path / f"d{suffix}")
    return tmp_path / "d"


def refused(folder: Path, code: int, *words: str | Path, names: tuple[str, ...], keeps: tuple[str, ...] = ()) -> Done:
    """The command ends with `code` and a sentence that has all of `names`; the folder is as it was before.

    `keeps` are folders that may appear with logs in them, and nothing else.
    """
    before = listing(folder)
    done = megallm(*words, cwd=folder, timeout=SECONDS)
    assert done.code == code, f"exit {done.code}:\n{done.out}\n{done.err}"
    lines = [line for line in done.err.splitlines() if line.startswith("megallm: error: ")]
    assert lines and "Traceback" not in done.err, done.err
    sentence = done.err[done.err.index(lines[-1]) :]
    for name in names:
        assert name in sentence, f"{name!r} is not in: {sentence}"
    after = listing(folder)
    new = {name for name in after if after[name] != before.get(name) and not name.startswith(keeps or ("\0",))}
    assert not new and not before.keys() - after.keys(), f"left behind: {new}"
    return done


# --- text ----------------------------------------------------------------------------------------------------------

GOOD = b'{"text": "in the beginning"}\n'
TEXTS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "malformed JSON": (GOOD + b'{"text": "was the word"\n', ("text.jsonl:2", "JSON")),
    "a missing key": (GOOD * 2 + b'{"body": "was the word"}\n', ("text.jsonl:3", "text", "body")),
    "another type": (GOOD + b'{"text": 7}\n', ("text.jsonl:2", "text")),
    "no object": (GOOD + b'["text"]\n', ("text.jsonl:2",)),
    "invalid UTF-8": (GOOD + b'{"text": "\xff\xfe"}\n', ("text.jsonl:2", "UTF-8")),
    "no text at all": (b"", ("text.jsonl", "no usable text")),
    "empty texts": (b'{"text": ""}\n' * 5, ("text.jsonl", "no usable text", "5 documents")),
}


@pytest.mark.parametrize("what", TEXTS)
def test_text_that_cannot_be_read(tmp_path, what):
    content, names = TEXTS[what]
    (tmp_path / "text.jsonl").write_bytes(content)
    refused(
        tmp_path, DATA, "preprocess", "--input", "text.jsonl", "--output", "out", "--tokenizer", "bytes", names=names
    )


def test_nesting_that_would_exhaust_the_stack_is_one_bad_line(tmp_path):
    (tmp_path / "text.jsonl").write_bytes(GOOD + b'{"text": ' + b"[" * 200_000 + b"\n")
    words = ("preprocess", "--input", "text.jsonl", "--output", "out", "--tokenizer", "bytes")
    refused(tmp_path, DATA, *words, names=("text.jsonl:2",))


def test_missing_files_and_folders(tmp_path):
    (tmp_path / "text.jsonl").write_bytes(GOOD)
    missing = ("preprocess", "--input", "nowhere.jsonl", "--output", "out", "--tokenizer", "bytes")
    refused(tmp_path, DATA, *missing, names=("nowhere.jsonl",))
    no_tokenizer = ("preprocess", "--input", "text.jsonl", "--output", "out", "--tokenizer", "nowhere")
    assert refused(tmp_path, DATA, *no_tokenizer, names=("nowhere",))
    onto_file = ("preprocess", "--input", "text.jsonl", "--output", "text.jsonl/out", "--tokenizer", "bytes")
    refused(tmp_path, UNWRITABLE, *onto_file, names=("text.jsonl",))


def test_skipping_writes_the_same_lines_to_the_rejects(tmp_path):
    """The control: under --on-error skip the same bad line is no error, and the good ones are there."""
    (tmp_path / "text.jsonl").write_bytes(GOOD + b"{\n" + GOOD)
    words = ("preprocess", "--input", "text.jsonl", "--output", "out", "--tokenizer", "bytes", "--on-error", "skip")
    done = megallm(*words, cwd=tmp_path)
    assert done.code == 0 and json.loads(done.out)["documents"] == 2
    (reject,) = (tmp_path / "out.rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["line"] == 2 and json.loads(reject)["file"] == "text.jsonl"


# --- indexed datasets ----------------------------------------------------------------------------------------------


def cut(path: Path, nbytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-nbytes])


def overwrite(path: Path, at: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


DAMAGES = {
    "truncated .bin": (lambda prefix: cut(prefix.with_suffix(".bin"), 10), ("d.bin",)),
    "truncated .idx": (lambda prefix: cut(prefix.with_suffix(".idx"), 10), ("d.idx", "byte")),
    "bad magic": (lambda prefix: overwrite(prefix.with_suffix(".idx"), 0, b"NOTMEGA"), ("d.idx", "byte 0", "MMIDIDX")),
    "unknown version": (lambda prefix: overwrite(prefix.with_suffix(".idx"), 9, struct.pack("<Q", 7)), ("version 7",)),
    "unknown dtype": (lambda prefix: overwrite(prefix.with_suffix(".idx"), 17, b"\x63"), ("dtype code 99",)),
    "a negative length": (
        lambda prefix: overwrite(prefix.with_suffix(".idx"), 34, struct.pack("<i", -1)),
        ("d.idx", "byte 34"),
    ),
    "no .bin": (lambda prefix: prefix.with_suffix(".bin").unlink(), ("d.bin", "does not exist")),
    "no .idx": (lambda prefix: prefix.with_suffix(".idx").unlink(), ("d.idx", "does not exist")),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_dataset_that_is_damaged_stops_before_any_rank_starts(tmp_path, copied, what):
    damage, names = DAMAGES[what]
    damage(copied)
    config = write_config(tmp_path / "c.yaml", str(copied), layout={"pp": 2})
    done = refused(tmp_path, DATA, "pretrain", config, names=names)
    assert "rank" not in done.err
    refused(tmp_path, DATA, "data", "verify", copied, names=names)


@pytest.mark.parametrize("axis", ["dp", "pp", "tp"])
def test_a_token_outside_the_vocabulary_while_training(tmp_path, copied, axis):
    """The one rank (dp) or all ranks (pp, tp) that read it say where it stands; nobody hangs; nothing is saved."""
    path = copied.with_suffix(".bin")
    tokens = np.frombuffer(path.read_bytes(), "<u2").copy()
    tokens[len(tokens) // 16 :: len(tokens) // 8] = 300  # several, so that one of them is read soon
    path.write_bytes(tokens.tobytes())
    config = write_config(tmp_path / "c.yaml", str(copied), layout={axis: 2}, train={"steps": 2000})
    done = refused(tmp_path, DATA, "pretrain", config, names=("300", str(copied), "document", "257"), keeps=("run/",))
    assert done.seconds < SECONDS
    assert not list((tmp_path / "run").glob("checkpoints/*.tmp-*")) and not (tmp_path / "run" / "LOCK").exists()
    refused(tmp_path, DATA, "data", "verify", copied, "--vocab", "257", names=("300", "document", "position"))
    assert megallm("data", "verify", copied, "--vocab", "301", cwd=tmp_path).code == 0


def test_a_tokenizer_that_is_missing_or_another_one(tmp_path, corpus):
    """Neither is kept in the run folder, where the next attempt would take it for the run's own."""
    config = write_config(tmp_path / "c.yaml", corpus)
    own = ("run/logs/",)
    refused(tmp_path, DATA, "pretrain", config, "data.tokenizer=nowhere", names=("nowhere",), keeps=own)
    (tmp_path / "text.jsonl").write_text('{"text": "in the beginning was the word"}\n' * 20)
    other = ("tokenizer", "train", "--input", "text.jsonl", "--vocab-size", "257", "--output", "other")
    assert megallm(*other, cwd=tmp_path).code == 0
    refused(tmp_path, DATA, "pretrain", config, "data.tokenizer=other", names=("data.tokenizer",), keeps=own)
    assert not list((tmp_path / "run").glob("tokenizer*"))
    shutil.copytree(tmp_path / "other", tmp_path / "run" / "tokenizer")
    own += ("run/events.jsonl", "run/metrics.jsonl", "run/run.yaml", "run/env.json", "run/data.json")
    refused(tmp_path, USAGE, "pretrain", config, names=("run/tokenizer", "another tokenizer"), keeps=own)


def test_a_split_without_documents(tmp_path, corpus):
    config = write_config(tmp_path / "c.yaml", corpus, data={"split": "0,100,0"})
    refused(tmp_path, USAGE, "pretrain", config, names=("data.split", "0,100,0"))


# --- configuration and layout --------------------------------------------------------------------------------------

YAMLS = {
    "a typo": ("model: {num_layer: 2}\n", ("c.yaml:1", "num_layer", "num_layers")),
    "a typo in a section": ("\ntrian: {steps: 2}\n", ("c.yaml:2", "trian", "train")),
    "a duplicate key": ("train:\n  steps: 2\n  global_batch: 4\n  steps: 3\n", ("c.yaml:4", "steps")),
    "another type": ("train:\n  steps: many\n", ("c.yaml:2", "train.steps", "many")),
    "no YAML": ("train: {steps: 2\n", ("c.yaml",)),
    "another choice": ("train: {precision: fp31}\n", ("c.yaml:1", "fp31", "fp32")),
    "a tag": ("train: !!python/object/apply:os.system ['true']\n", ("c.yaml:1",)),
}


@pytest.mark.parametrize("what", YAMLS)
def test_a_configuration_that_cannot_be_read(tmp_path, what):
    text, names = YAMLS[what]
    (tmp_path / "c.yaml").write_text(text)
    done = refused(tmp_path, USAGE, "pretrain", "c.yaml", names=names)
    assert done.seconds < 10


def test_all_mistakes_are_told_at_once(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {num_layer: 2}\ntrain:\n  step: 3\n  precision: fp31\n")
    refused(tmp_path, USAGE, "pretrain", "c.yaml", names=("c.yaml:1", "c.yaml:3", "c.yaml:4"))


LAYOUTS = {
    "heads": (["layout.tp=3"], ("layout.tp", "3", "num_heads", "4")),
    "layers": (["layout.pp=3"], ("layout.pp", "3", "num_layers", "2")),
    "batch": (["layout.dp=3"], ("global_batch", "4", "3")),
    "sequence": (["layout.tp=2", "layout.sp=true", "data.seq_len=33"], ("data.seq_len", "33", "2")),
    "world": (["layout.tp=2", "--nproc", "3"], ("3", "2")),
    "vocabulary": (["model.vocab_size=100"], ("vocab_size", "100", "257")),
    "zero": (["layout.tp=0"], ("layout.tp", "0")),
}


@pytest.mark.parametrize("what", LAYOUTS)
def test_a_layout_that_is_impossible_is_refused_before_any_process_starts(tmp_path, corpus, what):
    words, names = LAYOUTS[what]
    config = write_config(tmp_path / "c.yaml", corpus)
    done = refused(tmp_path, USAGE, "pretrain", config, *words, names=names)
    assert done.seconds < 10


def test_the_configuration_of_these_tests_is_good(tmp_path, corpus):
    """The control: what all of them damage is accepted as it is."""
    assert set(TINY) > {"run", "model", "data", "train"}
    done = megallm("config", write_config(tmp_path / "c.yaml", corpus), cwd=tmp_path)
    assert done.code == 0, done.err


# --- run folders and checkpoints -----------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_checkpoint(tmp_path, corpus):
    """Whatever reads the damaged piece says which file, and nothing is written in its place."""
    config = write_config(tmp_path / "c.yaml", corpus, layout={"tp": 2}, train={"steps": 9}, checkpoint={"every": 0})
    done = megallm("pretrain", config, "train.stop_at=2", cwd=tmp_path)
    assert done.code == 0, done.err
    step = tmp_path / "run" / "checkpoints" / "step-00000002"
    victim = step / "weights-00001.safetensors"
    at = victim.stat().st_size - 100
    overwrite(victim, at, bytes([victim.read_bytes()[at] ^ 4]))
    own = ("run/logs/", "run/events.jsonl", "run/run.yaml", "run/env.json")  # of the attempt, not of the state
    for words in (
        ("pretrain", config),
        ("ckpt", "verify", "run"),
        ("ckpt", "dump", "run", "--output", "d.safetensors"),
    ):
        refused(tmp_path, CHECKPOINT, *words, names=(victim.name,), keeps=own)
    (step / MANIFEST).write_text((step / MANIFEST).read_text()[:-50])
    refused(tmp_path, CHECKPOINT, "pretrain", config, names=("step-00000002", MANIFEST), keeps=own)
    refused(tmp_path, CHECKPOINT, "ckpt", "show", step, names=(MANIFEST,))


def test_two_jobs_in_one_run_folder(tmp_path, corpus):
    """The second is refused with the name of the first, which goes on."""
    config = write_config(tmp_path / "c.yaml", corpus, layout={"pp": 2}, train={"steps": 5000})
    first = start("pretrain", config, cwd=tmp_path, imported=True)
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert first.running, first.output.read_text()
        second = megallm("pretrain", config, cwd=tmp_path, timeout=SECONDS)
        assert second.code == UNWRITABLE and "is held by host" in second.err, second.err
        assert first.running
    finally:
        first.kill_all()
        first.wait()
