"""What nobody vouches for stays within bounds (issue R, item 18): bombs of 21 GB, files cut off under a run."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megallm.base.errors import DataError
from megallm.data.batches import MegatronReader, Share, StreamReader
from megallm.data.indexed import openfile
from megallm.data.indexed.dataset import IndexedDataset, IndexedWriter, verify_dataset
from megallm.data.stream.plan import Reading, StreamPlan, StreamSegment
from megallm.data.stream.source import DocumentSource
from megallm.data.stream.stream import Stream
from megallm.data.text import definition, tokenizer
from megallm.data.text.byte_level import BYTE_SYMBOLS
from tests.data.megatron_cases import build_split

ROOT = Path(__file__).parents[2]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def sound(**parts) -> dict:
    vocab = {symbol: i for i, symbol in enumerate(BYTE_SYMBOLS)}
    return {
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None,
        "decoder": None, "model": {"type": "BPE", "vocab": vocab, "merges": []}, **parts,
    }  # fmt: skip


def replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def template(parts: int, ids: int) -> dict:
    special = {"S": {"id": "S", "ids": [1] * ids, "tokens": ["S"] * ids}}
    single = [{"SpecialToken": {"id": "S", "type_id": 0}}] * parts
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}


def charsmap(longest: int) -> str:
    return base64.b64encode((4).to_bytes(4, "little") + bytes(4) + b"ab\0" + b"x" * longest + b"\0").decode()


def unigram(tokens: int, length: int) -> dict:
    chance = np.random.RandomState(1)
    return {"type": "Unigram", "unk_id": 0, "vocab": [[chance.bytes(length // 2).hex(), -1.0] for _ in range(tokens)]}


BOMBS = {
    "an id of four billion": lambda: sound(added_tokens=[{**FLAGS, "content": "x", "id": 2**32 - 1}]),
    "an id of the vocabulary of two billion": lambda: sound(model={"type": "BPE", "vocab": {"a": 2**31}, "merges": []}),
    "an id that is a fraction": lambda: sound(model={"type": "BPE", "vocab": {"a": 0.5}, "merges": []}),
    "repeats that are multiplied": lambda: sound(pre_tokenizer=split(r"((\p{L}{1000}){1000}){1000}")),
    "open repeats": lambda: sound(pre_tokenizer=split(r"((x{900,}){900,}){900,}")),
    "a pattern to replace": lambda: sound(normalizer=replace({"Regex": "((x{0,999}){0,999}){0,999}"}, "")),
    "forty doublings": lambda: sound(normalizer={
        "type": "Sequence", "normalizers": [replace({"String": "a"}, "aa")] * 40}),
    "nested sequences": lambda: sound(normalizer={"type": "Sequence", "normalizers": [
        {"type": "Sequence", "normalizers": [replace({"String": "a"}, "aaaa")] * 4}] * 4}),
    "a long replacement": lambda: sound(normalizer=replace({"String": "a"}, "x" * 100_000)),
    "a long prefix": lambda: sound(normalizer={"type": "Prepend", "prepend": "x" * 10_000_000}),
    "a table of long replacements": lambda: sound(normalizer={
        "type": "Precompiled", "precompiled_charsmap": charsmap(10**6)}),
    "a hundred thousand steps": lambda: sound(pre_tokenizer={
        "type": "Sequence", "pretokenizers": [split("a")] * 100_000}),
    "a template of a million": lambda: sound(post_processor=template(1000, 1000)),
    "a tree of random tokens": lambda: sound(model=unigram(5000, 6000)),
    "one endless token": lambda: sound(model=unigram(1, 10**6)),
    "many added tokens": lambda: sound(added_tokens=[{**FLAGS, "content": f"{i}", "id": i} for i in range(200_000)]),
    "long added tokens": lambda: sound(added_tokens=[{**FLAGS, "content": f"{i}" * 10**5, "id": i} for i in range(20)]),
    "ten million lists": lambda: b'{"a":[' + b"[]," * 10_000_000 + b"[]]}",
    "deep": lambda: b'{"a":' + b"[" * 1_000_000,
    "model that is a list": lambda: sound(model=[1, 2]),
    "tokens that are numbers": lambda: sound(added_tokens=[1, 2, 3]),
}  # fmt: skip

TRY = """
import json, resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
from megallm.base.errors import DataError
from megallm.data.text import tokenizer
for path in sys.argv[1:]:
    open("/proc/self/clear_refs", "w").write("5")
    try:
        tokenizer.load(path)
        verdict = "loaded"
    except DataError as error:
        verdict = str(error)
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
    print(json.dumps([Path(path).stem, verdict[:300], int(peak) >> 10]), flush=True)
