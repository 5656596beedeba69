"""Preprocessing at speed: the fast backend proves itself, killed runs go on to the same bytes, shards, formats."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from megallm.base.errors import CannotWrite, DataError, UsageError
from megallm.data.indexed import dataset as indexed
from megallm.data.indexed import meta, split_merge
from megallm.data.indexed.dataset import IndexedDataset
from megallm.data.stream import trace
from megallm.data.text import accelerated, native, partial, preprocess, readers, tokenizer
from megallm.data.text.preprocess import PreprocessConfig

ROOT = Path(__file__).parents[2]
TEXT = "the quick brown fox jumps over the lazy dog, naïve 漢字, don't 1234 and 🙂\n"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "t.jsonl").write_text(json.dumps({"text": TEXT * 30}) + "\n")
    tokenizer.train_bpe([str(folder / "t.jsonl")], 330, str(folder / "tok"), special_tokens=["<|fim_prefix|>"])
    return str(folder / "tok")


def corpus(path: Path, rows: int, seed: int = 0) -> str:
    chance = random.Random(seed)
    words = TEXT.split() + ["\t", "\n\n", "<|endoftext|>", "  ", "é"]
    with path.open("w") as file:
        for number in range(rows):
            if number % 211 == 7:
                file.write('{"text": 1}\n')
            file.write(json.dumps({"text": " ".join(chance.choices(words, k=chance.randint(0, 120)))}) + "\n")
    return str(path)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# The fast backend.


def test_gigatoken_gives_the_same_bytes(tmp_path, bpe):
    pytest.importorskip("gigatoken")
    source = corpus(tmp_path / "a.jsonl", 400)
    for backend in ("gigatoken", "tokenizers"):
        config = PreprocessConfig(
            (source,), str(tmp_path / backend / "o"), bpe, append_eod=True, on_error="skip", backend=backend, workers=2
        )
        assert preprocess.run(config).backend == backend
        side_car = tmp_path / backend / "o_text_document.meta.json"
        made_by = json.loads(side_car.read_text())["tokenizer"].pop("encoded_by")
        assert made_by == [f"{name} {metadata.version(name)}" for name in ("gigatoken", "tokenizers")][-len(made_by) :]
        assert len(made_by) == 1 + (backend == "gigatoken")
    same = [digests(tmp_path / backend) for backend in ("gigatoken", "tokenizers")]
    for found in same:
        found.pop("o_text_document.meta.json")
    assert same[0] == same[1] and {"o.rejects.jsonl", "o_text_document.bin", "o_text_document.idx"} <= same[0].keys()


def test_a_written_special_token_stays_text_in_gigatoken(bpe):
    pytest.importorskip("gigatoken")
    plain = tokenizer.load(bpe)
    fast, name = accelerated.choose_tokenizer(plain, "gigatoken")
    assert name == "gigatoken"
    texts = ["a<|endoftext|>b", "<|fim_prefix|>", "", TEXT * 3]
    ids, lengths = fast.encode_joined(texts)
    assert ids.tolist() == [i for text in texts for i in plain.encode(text)] and plain.eod not in ids
    assert lengths.tolist() == [len(plain.encode(text)) for text in texts]
    careless = importlib.import_module("gigatoken").Tokenizer(str(plain.file))  # the control: what would happen
    assert plain.eod in np.asarray(careless.encode("a<|endoftext|>b"))


def test_a_backend_that_differs_is_not_used(bpe, monkeypatch):
    pytest.importorskip("gigatoken")
    plain, original = tokenizer.load(bpe), accelerated.AcceleratedTokenizer.encode_joined

    def wrong(self, texts):
        ids, lengths = original(self, texts)
        return np.where(ids == plain.encode("é")[-1], 0, ids), lengths

    monkeypatch.setattr(accelerated.AcceleratedTokenizer, "encode_joined", wrong)
    used, name = accelerated.choose_tokenizer(plain, "auto")
    assert used is plain and name.startswith("tokenizers (gigatoken splits")
    with pytest.raises(UsageError, match="--backend gigatoken: gigatoken splits"):
        accelerated.choose_tokenizer(plain, "gigatoken")


def test_without_gigatoken_the_plain_one_is_used(bpe, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    used, name = accelerated.choose_tokenizer(tokenizer.load(bpe), "auto")
    assert isinstance(used, tokenizer.FolderTokenizer) and "not installed" in name


def test_the_cache_of_words_is_dropped(bpe, monkeypatch):
    pytest.importorskip("gigatoken")
    fast, _ = accelerated.choose_tokenizer(tokenizer.load(bpe), "gigatoken")
    monkeypatch.setattr(accelerated, "_LOOK_BYTES", 1000)
    monkeypatch.setattr(accelerated, "_resident_bytes", lambda: 10**9)
    for _ in range(60):
        fast.encode_joined([TEXT])
    kept = fast._fast  # a process that does not grow
    monkeypatch.setattr(fast, "_small", 0)
    fast.encode_joined([TEXT] * 20)
    fast.encode_joined([TEXT])
    assert fast._fast is not kept
    monkeypatch.setattr(accelerated, "_GROWN_BYTES", -1)
    made = [fast._fast]
    for _ in range(60):
        fast.encode_joined([TEXT])
        made += [fast._fast] * (fast._fast is not made[-1])
    assert 3 <= len(made) <= 8


@pytest.mark.parametrize("line", [
    b'{"text": "a", "n": ' + b"9" * 5000 + b"}", b'{"text": "a", "n": NaN}', b'{"text": "\\ud800"}',
    b'{"text": "a\xff"}',
    b'{"text": "a\x01"}', b'{"text": "a"} x', b'{"text": "a", "text": "b"}', b"\xc2\xa0", b"[1]", b'{"text": ["a"]}',
    b'{"text": "\xed\xa0\x80"}', b'{"text": 1' + b"0" * 400 + b"}", b'{"a": 1e999, "text": "x"}',
    b'{"text": "\\u0000\\/"}',
])  # fmt: skip
def test_the_fast_json_reader_changes_no_verdict(line, monkeypatch):
    pytest.importorskip("orjson")
    chunk = readers.Chunk("x", "jsonl", 0, len(line), line + b"\n" + b'{"text": "good"}\n')
    with_it = readers.parse_chunk(chunk, readers.ReadOptions())
    monkeypatch.setattr(readers, "fast_loads", lambda: None)
    assert readers.parse_chunk(chunk, readers.ReadOptions()) == with_it


# Resuming.

RUN = """
import json, sys, time
from megallm.data.text import preprocess
preprocess._SAVE_SECONDS = 0.0
readers = preprocess.readers
readers.CHUNK_BYTES = 2000
config = json.loads(sys.argv[1])
config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
def slow(stats):
    print(stats.lines, flush=True)
    time.sleep(float(sys.argv[2]))
