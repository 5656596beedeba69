"""Preprocessing: every bad line named or counted, the same bytes from any number of workers, never half a file."""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.base.errors import CannotWrite, DataError, InternalError, UsageError
from megallm.base.version import VERSION
from megallm.data.indexed import dataset as indexed
from megallm.data.indexed import meta, split_merge
from megallm.data.indexed.dataset import IndexedDataset, verify_dataset
from megallm.data.text import preprocess, readers, tokenizer
from megallm.data.text.preprocess import PreprocessConfig
from megallm.data.text.readers import ReadOptions

EOD = 256


@pytest.fixture
def work(tmp_path):
    """work(content or lines, name, **options) -> (stats, dataset); outputs live in their own folder."""

    def go(content, name="in.jsonl", **options):
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        config = PreprocessConfig((str(path),), str(tmp_path / "out" / "o"), "bytes", **options)
        return preprocess.run(config), IndexedDataset(tmp_path / "out" / f"o_{config.json_keys[0]}_document")

    return go


def documents(data):
    return [bytes(t for t in data.document(i).tolist() if t != EOD).decode() for i in range(data.num_documents)]


def bert_tokenizer(folder):
    """A tokenizer.json of words whose template is [CLS] text [SEP]."""
    words = {name: i for i, name in enumerate(("[UNK]", "[CLS]", "[SEP]", "one", "two", "three"))}
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    built.add_special_tokens(["[CLS]", "[SEP]"])
    around = [("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])]
    built.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=around)
    folder.mkdir()
    built.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(("eos", "ending"), [(None, []), ("[SEP]", []), ("three", [5])])
def test_the_template_of_the_tokenizer_stands_around_texts(tmp_path, eos, ending):
    """As transformers calls it; an end of the document that the template has already is not put twice."""
    import transformers

    folder, texts = bert_tokenizer(tmp_path / "bert"), ["one two", "", "two [SEP] one", "three"]
    if eos is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = PreprocessConfig(
        (str(source),), str(tmp_path / "o"), str(folder), append_eod=eos is not None, add_special_tokens=True
    )
    preprocess.run(config)
    data = IndexedDataset(tmp_path / "o_text_document")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    wanted = [theirs(text, split_special_tokens=True)["input_ids"] + ending if text else [] for text in texts]
    assert [data.document(i).tolist() for i in range(4)] == wanted and wanted[0] == [1, 3, 4, 2, *ending]
    assert meta.read_meta(tmp_path / "o_text_document")["add_special_tokens"]
    prefix = str(tmp_path / "o_text_document")
    indexed.merge_datasets([prefix, prefix], tmp_path / "all")
    split_merge.split_dataset(prefix, str(tmp_path / "part"), [1, 1], seed=3)
    kept = [meta.read_meta(tmp_path / name) for name in ("all", "part-0")]
    assert all(found["add_special_tokens"] for found in kept)


def test_a_template_is_found_without_a_token_for_an_a(tmp_path):
    path = bert_tokenizer(tmp_path / "dna") / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["model"] = {"type": "BPE", "vocab": {"G": 0, "[CLS]": 1, "[SEP]": 2}, "merges": []}
    path.write_text(json.dumps(definition))
    assert tokenizer.load(str(path)).template == ([1], [2])


def test_a_template_that_puts_nothing_is_refused(work):
    with pytest.raises(UsageError, match="template of bytes puts nothing around a text"):
        work([{"text": "one"}], add_special_tokens=True)


def test_texts_become_documents(work, tmp_path):
    stats, data = work([{"text": "one"}, {"text": ""}, {"text": "zwölf"}], append_eod=True)
    assert [data.document(i).tolist() for i in range(3)] == [[*b"one", EOD], [], [*"zwölf".encode(), EOD]]
    assert (stats.documents, stats.empty, stats.tokens, stats.lines) == (3, {"text": 1}, {"text": 11}, 3)
    side_car = meta.read_meta(tmp_path / "out/o_text_document")
    made_by = side_car["tokenizer"].pop("encoded_by")
    assert made_by == [f"megallm {VERSION}"]
    assert side_car["tokenizer"] == {"kind": "bytes", "fingerprint": "bytes-257", "vocab_size": 257, "eod": EOD}
    assert (side_car["documents"], side_car["sequences"], side_car["tokens"]) == (3, 2, 11)
    assert verify_dataset(tmp_path / "out/o_text_document")["empty_documents"] == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "o_text_document.bin", "o_text_document.idx", "o_text_document.meta.json",
    ]  # fmt: skip


