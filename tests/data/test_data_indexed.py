"""Indexed datasets: Megatron-LM's bytes, every damage named on open, writers that leave nothing behind."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.base.errors import CannotWrite, DataError
from megallm.data.indexed import dataset as indexed
from megallm.data.indexed import meta
from megallm.data.indexed.dataset import IndexedDataset, IndexedWriter

HEADER = 34


def test_golden_files_are_reproduced_byte_for_byte(golden, golden_prefix, tmp_path):
    data = IndexedDataset(golden_prefix)
    assert data.lengths.tolist() == golden["a_lengths"]
    with IndexedWriter(tmp_path / "copy", data.dtype) as writer:
        for document in range(data.num_documents):
            tokens = data.document(document)
            writer.add(tokens, np.array([len(tokens)]))
        writer.commit()
    for suffix in ("bin", "idx"):
        digest = hashlib.sha256((tmp_path / f"copy.{suffix}").read_bytes()).hexdigest()
        assert digest == golden[f"a_{suffix}_sha256"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.lists(st.integers(0, 250), max_size=5), max_size=4), max_size=8),
    st.sampled_from(["u1", "i2", "i4", "i8", "u2"]),
)
def test_round_trip(tmp_path_factory, documents, dtype):
    documents = [[[t % 120 for t in s] for s in d] for d in documents]
    prefix = tmp_path_factory.mktemp("round") / "x"
    with IndexedWriter(prefix, np.dtype(f"<{dtype}")) as writer:
        for sequences in documents:
            tokens = np.array([t for s in sequences for t in s], dtype)
            writer.add(tokens, np.array([len(s) for s in sequences], np.int32), np.array([len(sequences)]))
        writer.commit()
    data = IndexedDataset(prefix)
    assert data.num_documents == len(documents) and data.dtype == np.dtype(f"<{dtype}")
    assert [data.get(i).tolist() for i in range(len(data))] == [s for d in documents for s in d]
    assert [data.document(i).tolist() for i in range(len(documents))] == [sum(d, []) for d in documents]
    at = 0
    for i, sequences in enumerate(documents):
        for position in range(sum(map(len, sequences))):
            assert data.place_of(at) == (i, position)
            at += 1


def test_parts_of_a_sequence(make_dataset):
    data = IndexedDataset(make_dataset("x", [[[1, 2, 3], [4, 5, 6, 7]]]))
    assert data.get(1, 1, 2).tolist() == [5, 6]
    assert data.get(1, 4).tolist() == []
    with pytest.raises(IndexError):
        data.get(1, 2, 3)
    with pytest.raises(ValueError, match="read-only"):
        data.get(0)[0] = 9


def patch(path, at, data):
    raw = bytearray(Path(path).read_bytes())
    raw[at : at + len(data)] = data
    Path(path).write_bytes(raw)


def truncate(path, size):
    os.truncate(path, size if size >= 0 else os.path.getsize(path) + size)


# documents [[1, 2, 3]], [[4, 5], [6]]: S = 3 sequences, N = 3 entries; lengths at 34, offsets at 46, documents at 70
DAMAGE = [
    ("magic", "idx", lambda p: patch(p, 0, b"NOTIDX"), "byte 0: .*begin with"),
    ("empty index", "idx", lambda p: truncate(p, 0), "byte 0: "),
    ("cut header", "idx", lambda p: truncate(p, 20), "byte 20: .*header"),
    ("version", "idx", lambda p: patch(p, 9, struct.pack("<Q", 2)), "byte 9: version 2"),
    ("dtype code 0", "idx", lambda p: patch(p, 17, b"\0"), "byte 17: dtype code 0"),
    ("dtype code 9", "idx", lambda p: patch(p, 17, b"\x09"), "byte 17: dtype code 9"),
    ("float tokens", "idx", lambda p: patch(p, 17, b"\x07"), "byte 17: .*integers"),
    ("wrong dtype", "idx", lambda p: patch(p, 17, b"\x04"), "byte 54: the offset of sequence 1"),
    ("cut index", "idx", lambda p: truncate(p, -5), "byte 89: .*89 bytes.*need 94"),
    ("long index", "idx", lambda p: truncate(p, 100), "byte 94: .*100 bytes"),
    ("huge count", "idx", lambda p: patch(p, 18, struct.pack("<Q", 2**62)), "byte 94: "),
    ("negative length", "idx", lambda p: patch(p, 38, struct.pack("<i", -2)), "byte 38: the length of .* 1 is -2"),
    ("offset back", "idx", lambda p: patch(p, 62, struct.pack("<q", 2)), "byte 62: the offset of sequence 2 is 2"),
    ("offset negative", "idx", lambda p: patch(p, 46, struct.pack("<q", -4)), "byte 46: "),
    ("first document", "idx", lambda p: patch(p, 70, struct.pack("<q", 1)), "byte 70: the first document entry"),
    ("documents back", "idx", lambda p: patch(p, 78, struct.pack("<q", 7)), "byte 86: document entry 2 is 3"),
    ("last document", "idx", lambda p: patch(p, 86, struct.pack("<q", 2)), "byte 86: the last document entry is 2"),
    ("cut tokens", "bin", lambda p: truncate(p, -1), "byte 11: the file has 11 bytes, but .* describes 12"),
    ("no tokens", "bin", lambda p: truncate(p, 0), "byte 0: the file has 0 bytes"),
    ("appended tokens", "bin", lambda p: truncate(p, 20), "byte 12: the file has 20 bytes"),
    ("no index", "idx", os.unlink, "does not exist"),
    ("no data", "bin", os.unlink, "does not exist"),
]


@pytest.mark.parametrize("suffix, damage, sentence", [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
def test_damage_is_named_on_open(make_dataset, suffix, damage, sentence):
    prefix = make_dataset("x", [[[1, 2, 3]], [[4, 5], [6]]])
    IndexedDataset(prefix)  # control: sound before the damage
    damage(f"{prefix}.{suffix}")
    with pytest.raises(DataError, match=sentence) as caught:
        IndexedDataset(prefix)
    assert f"x.{suffix}" in str(caught.value)


def test_multimodal_modes_are_accepted(make_dataset):
    prefix = make_dataset("x", [[[1, 2, 3]], [[4, 5], [6]]])
    with open(f"{prefix}.idx", "ab") as index:
        index.write(bytes(3))
    assert IndexedDataset(prefix).document(1).tolist() == [4, 5, 6]


def test_leaving_without_commit_leaves_nothing(tmp_path):
    with IndexedWriter(tmp_path / "x", np.dtype("<u2")) as writer:
        writer.add(np.arange(5), np.array([5]))
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), IndexedWriter(tmp_path / "x", np.dtype("<u2")) as writer:
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_an_old_dataset_stays_until_commit(make_dataset, tmp_path):
    prefix = make_dataset("x", [[[1, 2, 3]]])
    with IndexedWriter(prefix, np.dtype("<u2")) as writer:
        writer.add(np.array([7]), np.array([1]))
        assert IndexedDataset(prefix).document(0).tolist() == [1, 2, 3]
        writer.commit()
    assert IndexedDataset(prefix).document(0).tolist() == [7]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_unwritable_place_is_a_sentence(tmp_path):
    with pytest.raises(CannotWrite, match="does not exist"):
        IndexedWriter(tmp_path / "missing" / "x", np.dtype("<u2"))


def test_full_disk_is_a_sentence():
    if not os.path.exists("/dev/full"):
        pytest.skip("this machine has no /dev/full")
    from megallm.base import files

    with pytest.raises(CannotWrite, match="disk is full"), files.writing("x.bin"), open("/dev/full", "wb") as full:
        full.write(b"x" * 100_000)


def test_ten_million_documents_index_in_a_second(tmp_path):
    lengths = np.ones(10_000_000, np.int32)
    with IndexedWriter(tmp_path / "x", np.dtype("<u1")) as writer:
        writer.add(np.zeros(len(lengths), np.uint8), lengths)
        for file in writer._open.values():
            file.flush()
        begin = time.process_time()
        with open(tmp_path / "probe", "wb") as index:
            writer._write_index(index)
        ours, begin = time.process_time() - begin, time.process_time()
        np.cumsum(lengths, dtype=np.int64).astype("<i8").tofile(tmp_path / "plain")
        assert ours < 5 * (time.process_time() - begin), "no loop of Python over documents"
    assert (tmp_path / "probe").stat().st_size == HEADER + 12 * len(lengths) + 8 * (len(lengths) + 1)
    (tmp_path / "probe").unlink()
    (tmp_path / "plain").unlink()


def test_merge_concatenates(make_dataset, tmp_path):
    parts = [[[[1, 2]], []], [[[3], [4, 5]]], []]
    prefixes = [make_dataset(f"part{i}", part) for i, part in enumerate(parts)]
    whole = make_dataset("whole", sum(parts, []))
    counts = indexed.merge_datasets(prefixes, tmp_path / "merged")
    assert counts == {"documents": 3, "sequences": 3, "tokens": 5}
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"merged.{suffix}").read_bytes() == Path(f"{whole}.{suffix}").read_bytes()
    with pytest.raises(DataError, match="same dtype"):
        indexed.merge_datasets([prefixes[0], make_dataset("wide", [[[1]]], "<i4")], tmp_path / "bad")
    assert not list(tmp_path.glob("bad*"))


def side_car(fingerprint="bytes-257", documents=1, tokens=3, vocab_size=257):
    return {"tokenizer": {"kind": "bytes", "fingerprint": fingerprint, "vocab_size": vocab_size, "eod": None},
            "documents": documents, "sequences": documents, "tokens": tokens}  # fmt: skip


def test_merge_refuses_two_tokenizers(make_dataset, tmp_path):
    a, b = make_dataset("a", [[[1, 2, 3]]]), make_dataset("b", [[[1, 2, 3]]])
    meta.write(a, side_car())
    meta.write(b, side_car())
    indexed.merge_datasets([a, b], tmp_path / "m")
    assert meta.read_meta(tmp_path / "m")["tokens"] == 6
    meta.write(b, side_car("hf-1"))
    with pytest.raises(DataError, match="different tokenizers"):
        indexed.merge_datasets([a, b], tmp_path / "n")


def test_tokenizer_fingerprint_is_enforced(make_dataset):
    prefix = make_dataset("x", [[[1, 2, 3]]])
    meta.check_tokenizer(prefix, "anything")  # no side-car, as Megatron-LM writes it: nothing to compare
    meta.write(prefix, side_car())
    meta.check_tokenizer(prefix, "bytes-257")
    with pytest.raises(DataError, match="bytes-257, but data.tokenizer is hf-2"):
        meta.check_tokenizer(prefix, "hf-2")


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 9}', json.dumps({"schema": 1, "tokenizer": {}})])
def test_damaged_side_car_is_refused(make_dataset, text):
    prefix = make_dataset("x", [[[1]]])
    Path(meta.path_of(prefix)).write_text(text)
    with pytest.raises(DataError, match="meta.json"):
        meta.read_meta(prefix)


def test_verify_finds_document_and_position(make_dataset):
    prefix = make_dataset("x", [[[1, 2]], [], [[3, 4], [5, 99, 6]], [[7]]])
    report = indexed.verify_dataset(prefix, 100)
    assert (report["documents"], report["tokens"], report["highest_token"], report["empty_documents"]) == (4, 8, 99, 1)
    with pytest.raises(DataError, match=r"x.bin: document 2, position 3: token id 99 is outside the vocabulary of 99"):
        indexed.verify_dataset(prefix, 99)


def test_verify_finds_a_negative_id_and_works_across_blocks(make_dataset, monkeypatch):
    monkeypatch.setattr(indexed, "_SCAN", 4)
    rows = [[[i, i + 1, i + 2]] for i in range(20)]
    rows[13][0][1] = -1
    with pytest.raises(DataError, match="document 13, position 1: token id -1"):
        indexed.verify_dataset(make_dataset("x", rows, "<i4"), 100)
    rows[13][0][1] = 0
    assert indexed.verify_dataset(make_dataset("y", rows, "<i4"), 100)["tokens"] == 60


def test_verify_checks_the_side_car(make_dataset):
    prefix = make_dataset("x", [[[1, 2, 3]]])
    meta.write(prefix, side_car(vocab_size=3))
    with pytest.raises(DataError, match="position 2: token id 3"):
        indexed.verify_dataset(prefix)
    meta.write(prefix, side_car(tokens=4))
    with pytest.raises(DataError, match="says 4 tokens but the dataset has 3"):
        indexed.verify_dataset(prefix)


def test_dtype_follows_the_vocabulary():
    assert indexed.dtype_for(65499) == np.dtype("<u2") and indexed.dtype_for(65500) == np.dtype("<i4")