stats = preprocess.run(preprocess.PreprocessConfig(**config), slow)
print("finished", stats.resumed, flush=True)
"""


def start(config: dict, pause: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, json.dumps(config), str(pause)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_killed_runs_go_on_to_the_same_bytes(tmp_path):
    """FAULTS row 70: kill -9 of the whole run four times and of a worker once, then one quiet end."""
    inputs = [corpus(tmp_path / f"{name}.jsonl", rows, rows) for name, rows in (("a", 160), ("b", 5), ("c", 120))]
    Path(inputs[2]).write_bytes(Path(inputs[2]).read_bytes()[:-1])
    common = {"inputs": inputs, "tokenizer": "bytes", "append_eod": True, "on_error": "skip"}
    quiet = start({**common, "output": str(tmp_path / "quiet" / "o")}, 0)
    assert "finished 0" in quiet.communicate(timeout=60)[0]
    config = {**common, "output": str(tmp_path / "killed" / "o"), "workers": 2}
    chance, seen = random.Random(3), []
    for attempt in range(5):
        process = start(config, 0.02)
        for _ in range(chance.randint(2, 5)):
            seen.append(int(process.stdout.readline()))
        if attempt == 2:
            child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
            os.kill(int(child), signal.SIGKILL)
            assert process.wait(30) != 0
        else:
            process.kill()
            process.wait(30)
        process.stdout.close()
        assert [path.name for path in (tmp_path / "killed").iterdir()] == ["o.partial"]
    process = start(config, 0)
    resumed = int(process.communicate(timeout=60)[0].split("finished ")[1])
    assert resumed > 4 and seen == sorted(seen), "nothing was taken up"
    assert digests(tmp_path / "killed") == digests(tmp_path / "quiet")


class Killed(BaseException):
    """What no code of ours catches."""


def test_a_kill_while_publishing_is_finished_by_the_same_command(tmp_path, monkeypatch):
    """At each renaming, before and after it: two keys, rejected lines, six files with final names."""
    rows = [json.dumps({"a": "x" * i, "b": "y" * (i % 7)}) for i in range(40)]
    (tmp_path / "in.jsonl").write_text("\n".join([*rows, "{"]) + "\n")
    monkeypatch.setattr(preprocess, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 500)
    replace, renamed = os.replace, []

    def run(name, last=10**6, after=False):
        def counted(source, target, **options):
            renamed.append(target)
            if len(renamed) == last and not after:
                raise Killed
            replace(source, target, **options)
            if len(renamed) == last:
                raise Killed

        renamed.clear()
        monkeypatch.setattr(os, "replace", counted)
        (tmp_path / name).mkdir(exist_ok=True)
        return preprocess.run(
            PreprocessConfig(
                (str(tmp_path / "in.jsonl"),), str(tmp_path / name / "o"), "bytes", ("a", "b"), on_error="skip"
            )
        )

    stats = run("quiet")
    total = len(renamed)
    assert total > 10
    for last in range(1, total + 1):
        for after in (False, True):
            with pytest.raises(Killed):
                run(f"{last}{after}", last, after)
            found = run(f"{last}{after}")
            assert (found.documents, found.tokens, found.rejected) == (stats.documents, stats.tokens, 1)
            assert digests(tmp_path / f"{last}{after}") == digests(tmp_path / "quiet")


def test_other_work_in_progress_is_thrown_away(tmp_path):
    source = corpus(tmp_path / "a.jsonl", 120)
    config = {"inputs": [source], "output": str(tmp_path / "out" / "o"), "tokenizer": "bytes", "on_error": "skip"}
    process = start(config, 0.05)
    process.stdout.readline()
    process.stdout.readline()
    process.kill()
    process.wait(30)
    process.stdout.close()
    again = PreprocessConfig((source,), config["output"], "bytes", append_eod=True, on_error="skip")
    assert preprocess.run(again).resumed == 0
    other = PreprocessConfig((source,), str(tmp_path / "new" / "o"), "bytes", append_eod=True, on_error="skip")
    preprocess.run(other)
    assert digests(tmp_path / "out") == digests(tmp_path / "new")


def test_one_output_has_one_writer(tmp_path):
    with partial.PartialOutput(str(tmp_path / "o"), 1), pytest.raises(CannotWrite, match="in use by another process"):
        partial.PartialOutput(str(tmp_path / "o"), 1)


def test_temporaries_of_dead_writers_are_swept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {"o_x.bin.tmp-%d-aa": dead.pid, "o_x.idx.tmp-%d-bb": os.getpid(), "other.tmp-%d-cc": dead.pid}
    for name, pid in names.items():
        (tmp_path / (name % pid)).write_text("x")
        os.utime(tmp_path / (name % pid), (0, time.time() - 7200))
    (tmp_path / f"o_y.bin.tmp-{dead.pid}-dd").write_text("fresh")
    assert partial.remove_stale_outputs(str(tmp_path / "o")) == [f"o_x.bin.tmp-{dead.pid}-aa"]


# Rejects, shards, origins.


def test_too_many_rejects_are_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\nbad\n' * 10)
    config = {"inputs": (str(path),), "output": str(tmp_path / "out" / "o"), "tokenizer": "bytes", "on_error": "skip"}
    with pytest.raises(DataError, match="10 of 20 lines were rejected, more than --max-reject-percent 40"):
        preprocess.run(PreprocessConfig(**config, max_reject_percent=40))
    assert not list((tmp_path / "out").iterdir())
    assert preprocess.run(PreprocessConfig(**config, max_reject_percent=50)).rejected == 10


def test_shards_hold_whole_files_and_merge_to_the_whole(tmp_path):
    inputs = tuple(corpus(tmp_path / f"{i}.jsonl", rows, i) for i, rows in enumerate((50, 5, 80, 10, 3)))
    config = PreprocessConfig(inputs, str(tmp_path / "o"), "bytes", on_error="skip")
    assert [len(group) for group in preprocess.divide(inputs, 3)] == [1, 2, 2]
    assert sum(preprocess.divide(inputs, 5), ()) == inputs
    preprocess.run_shards(config, 3)
    preprocess.run(config)
    shards = [f"{tmp_path}/o-{i:05d}-of-00003_text_document" for i in range(3)]
    indexed.merge_datasets(shards, tmp_path / "merged")
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"merged.{suffix}").read_bytes() == (tmp_path / f"o_text_document.{suffix}").read_bytes()
    before = digests(tmp_path)
    preprocess.run_shards(config, 3, only=1)
    assert digests(tmp_path) == before
    for shards, only in ((6, None), (3, 3)):
        with pytest.raises(UsageError, match="--shard"):
            preprocess.run_shards(config, shards, only)


def test_every_document_knows_its_line(tmp_path):
    inputs = tuple(corpus(tmp_path / f"{i}.jsonl", 300, i) for i in range(2))
    Path(inputs[0]).write_text("\n" + Path(inputs[0]).read_text())
    prefix = str(tmp_path / "o_text_document")
    preprocess.run(PreprocessConfig(inputs, str(tmp_path / "o"), "bytes", on_error="skip"))
    lines = {name: Path(name).read_text().split("\n") for name in inputs}
    data = IndexedDataset(prefix)
    places = trace.places(prefix, range(data.num_documents))
    for document, place in enumerate(places):
        text = json.loads(lines[place["file"]][place["line"] - 1])["text"]
        assert text.encode() == bytes(data.document(document).tolist())
    assert len({(place["file"], place["line"]) for place in places}) == len(places) == 600 and places[0]["line"] == 2
    assert len(meta.read_meta(prefix)["origins"]["runs"]) < 12


def test_split_and_stats(tmp_path):
    source = corpus(tmp_path / "a.jsonl", 500)
    preprocess.run(PreprocessConfig((source,), str(tmp_path / "o"), "bytes", on_error="skip"))
    prefix = str(tmp_path / "o_text_document")
    whole, texts = IndexedDataset(prefix), []
    for seed in (None, 4):
        parts = split_merge.split_dataset(prefix, str(tmp_path / f"s{seed}"), [80, 15, 5], seed)
        assert sum(part["documents"] for part in parts) == 500
        assert abs(parts[0]["documents"] - 400) <= (0 if seed is None else 40)
        found = [
            tuple(data.document(i).tolist())
            for data in (IndexedDataset(part["prefix"]) for part in parts) for i in range(data.num_documents)
        ]  # fmt: skip
        texts.append(found)
        assert sorted(found) == sorted(tuple(whole.document(i).tolist()) for i in range(500))
        assert meta.read_meta(parts[1]["prefix"])["tokenizer"] == meta.read_meta(prefix)["tokenizer"]
    assert texts[0] != texts[1]
    figures = split_merge.stats(prefix, 512)
    lengths = [len(whole.document(i)) for i in range(500)]
    assert figures["longest"] == max(lengths) and figures["tokens"] == sum(lengths)
    assert figures["empty_documents"] == lengths.count(0) and 0.9 < figures["best_fit_fill"] <= 1
    with pytest.raises(UsageError, match="--shares 0,0"):
        split_merge.parse_shares("0,0")


def test_lines_are_known_after_merging_and_splitting(tmp_path):
    """Documents of two files with rejected lines among them, merged, split at random, and merged again."""
    files = [corpus(tmp_path / f"{name}.jsonl", rows, rows) for name, rows in (("a", 90), ("b", 40))]
    for name in "ab":
        config = PreprocessConfig((f"{tmp_path}/{name}.jsonl",), f"{tmp_path}/{name}", "bytes", on_error="skip")
        assert preprocess.run(config).rejected
    prefix = {name: f"{tmp_path}/{name}_text_document" for name in "ab"}
    indexed.merge_datasets([prefix["a"], prefix["b"], prefix["a"]], tmp_path / "all")
    parts = [
        part["prefix"]
        for part in split_merge.split_dataset(tmp_path / "all", str(tmp_path / "part"), [1, 1, 0], seed=3)
    ]
    indexed.merge_datasets(parts, tmp_path / "again")
    lines = {name: Path(name).read_text().splitlines() for name in files}
    for made in (tmp_path / "all", *parts, tmp_path / "again"):
        data = IndexedDataset(made)
        for document, place in enumerate(trace.places(str(made), range(data.num_documents))):
            text = json.loads(lines[place["file"]][place["line"] - 1])["text"]
            assert bytes(data.document(document).tolist()).decode() == text
    Path(f"{prefix['b']}.meta.json").unlink()
    indexed.merge_datasets([prefix["a"], prefix["b"]], tmp_path / "half")
    assert trace.places(str(tmp_path / "half"), [0]) == [None]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_raw_lines_are_found_in_files_of_any_kind(tmp_path, suffix):
    """Ids that users gave may repeat, so file and line of the raw document count too."""
    curated = [{"id": "x", "text": f"{i}", "file": "raw.jsonl", "line": i} for i in range(1, 9)]
    path, text = tmp_path / f"kept{suffix}", "".join(json.dumps(row) + "\n" for row in curated)
    if suffix == ".parquet":
        parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        parquet.write_table(pyarrow.Table.from_pylist(curated), path)
    else:
        library = {"": None, "gz": "gzip", "zst": "zstandard"}[suffix[7:]]
        opened = open if library is None else pytest.importorskip(library).open
        with opened(path, "wt") as file:
            file.write(text)
    ledger = [{"id": "x", "file": "raw.jsonl", "line": i, "action": "keep"} for i in range(1, 9)]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ledger))
    places = [{"file": str(path), "line": line} for line in (5, 2, 99)] + [{"file": "absent", "line": 1}]
    raw = trace.raw_places(places)
    assert raw == {(str(path), line): ("x", ("raw.jsonl", line)) for line in (2, 5)}
    rows = trace.ledger_rows(str(tmp_path / "ledger.jsonl"), raw.values())
    assert [rows[raw[str(path), line]]["line"] for line in (5, 2)] == [5, 2]
    (tmp_path / "ledger.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(DataError, match="ledger.jsonl:1: not a row"):
        trace.ledger_rows(str(tmp_path / "ledger.jsonl"), raw.values())


# Other formats of tokenizers.


def test_sentencepiece(tmp_path):
    library = pytest.importorskip("sentencepiece")
    (tmp_path / "t.txt").write_text(TEXT * 50)
    library.SentencePieceTrainer.train(
        input=str(tmp_path / "t.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=340, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    one = tokenizer.load(str(tmp_path))
    reference = library.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert isinstance(one, native.SentencePieceTokenizer) and one.vocab_size == 340 and one.eod == reference.eos_id()
    assert one.encode(TEXT) == reference.encode(TEXT) and one.decode(one.encode("the fox")) == "the fox"
    assert one.eod not in one.encode("a</s>b") and one.token_id("</s>") == one.eod and one.token_id("<no>") is None
    assert one.specials == {one.token_id(name) for name in ("<unk>", "<s>", "</s>")}
    source = corpus(tmp_path / "a.jsonl", 30)
    config = PreprocessConfig((source,), str(tmp_path / "o"), str(tmp_path), append_eod=True, on_error="skip")
    assert preprocess.run(config).backend == "sentencepiece"
    data = IndexedDataset(tmp_path / "o_text_document")
    last = json.loads(Path(source).read_text().splitlines()[-1])["text"]
    assert data.document(29).tolist() == ([*reference.encode(last), one.eod] if last else [])
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        tokenizer.load(str(tmp_path))


def test_tiktoken_ranks(tmp_path):
    library = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" the": 258}
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    (tmp_path / "mine.tiktoken").write_bytes(lines)
    with pytest.raises(UsageError, match="write mine.json beside it"):
        tokenizer.load(str(tmp_path / "mine.tiktoken"))
    rules = {"pattern": native.KNOWN["gpt2"][0], "special_tokens": {"<|endoftext|>": 300, "<|mask|>": 299}}
    (tmp_path / "mine.json").write_text(json.dumps(rules))
    one = tokenizer.load(str(tmp_path / "mine.tiktoken"))
    assert one.encode("the the") == [257, 258] and (one.eod, one.vocab_size) == (300, 301)
    assert 300 not in one.encode("a<|endoftext|>b") and 300 in one.encode("a<|endoftext|>b", special=True)
    assert one.decode(one.encode(TEXT)) == TEXT and one.token_id("<|endoftext|>") == 300
    assert one.specials == {299, 300}
    (tmp_path / "gpt2.tiktoken").write_bytes(lines)
    known = tokenizer.load(str(tmp_path / "gpt2.tiktoken"))
    assert known.eod == 50256 and known.fingerprint != one.fingerprint
    (tmp_path / "mine.tiktoken").write_bytes(b"IQ== 0\nnot base64\n")
    with pytest.raises(DataError, match="mine.tiktoken:2: want a base64 token"):
        tokenizer.load(str(tmp_path / "mine.tiktoken"))
    public = importlib.import_module("tiktoken_ext.openai_public")
    assert public.r50k_pat_str == native.KNOWN["r50k_base"][0] and library.__version__


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base", "p50k_base"])
def test_known_encodings_have_the_published_rules(name, monkeypatch):
    pytest.importorskip("tiktoken")
    public = importlib.import_module("tiktoken_ext.openai_public")
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {})
    rules = getattr(public, name)()
    assert (rules["pat_str"], rules["special_tokens"]) == native.KNOWN[name]
