"""The header of a safetensors file may not cost many times the file (issue R, item 18: 100,000 empty tensors)."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path

import pytest

from megallm.base.errors import CheckpointError
from megallm.convert import folder as folder_module
from megallm.convert.folder import TensorEntry, catalogue, read_header
from megallm.convert.weights import HfReader


def written(path: Path, header: bytes, size: int = 0) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, path.stat().st_size + size)
    return path


def empty(count: int) -> bytes:
    row = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, separators=(",", ":"))
    return ("{" + ",".join(f'"{i}":{row}' for i in range(count)) + "}").encode()


HEADERS = {
    "100,000 empty tensors": lambda: empty(100_000),
    "a name that hides what it is": lambda: empty(100_000).replace(b"dtype", b"\\u0064type"),
    "metadata": lambda: ('{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(1_000_000)) + "}}").encode(),
    "a shape without end": lambda: (
        b'{"a":{"dtype":"F32","shape":[' + b"999," * 2_000_000 + b'0],"data_offsets":[0,0]}}'
    ),
    "lists": lambda: b'{"a":[' + b"[]," * 3_000_000 + b"[]]}",
    "objects": lambda: b'{"a":[' + b"{}," * 3_000_000 + b"{}]}",
}


@pytest.mark.parametrize("name", HEADERS)
def test_item_18_a_header_costs_a_few_times_its_file(tmp_path, name):
    path = written(tmp_path / "model.safetensors", HEADERS[name]())
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"model\.safetensors holds \d+ values"):
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * path.stat().st_size + (1 << 20)


def test_item_18_control_the_same_header_without_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "FREE_TENSORS", 10**6)
    path = written(tmp_path / "model.safetensors", empty(20_000))
    tracemalloc.start()
    try:
        assert len(read_header(path)) == 20_000
        assert tracemalloc.get_traced_memory()[1] > 10 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_item_18_real_headers_pass(tmp_path):
    """Four thousand tensors of any size, and as many more as have a kilobyte each."""
    assert len(read_header(written(tmp_path / "a.safetensors", empty(4000)))) == 4000
    rows = {
        f"model.layers.0.mlp.experts.{i}.w": {
            "dtype": "BF16",
            "shape": [2, 512],
            "data_offsets": [i * 2048, i * 2048 + 2048],
        }
        for i in range(12_000)
    }
    made = written(
        tmp_path / "b.safetensors", json.dumps({"__metadata__": {"format": "pt"}, **rows}).encode(), 12_000 * 2048
    )
    assert len(read_header(made)) == 12_000


def test_item_18_an_index_of_files_has_bounds(tmp_path):
    rows = ",".join(f'"{i}":"model-00001-of-00001.safetensors"' for i in range(900))
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map":{' + rows + ',"x":[' + "0," * 1_100_000 + "0]}}"
    )
    with pytest.raises(CheckpointError, match=r"index\.json holds \d+ values"):
        catalogue(tmp_path)


def test_item_18_safetensors_cut_off_while_they_are_read(tmp_path):
    """An error with the file's name, not SIGBUS."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(4096))
    with HfReader.__new__(HfReader) as reader:
        reader._files = {path: os.open(path, os.O_RDONLY)}
        os.truncate(path, 100)
        with pytest.raises(CheckpointError, match=r"model\.safetensors was cut off"):
            reader._bytes(TensorEntry(path, "F32", (512,), 0, 2048), 0, 2048)