def test_several_keys_make_several_datasets(work, tmp_path):
    stats, data = work([{"q": "why", "a": "so"}, {"q": "", "a": "no"}], json_keys=("q", "a"))
    assert documents(data) == ["why", ""] and stats.tokens == {"q": 3, "a": 4} and stats.empty == {"q": 1, "a": 0}
    assert documents(IndexedDataset(tmp_path / "out/o_a_document")) == ["so", "no"]


BAD = [
    (b'{"text": "a"', "not valid JSON, Expecting ',' delimiter at column 13"),
    (b"hello", "not valid JSON, Expecting value at column 1"),
    (b'["text"]', "the line holds a JSON list, want an object with 'text'"),
    (b"null", "the line holds a JSON null"),
    (b'{"body": "a", "id": 4}', "the key 'text' is missing; the line has 'body', 'id'"),
    (b'{"text": null}', "the value of 'text' is a null, want a string"),
    (b'{"text": 3}', "the value of 'text' is a number, want a string"),
    (b'{"text": ["a"]}', "the value of 'text' is a list, want a string"),
    (b'{"text": "a\xff"}', "invalid UTF-8 at byte 11 of the document"),
    (b'{"text": "\\ud800"}', "the value of 'text' holds a lone surrogate"),
    (b'{"text": ' + b"[" * 100_000, "not usable JSON, it is nested too deeply"),
    (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "not usable JSON, Exceeds the limit"),
    (b'{"text": "' + b"x" * (1 << 20) + b'"}', "the document is longer than 1048576 bytes"),
]


@pytest.mark.parametrize("line, reason", BAD, ids=[row[1][:30] for row in BAD])
def test_bad_line_stops_or_is_skipped(work, tmp_path, line, reason):
    content = b'{"text": "good"}\n\n' + line + b'\n{"text": "last"}\n'
    with pytest.raises(DataError) as caught:
        work(content, max_document_mib=1)
    assert f"in.jsonl:3: {reason}" in str(caught.value)
    assert not list((tmp_path / "out").iterdir())
    stats, data = work(content, max_document_mib=1, on_error="skip")
    assert documents(data) == ["good", "last"] and (stats.rejected, stats.blank, stats.documents) == (1, 1, 2)
    rows = [json.loads(row) for row in (tmp_path / "out/o.rejects.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and rows[0]["line"] == 3 and rows[0]["file"].endswith("in.jsonl")
    assert rows[0]["reason"].startswith(reason)


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n', b"\xef\xbb\xbf"])
def test_no_usable_text_is_an_error(work, tmp_path, content):
    with pytest.raises(DataError, match="no usable text in .*in.jsonl"):
        work(content, append_eod=True)
    assert not list((tmp_path / "out").iterdir())


def test_no_usable_text_names_the_first_rejected_line(work, tmp_path):
    with pytest.raises(DataError, match="first of 2 rejected: .*in.jsonl:1: not valid JSON"):
        work(b"x\ny\n", on_error="skip")
    assert not list((tmp_path / "out").iterdir())


def test_bom_crlf_nul_and_a_missing_last_newline(work):
    content = b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b\\u0000"}\r\n{"text": "c"}'
    assert documents(work(content)[1]) == ["a", "b\0", "c"]


def test_written_end_of_text_is_text(work):
    assert documents(work([{"text": "a<|endoftext|>b"}])[1]) == ["a<|endoftext|>b"]


def test_plain_text_forms(work):
    text = "\nfirst line\nsecond\n\n \t\nthird\n\n\n\nfourth\r\n\r\nfifth\n"
    assert documents(work(text, "in.txt")[1]) == [text]
    lines = ["first line", "second", "third", "fourth", "fifth"]
    assert documents(work(text, "in.txt", split_text="lines")[1]) == lines
    paragraphs = ["first line\nsecond", "third", "fourth", "fifth"]
    assert documents(work(text, "in.txt", split_text="paragraphs")[1]) == paragraphs


def test_plain_text_too_long_says_how_to_split(work):
    big = b"line\n" * 300_000
    with pytest.raises(DataError, match=r"in.txt:1: the document is longer than 1048576 bytes \(--split-text"):
        work(big, "in.txt", max_document_mib=1)
    assert work(big, "in.txt", max_document_mib=1, split_text="lines")[0].documents == 300_000


def test_compressed_files_equal_plain_ones(work):
    zstandard = pytest.importorskip("zstandard")
    rows = "".join(json.dumps({"text": f"row {i} " * 20}) + "\n" for i in range(9000)).encode()
    plain = documents(work(rows)[1])
    assert len(plain) == 9000
    assert documents(work(gzip.compress(rows), "in.jsonl.gz")[1]) == plain
    half = len(rows) // 2
    frames = zstandard.compress(rows[:half]) + zstandard.compress(rows[half:])
    assert documents(work(frames, "in.jsonl.zst")[1]) == plain


def test_damaged_compressed_files_are_named(work):
    zstandard = pytest.importorskip("zstandard")
    rows = json.dumps({"text": "some text " * 50}).encode() + b"\n"
    for name, content in [
        ("a.jsonl.gz", gzip.compress(rows)[:-9]), ("b.jsonl.gz", b"\0not gzip"),
        ("c.jsonl.gz", gzip.compress(rows)[:9]),
        ("a.jsonl.zst", zstandard.compress(rows)[:-5]), ("b.jsonl.zst", b"\xffnot zstd"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            work(content, name)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "three"], "id": [1, 2, 3]}), path)
    config = PreprocessConfig((str(path),), str(tmp_path / "o"), "bytes", on_error="skip")
    stats = preprocess.run(config)
    assert documents(IndexedDataset(tmp_path / "o_text_document")) == ["one", "three"] and stats.rejected == 1
    assert json.loads((tmp_path / "o.rejects.jsonl").read_text())["line"] == 2
    with pytest.raises(DataError, match="no column 'body', only 'text', 'id'"):
        preprocess.run(PreprocessConfig((str(path),), str(tmp_path / "p"), "bytes", json_keys=("body",)))
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="in.parquet"):
        preprocess.run(PreprocessConfig((str(path),), str(tmp_path / "p"), "bytes"))


