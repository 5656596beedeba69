"""What `megallm ckpt` shows, verifies, compares and dumps."""

import errno
import math
import os

import pytest
import torch
from safetensors.torch import load_file

from megallm.base.errors import CannotWrite, CheckpointError
from megallm.checkpoint import retention, store, tools
from megallm.checkpoint.manifest import MANIFEST


def test_dump_writes_the_logical_tensors(small, tensors, tmp_path):
    for source in (small, small.parent, tmp_path):  # a step, its parent, the run folder
        output = tmp_path / "dump.safetensors"
        result = tools.dump(source, output)
        loaded = load_file(output)
        assert loaded.keys() == tensors.keys()
        assert all(loaded[n].dtype == t.dtype and torch.equal(loaded[n], t) for n, t in tensors.items())
        assert result == {"step": 5, "output": str(output), "tensors": 4, "bytes": output.stat().st_size}


def test_a_dump_that_fails_leaves_nothing(small, tmp_path, monkeypatch):
    output, write = tmp_path / "out" / "dump.safetensors", os.write
    with pytest.raises(CannotWrite, match="create it first"):
        tools.dump(small, output)
    output.parent.mkdir()

    def full_disk(fd, data):
        if len(data) > 400:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full_disk)
        with pytest.raises(CannotWrite, match="disk is full"):
            tools.dump(small, output)
    assert os.listdir(output.parent) == []
    path = small / "weights-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match="weights-00001"):
        tools.dump(small, output)
    assert os.listdir(output.parent) == []


def test_ls_and_show(small, tmp_path):
    (tmp_path / "checkpoints" / "step-00000009").mkdir()
    retention.pin(small)
    first, second = tools.ls(tmp_path)
    assert (first["step"], first["valid"], first["pinned"], first["problem"]) == (5, True, True, None)
    assert first["bytes"] == sum(path.stat().st_size for path in small.glob("*.safetensors"))
    assert (second["step"], second["valid"]) == (9, False) and "has no manifest.json" in second["problem"]
    shown = tools.show_step(tmp_path)
    assert shown["step"] == 5 and shown["meta"] == {"step": 5, "seed": 1.25} and len(shown["files"]) == 2
    assert shown["tensors"][1] == {
        "name": "layers.0.mlp.down.weight", "full": [12, 10], "dtype": "float32", "pieces": 2, "bytes": 480,
    }  # fmt: skip


def test_verify_names_what_is_wrong(small):
    good = tools.verify_checkpoint(small)
    assert good["ok"] and good["problems"] == [] and good["pieces"] == 7
    path = small / "weights-00000.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 4]))
    (small / "weights-00009.safetensors").write_bytes(b"")
    problems = tools.verify_checkpoint(small)["problems"]
    assert len(problems) == 2 and "weights-00000.safetensors, bytes" in problems[0] and "not named" in problems[1]
    (small / MANIFEST).write_bytes((small / MANIFEST).read_bytes().replace(b"1.25", b"1.75"))
    report = tools.verify_checkpoint(small)
    assert not report["ok"] and "does not match its own hash" in report["problems"][0]


def test_diff_names_tensors_and_errors(tmp_path, cluster):
    def save(step, meta, **values):
        parts = [store.Part(name, tuple(t.shape), (0,) * t.dim(), t) for name, t in values.items()]
        return cluster.save(tmp_path, step, [parts], meta=meta)

    base = torch.arange(6.0).view(2, 3)
    moved, signed, holed = base.clone(), base.clone(), base.clone()
    moved[1, 2] += 0.25
    signed[0, 0] = -0.0
    holed[0, 1] = math.nan
    a = save(1, {"step": 1, "seed": 3}, same=base, nan=holed, moved=base, signed=base, holed=base, old=base,
             shape=base)  # fmt: skip
    b = save(2, {"step": 2, "seed": 3}, same=base, nan=holed, moved=moved, signed=signed, holed=holed, new=base,
             shape=base[0])  # fmt: skip
    result = tools.diff(a, b)
    assert not result["same"] and result["meta"] == ["step"]
    rows = {row["name"]: (row["what"], row["max_abs_error"]) for row in result["tensors"]}
    assert math.isnan(rows.pop("holed")[1])
    assert rows == {
        "moved": ("values", 0.25),
        "signed": ("values", 0.0),
        "old": ("only in first", None),
        "new": ("only in second", None),
        "shape": ("shape or dtype", None),
    }
    assert result["changes"] == [{"key": "step", "first": 1, "second": 2}]
    assert tools.diff(a, a) == {"same": True, "tensors": [], "meta": [], "changes": []}
    deep = save(3, {"step": 1, "more": {"x": [1], "y": 2}, "seed": None}, same=base)
    assert tools.diff(a, deep)["changes"] == [
        {"key": "more.x", "first": None, "second": [1]}, {"key": "more.y", "first": None, "second": 2},
        {"key": "seed", "first": 3, "second": None},
    ]  # fmt: skip


def test_a_source_without_checkpoints_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        tools.show_step(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no valid checkpoint.*step-00001200"):
        tools.show_step(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        tools.ls(tmp_path / "nowhere")