"""


def tried(paths) -> dict[str, tuple[str, int]]:
    """(what loading said, peak MiB) of each file, in one process."""
    found = subprocess.run([sys.executable, "-c", TRY, *map(str, paths)], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    return {name: (verdict, peak) for name, verdict, peak in map(json.loads, found.stdout.splitlines())}


def test_item_18_bombs_are_refused_in_little_memory(tmp_path):
    """They took up to 21 GB."""
    for name, make in BOMBS.items():
        made = make()
        (tmp_path / f"{name}.json").write_bytes(made if isinstance(made, bytes) else json.dumps(made).encode())
    (tmp_path / "too large.json").touch()
    os.truncate(tmp_path / "too large.json", definition.MAX_BYTES + 1)
    found = tried(sorted(tmp_path.iterdir()))
    assert set(found) == {*BOMBS, "too large"}
    assert {name: row for name, row in found.items() if row[0] == "loaded" or row[1] > 700} == {}
    assert all(f"{name}.json" in verdict for name, (verdict, _) in found.items())


def test_item_18_what_published_tokenizers_hold_is_no_bomb(tmp_path):
    """Their largest parts: Gemma's 256,000 tokens and 580,000 merges, added tokens, a table of characters."""
    vocab = {symbol: i for i, symbol in enumerate(BYTE_SYMBOLS)}
    vocab |= {f"token{i}": len(vocab) + i for i in range(256_000)}
    large = sound(
        model={"type": "BPE", "vocab": vocab, "merges": [[f"token{i % 999}", f"t{i}"] for i in range(580_000)]}
    )
    large["added_tokens"] = [{**FLAGS, "content": f"<unused{i}>", "id": len(vocab) + i} for i in range(6000)]
    albert = [replace({"String": "``"}, '"'), replace({"String": "''"}, '"'), {"type": "NFKD"},
              {"type": "StripAccents"}, {"type": "Lowercase"},
              {"type": "Precompiled", "precompiled_charsmap": charsmap(18)},
              replace({"Regex": " {2,}"}, " ")]  # fmt: skip
    deepseek = [
        split(r"\p{N}{1,3}"),
        split("[一-龥ぁ-ゟ゠-ヿ]+"),
        split(r"[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+"),
    ]
    for found in (
        large, sound(normalizer={"type": "Sequence", "normalizers": albert}),
        sound(normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                                                              replace({"String": " "}, "▁")]}),
        sound(pre_tokenizer={"type": "Sequence", "pretokenizers": deepseek}), sound(post_processor=template(2, 1)),
        sound(model={"type": "Unigram", "vocab": [[f"piece{i}", -1.0] for i in range(250_000)]}),
    ):  # fmt: skip
        (tmp_path / "t.json").write_text(json.dumps(found))
        assert definition.read_definition(tmp_path / "t.json")[0] == found


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_item_18_a_tokenizer_that_is_no_file(tmp_path, kind):
    path = tmp_path / "t.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        (path / "tokenizer.json").mkdir(parents=True)
    with pytest.raises(DataError, match=r"t\.json"):
        tokenizer.load(str(path))


@pytest.mark.parametrize(
    "content", [{"special_tokens": {"<|endoftext|>": 2**40}, "pattern": "a"}, {"pattern": "a"}, [1]]
)
def test_item_18_tiktoken_files_have_bounds_too(tmp_path, content):
    pytest.importorskip("tiktoken")
    (tmp_path / "x.tiktoken").write_bytes(base64.b64encode(b"a") + b" 0\n")
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="x.json"):
        tokenizer.load(str(tmp_path / "x.tiktoken"))
    (tmp_path / "gpt2.tiktoken").write_bytes(base64.b64encode(b"a") + b" 9999999999\n")
    with pytest.raises(DataError, match="gpt2.tiktoken:1"):
        tokenizer.load(str(tmp_path / "gpt2.tiktoken"))


# Files that are cut off while they are in use.


@pytest.fixture
def prefix(tmp_path) -> str:
    name, lengths = str(tmp_path / "d"), np.full(400, 50, np.int32)
    with IndexedWriter(name, np.dtype("<u2")) as writer:
        writer.add(np.arange(lengths.sum()) % 500, lengths)
        writer.commit()
    return name


def test_item_18_a_bin_cut_off_under_a_run_is_named(prefix):
    """It was SIGBUS, in all readers: one sample, a stream, a check of all tokens."""
    data, share = IndexedDataset(prefix), Share(8, 8)
    plan = StreamPlan((StreamSegment(0, {prefix: 1.0}, Reading(64)),), 1)
    stream = StreamReader(Stream(plan, {prefix: DocumentSource(prefix, plan, 500)}), share, 1)
    megatron = MegatronReader(build_split({prefix: 1.0}, "100,0,0", "train", 100, 64, 1, 500), share)
    assert stream.batches(1) and megatron.batches(1)
    os.truncate(f"{prefix}.bin", 4096)
    for read in (lambda: [stream.batches(step) for step in (2, 3)], lambda: [megatron.batches(i) for i in (2, 3)],
                 lambda: data.document(399), lambda: data.get(399), lambda: data.tokens(0, 20_000)):  # fmt: skip
        with pytest.raises(DataError, match=r"d\.bin was cut off at byte 4096 while it was in use: it had 40000 bytes"):
            read()
    assert data.document(3).tolist() == list(range(150, 200))  # what is left is read
    with pytest.raises(DataError, match=r"d\.bin"):
        verify_dataset(prefix)


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_item_18_an_idx_cut_off_under_a_run(prefix, monkeypatch, limit):
    """A small index is in memory and stays good; a large one is mapped, and looked at before each use."""
    monkeypatch.setattr(openfile, "_IN_MEMORY", limit)
    data = IndexedDataset(prefix)
    assert data.document(7).tolist() == list(range(350, 400))
    os.truncate(f"{prefix}.idx", 100)
    for read in (lambda: data.lengths.sum(), lambda: data.document(390), lambda: data.get(390)):
        if limit:
            read()
            continue
        with pytest.raises(DataError, match=r"d\.idx was cut off at byte 100"):
            read()


def test_item_18_a_file_that_is_replaced_by_renaming_stays_readable(prefix, tmp_path):
    data = IndexedDataset(prefix)
    for suffix in ("bin", "idx"):
        (tmp_path / "new").write_bytes(b"")
        os.replace(tmp_path / "new", f"{prefix}.{suffix}")
    assert data.document(399)[0] == 399 * 50 % 500