def test_parquet_that_no_text_can_be(tmp_path):
    """Bytes that are not UTF-8, columns of other types, one name twice: a reject or a sentence."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sizes = pyarrow.py_buffer(np.array([0, 2, 4], "<i4").tobytes())
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, sizes, pyarrow.py_buffer(b"ok\xff\xfe")])
    path, out = tmp_path / "in.parquet", str(tmp_path / "o")
    for column, words in (
        (broken, "text that is not UTF-8"),
        (pyarrow.array(["ok", None]).dictionary_encode(), "null"),
    ):
        parquet.write_table(pyarrow.table({"text": column}), path)
        stats = preprocess.run(PreprocessConfig((str(path),), out, "bytes", on_error="skip"))
        assert documents(IndexedDataset(f"{out}_text_document")) == ["ok"] and stats.rejected == 1
        reject = json.loads(Path(f"{out}.rejects.jsonl").read_text())
        assert reject["line"] == 2 and words in reject["reason"]
    for column, words in (([["a"]], "is a list"), ([5], "is a number"), ([{"a": 1}], "is a object")):
        parquet.write_table(pyarrow.table({"text": column}), path)
        with pytest.raises(DataError, match=words):
            preprocess.run(PreprocessConfig((str(path),), out, "bytes"))
    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(DataError, match="2 columns 'text'"):
        preprocess.run(PreprocessConfig((str(path),), out, "bytes"))


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_parquet_bomb_takes_bounded_memory(tmp_path, dictionary):
    """600 MB of text in some kB: a dictionary's value is held once; what is unpacked for real is refused."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array(["a b " * (1 << 17)]).take(pyarrow.array([0] * 1200))
    table = pyarrow.table({"text": column.dictionary_encode() if dictionary else column})
    path = tmp_path / "in.parquet"
    parquet.write_table(table, path, compression="zstd", use_dictionary=dictionary)
    assert path.stat().st_size < 200_000
    code = (
        "import sys\nfrom megallm.data.text import readers\n"
        "options = readers.ReadOptions()\n"
        "for chunk in readers.chunks(sys.argv[1], options): readers.parse_chunk(chunk, options)\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[2], capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    if dictionary:
        assert int(done.stdout) < 250_000, done.stderr
    else:
        assert done.returncode and "is a bomb" in done.stderr


def test_names_that_utf8_cannot_hold_are_rejected_lines_too(tmp_path):
    path = tmp_path / os.fsdecode(b"a\xff.jsonl")
    path.write_bytes(b'{"text": "good"}\n{"\\ud800": 1}\n')
    preprocess.run(PreprocessConfig((str(path),), str(tmp_path / "o"), "bytes", on_error="skip"))
    reject = json.loads((tmp_path / "o.rejects.jsonl").read_text("utf-8"))
    assert reject["file"] == str(path) and reject["line"] == 2 and "'\ud800'" in reject["reason"]
    assert meta.read_meta(tmp_path / "o_text_document")["inputs"] == [path.name]


def test_missing_and_impossible_inputs(work, tmp_path):
    with pytest.raises(DataError, match="nowhere.jsonl cannot be read: No such file"):
        preprocess.run(PreprocessConfig((str(tmp_path / "nowhere.jsonl"),), str(tmp_path / "o"), "bytes"))
    with pytest.raises(DataError, match="is a folder"):
        preprocess.run(PreprocessConfig((str(tmp_path),), str(tmp_path / "o"), "bytes"))
    with pytest.raises(CannotWrite):
        (tmp_path / "file").write_text("")
        (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
        preprocess.run(PreprocessConfig((str(tmp_path / "in.jsonl"),), str(tmp_path / "file" / "o"), "bytes"))
    for options in [{"workers": 0}, {"on_error": "no"}, {"split_text": "no"}, {"json_keys": ("a", "a")},
                    {"json_keys": ("a/b",)}, {"max_document_mib": 0}]:  # fmt: skip
        with pytest.raises(UsageError):
            work([{"text": "a"}], **options)


LINES = st.lists(
    st.binary(max_size=40).map(lambda b: b.replace(b"\n", b" ")) | st.sampled_from([b"", b"\r", b"\xef\xbb\xbf"]),
    max_size=30,
)


@settings(max_examples=80, deadline=None)
@given(lines=LINES, block=st.integers(1, 50), kind=st.sampled_from(["lines", "paragraphs", "jsonl", "file"]))
def test_where_a_file_is_cut_changes_nothing(lines, block, kind):
    content = b"\n".join(lines)
    limit = 1 << 20 if kind == "paragraphs" else 30  # a paragraph over the limit may take blank lines with it

    def read(size):
        blocks = (content[i : i + size] for i in range(0, len(content), size))
        first, out = 0, []
        for chunk in readers._cut("x", kind, blocks, limit):
            parsed = readers.parse_chunk(chunk, ReadOptions(max_document_bytes=limit))
            out += [(first + line, texts) for line, texts in parsed.documents]
            out += [(first + line, reason) for line, reason in parsed.rejects]
            first += parsed.lines
        return sorted(out, key=str), first

    if content.startswith(b"\xef"):
        content = b"a" + content  # a block shorter than the mark cannot see it
    assert read(block) == read(1000)


def test_endless_line_is_read_in_bounded_memory():
    def blocks():
        for _ in range(2000):
            yield b"x" * 10_000
        yield b'\n{"text": "after"}\n'

    import tracemalloc

    tracemalloc.start()
    chunks = list(readers._cut("x", "jsonl", blocks(), 100_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(c.too_long, c.lines) for c in chunks[:1]] == [(True, 1)] and b"after" in chunks[1].data
    assert peak < 1_000_000  # of 20 MB


def corpus(path, rows=6000):
    random = np.random.default_rng(5)
    with open(path, "w") as file:
        for i in range(rows):
            if i % 997 == 5:
                file.write("broken\n")
            file.write(json.dumps({"text": f"{i} " + "wörd " * int(random.integers(0, 200))}) + "\n")
    return str(path)


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_workers_give_the_same_bytes(tmp_path):
    inputs = (corpus(tmp_path / "a.jsonl"), corpus(tmp_path / "b.jsonl", 50))
    found = []
    for workers in (1, 2, 3):
        folder = tmp_path / f"w{workers}"
        stats = preprocess.run(
            PreprocessConfig(inputs, str(folder / "o"), "bytes", append_eod=True, workers=workers, on_error="skip")
        )
        found.append((digests(folder), stats.tokens, stats.rejected, stats.lines))
    assert found[0][2] == 8 and len(found[0][0]) == 4
    assert found[0] == found[1] == found[2]


def test_bad_line_in_a_worker_is_named_and_leaves_nothing(tmp_path):
    source = corpus(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a.jsonl:6: not valid JSON"):
        preprocess.run(PreprocessConfig((source,), str(tmp_path / "out" / "o"), "bytes", workers=2))
    assert not list((tmp_path / "out").iterdir())


def test_killed_worker_is_an_error_not_a_hang(tmp_path):
    source = corpus(tmp_path / "a.jsonl", 20_000)
    killed, others = [], set(multiprocessing.active_children())  # ranks that other tests keep

    def kill(_):
        if not killed:
            killed.append((set(multiprocessing.active_children()) - others).pop().pid)
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(InternalError, match="worker process died .killed by signal 9"):
        preprocess.run(
            PreprocessConfig((source,), str(tmp_path / "out" / "o"), "bytes", workers=2, on_error="skip"), kill
        )
    assert killed and [path.name for path in (tmp_path / "out").iterdir()] == ["o.partial"]


SLOW = """
import os, sys, time
from megallm.data.text import preprocess
def slow(stats):
    print("going", flush=True)
    time.sleep(0.05)
preprocess.run(preprocess.PreprocessConfig((sys.argv[1],), sys.argv[2], "bytes", workers=2, on_error="skip"), slow)
print("finished", flush=True)
"""


def start_slow(tmp_path):
    source = corpus(tmp_path / "a.jsonl", 20_000)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, source, str(tmp_path / "out" / "o")], stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdout.readline() == "going\n"
    assert list((tmp_path / "out").iterdir())  # the control: there is something to clean up
    return process


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_sigterm_leaves_only_what_can_be_gone_on_with(tmp_path):
    process = start_slow(tmp_path)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM
    assert "finished" not in process.stdout.read()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["o.partial"]


def test_workers_die_with_a_killed_parent(tmp_path):
    process = start_slow(tmp_path)
    workers = children_of(process.pid)
    assert len(workers) == 2
    process.kill()
    process.wait(20)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert not (tmp_path / "out" / "o_text_document.idx").exists()


def cpu_seconds(who):
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def test_work_is_in_the_workers(tmp_path):
    """What the parent does itself bounds the gain: at 5 % two workers are 1.9 times one. (Seconds of CPU: load of the
    machine does not matter.) The control is one worker, where the parent does everything."""
    (tmp_path / "t.txt").write_text("wörd and more words of the text " * 200)
    tokenizer.train_bpe([str(tmp_path / "t.txt")], 300, str(tmp_path / "tok"))
    source = corpus(tmp_path / "a.jsonl", 3000)
    share = {}
    for workers in (1, 2):
        own, children = cpu_seconds(resource.RUSAGE_SELF), cpu_seconds(resource.RUSAGE_CHILDREN)
        preprocess.run(
            PreprocessConfig(
                (source,), str(tmp_path / "o"), str(tmp_path / "tok"), workers=workers, on_error="skip",
                backend="tokenizers",
            )
        )
        own = cpu_seconds(resource.RUSAGE_SELF) - own
        share[workers] = own / (own + cpu_seconds(resource.RUSAGE_CHILDREN) - children)
    assert share[2] < 0.1 and share[1] > 0.9, share


def test_seeking_cuts_as_reading_does(tmp_path, monkeypatch):
    """Where a plain file is cut by seeking, and where by reading, and where a line is too long: the same documents."""
    lines = [json.dumps({"text": f"{i} " + "é" * (i * 37 % 200)}).encode() for i in range(300)]
    lines[120] = b'{"text": "' + b"x" * 9000 + b'"}'
    for content in (b"\n".join(lines), b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\n", lines[0], b"", b"\n\n"):
        plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
        plain.write_bytes(content)
        packed.write_bytes(gzip.compress(content))
        monkeypatch.setattr(readers, "_SEEK_BYTES", 64)
        for size in (100, 1000, 5000, 1 << 20):
            monkeypatch.setattr(readers, "CHUNK_BYTES", size)
            found = [read_all(name, ReadOptions(max_document_bytes=3000)) for name in (plain, packed)]
            assert found[0] == found[1]


def read_all(name, options):
    first, out = 1, []
    for chunk in readers.chunks(str(name), options):
        parsed = readers.parse_chunk(chunk, options)
        out += [(first + line, found) for line, found in [*parsed.documents, *parsed.rejects]]
        first += parsed.lines
    return sorted(out, key=str), first


BOMB = """
import sys
from megallm.data.text import preprocess
config = preprocess.PreprocessConfig((sys.argv[1],), sys.argv[2], "bytes", on_error="skip", max_document_mib=1)
stats = preprocess.run(config)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(stats.documents, stats.rejected, int(peak.split()[1]) // 1024)
"""


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_bomb_takes_bounded_memory(tmp_path, suffix):
    """FAULTS row 67: one line of 300 MB in a few hundred kilobytes; the limit of a document is 1 MiB."""
    head, tail = b'{"text": "before"}\n{"text": "', b'"}\n{"text": "after"}\n'
    path = tmp_path / f"a.jsonl.{suffix}"
    library = gzip if suffix == "gz" else pytest.importorskip("zstandard")
    with library.open(path, "wb") as file:
        file.write(head)
        for _ in range(300):
            file.write(b"x" * 1_000_000)
        file.write(tail)
    done = subprocess.run(
        [sys.executable, "-c", BOMB, str(path), str(tmp_path / "o")], cwd=Path(__file__).parents[2],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    documents_found, rejected, peak = map(int, done.stdout.split())
    assert (documents_found, rejected) == (2, 1) and peak < 150
    reject = json.loads((tmp_path / "o.rejects.jsonl").read_text())
    assert reject["line"] == 2 and "longer than 1048576 bytes" in reject["reason"]
