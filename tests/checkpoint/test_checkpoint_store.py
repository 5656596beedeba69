"""Saving and loading: any layout to any other, atomic, verified, and one answer on all ranks."""

import errno
import os
import shutil
import weakref
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megallm.base.errors import CannotWrite, CheckpointError, InternalError
from megallm.checkpoint import io, retention, store
from megallm.checkpoint.manifest import MANIFEST, Manifest, digest
from megallm.checkpoint.plan import boxes_of_range
from megallm.checkpoint.reader import CheckpointReader, step_folders
from megallm.checkpoint.store import Part

DTYPES = list(io.DTYPE_NAMES)


def random_tensor(shape, dtype, rng):
    data = torch.tensor([rng.randrange(256) for _ in range(prod(shape) * dtype.itemsize)], dtype=torch.uint8)
    if dtype is torch.bool:
        data = data % 2
    return data.view(dtype).reshape(shape) if prod(shape) else torch.empty(shape, dtype=dtype)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bytes(io.raw(a)) == bytes(io.raw(b))


def test_any_layout_writes_what_any_other_layout_reads(tmp_path, cluster, cuts, rng):
    for step in range(25):
        ranks = [[] for _ in range(rng.randint(1, 3))]
        logical = {}
        for index in range(4):
            shape = tuple(rng.randint(1, 7) for _ in range(rng.randint(0, 3)))
            name, tensor = f"t.{index}", random_tensor(shape, rng.choice(DTYPES), rng)
            logical[name] = tensor
            for box in cuts.boxes(shape, rng, 5):
                rng.choice(ranks).append(Part(name, shape, box.offset, tensor[box.slices()]))
        folder = cluster.save(tmp_path, step, ranks, meta={"round": step}, keep=1)
        with CheckpointReader(folder) as reader:
            assert reader.names() == sorted(logical) and reader.meta == {"round": step}
            for name, tensor in logical.items():
                assert reader.info(name) == (tuple(tensor.shape), tensor.dtype)
                assert same(reader.read(name), tensor)
                for box in cuts.boxes(tensor.shape, rng, 4):
                    target = torch.zeros(box.shape, dtype=tensor.dtype)
                    reader.read_into(name, box.offset, target)
                    assert same(target, tensor[box.slices()])


def test_flat_optimizer_ranges_reshard_like_weights(tmp_path, cluster):
    state = torch.randn(5, 4, 3)
    flat, ranks = state.reshape(-1), []
    for begin, end in ((0, 17), (17, 41), (41, 60)):
        parts, position = [], begin
        for box in boxes_of_range(state.shape, begin, end):
            parts.append(Part("optim.exp_avg.w", (5, 4, 3), box.offset, flat[position:][: box.size].view(box.shape)))
            position += box.size
        ranks.append(parts)
    with CheckpointReader(cluster.save(tmp_path, 1, ranks)) as reader:
        for begin, end in ((0, 29), (29, 60)):
            target, position = torch.empty(end - begin), 0
            for box in boxes_of_range(state.shape, begin, end):
                reader.read_into("optim.exp_avg.w", box.offset, target[position:][: box.size].view(box.shape))
                position += box.size
            assert torch.equal(target, flat[begin:end])


def test_small_pieces_strided_targets_and_parameters(tmp_path):
    weight = torch.randn(6, 10).t()
    record, table = io.write_shard(tmp_path / "a.safetensors", [Part("w", (10, 6), (0, 0), weight)], 32)
    assert len(table["w"].pieces) == 10 and record.nbytes == (tmp_path / "a.safetensors").stat().st_size
    assert all(piece.offset % 4 == 0 for piece in table["w"].pieces)
    manifest = Manifest(0, {"a.safetensors": record}, table, None)
    (tmp_path / MANIFEST).write_bytes(manifest.encode())
    with CheckpointReader(tmp_path) as reader:
        parameter = torch.nn.Parameter(torch.zeros(6, 10))
        reader.read_into("w", (0, 0), parameter.t())
        assert torch.equal(parameter.detach().t(), weight)


def test_one_piece_at_a_time_is_in_memory(tmp_path, monkeypatch):
    """Strided parts have to be copied: the copy of a piece is gone before the next one is made."""
    make, made = io.raw, []

    def watched(tensor):
        assert all(reference() is None for reference in made), "two pieces are in memory"
        data = make(tensor)
        made.append(weakref.ref(data))
        return data

    monkeypatch.setattr(io, "raw", watched)
    io.write_shard(tmp_path / "a.safetensors", [Part("w", (10, 6), (0, 0), torch.randn(6, 10).t())], 32)
    assert len(made) == 10


def test_the_safetensors_library_reads_a_shard(small, tensors):
    found = set()
    for path in sorted(small.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name, _, offset = key.partition("@")
                held = file.get_tensor(key)
                start = [int(o) for o in offset.split(",")] if offset else [0] * held.dim()
                slices = tuple(slice(o, o + n) for o, n in zip(start, held.shape, strict=True))
                assert same(held, tensors[name][slices])
                found.add(key)
    assert {"counter", "layers.0.mlp.down.weight@0,0", "layers.0.mlp.down.weight@6,0"} < found and len(found) == 7


def test_an_empty_piece_and_an_empty_tensor_are_legal(tmp_path, cluster, cuts):
    parts = cuts.axis("w", torch.ones(2, 3), 3, 0)  # the third rank holds no row
    parts[2].append(Part("empty", (0, 4), (0, 0), torch.empty(0, 4)))
    with CheckpointReader(cluster.save(tmp_path, 1, parts)) as reader:
        assert same(reader.read("w"), torch.ones(2, 3)) and reader.read("empty").shape == (0, 4)


def test_read_errors_are_sentences(small):
    with CheckpointReader(small) as reader:
        with pytest.raises(CheckpointError, match="no tensor named counte.*Did you mean 'counter'"):
            reader.info("counte")
        with pytest.raises(CheckpointError, match=r"stored as torch.int64.*torch.float32"):
            reader.read_into("counter", (), torch.tensor(0.0))
        with pytest.raises(CheckpointError, match="does not lie inside"):
            reader.read_into("layers.0.mlp.down.weight", (8, 0), torch.empty(8, 10))
        with pytest.raises(CheckpointError, match="number of dims"):
            reader.read_into("layers.0.mlp.down.weight", (0,), torch.empty(8))
    with pytest.raises(CheckpointError, match="has no manifest.json"):
        CheckpointReader(small.parent)


def load_everything(folder):
    with CheckpointReader(folder) as reader:
        return {name: reader.read(name) for name in reader.names()}


def test_every_flipped_bit_of_every_file_is_found_before_it_reaches_a_tensor(small, rng):
    files = sorted(small.iterdir())
    assert len(files) == 3
    for path in files:
        good = path.read_bytes()
        for _ in range(200):
            bad, bit = bytearray(good), rng.randrange(len(good) * 8)
            bad[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bad)
            with pytest.raises(CheckpointError, match=path.name):
                load_everything(small)
        path.write_bytes(good)
    load_everything(small)


def test_a_damaged_piece_leaves_the_target_untouched(small):
    path = small / "weights-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with CheckpointReader(small) as reader:
        name = next(
            n
            for n in reader.names()
            for p in reader.manifest.tensors[n].pieces
            if p.file == path.name and p.offset + p.box.size * reader.manifest.tensors[n].itemsize == len(data)
        )
        full, dtype = reader.info(name)
        target = torch.zeros(full[0] // 2, *full[1:], dtype=dtype)
        with pytest.raises(CheckpointError, match=f"Tensor {name} is damaged in .*weights-00001"):
            reader.read_into(name, (full[0] // 2, *(0,) * (len(full) - 1)), target)
        assert not target.any()


def test_truncated_missing_swapped_linked_shards_are_named(small, tmp_path):
    first, second = small / "weights-00000.safetensors", small / "weights-00001.safetensors"
    good = {path: path.read_bytes() for path in (first, second)}
    for length in (0, 7, len(good[first]) // 2, len(good[first]) - 1):
        first.write_bytes(good[first][:length])
        with pytest.raises(CheckpointError, match=f"weights-00000.safetensors has {length} bytes.*holds pieces of"):
            CheckpointReader(small)
    first.unlink()
    with pytest.raises(CheckpointError, match="weights-00000.safetensors is missing"):
        CheckpointReader(small)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(good[first])
    first.symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="symbolic links are refused"):
        CheckpointReader(small)
    first.unlink()
    os.mkfifo(first)
    with pytest.raises(CheckpointError, match="not a regular file"):
        CheckpointReader(small)


def test_swapped_shards_of_one_size_are_found(tmp_path, cluster, cuts):
    folder = cluster.save(tmp_path, 1, cuts.axis("w", torch.randn(4, 4), 2, 0))
    first, second = sorted(folder.glob("*.safetensors"))
    data = first.read_bytes(), second.read_bytes()
    assert len(data[0]) == len(data[1])
    first.write_bytes(data[1])
    second.write_bytes(data[0])
    with pytest.raises(CheckpointError, match="weights-0000"):
        load_everything(folder)
    # the data alone swapped, under the right headers
    header = 8 + int.from_bytes(data[0][:8], "little")
    first.write_bytes(data[0][:header] + data[1][header:])
    second.write_bytes(data[1][:header] + data[0][header:])
    with pytest.raises(CheckpointError, match="Tensor w is damaged"):
        load_everything(folder)


def test_the_newest_valid_step_wins_and_the_damage_is_told(tmp_path, cluster, cuts):
    assert store.latest(tmp_path / "nowhere") == (None, [])
    folders = [cluster.save(tmp_path, step, cuts.axis("w", torch.randn(4, 4), 2, 0)) for step in (1, 2, 100000000)]
    assert store.latest(tmp_path) == (folders[2], [])
    (folders[2] / MANIFEST).unlink()
    with (folders[1] / "weights-00001.safetensors").open("ab") as file:
        file.write(b"x")
    (tmp_path / "step-00000009.tmp-host.1.00000000").mkdir()
    (tmp_path / "step-00000010").symlink_to(folders[0])
    found, warnings = store.latest(tmp_path)
    assert found == folders[0]
    assert "step-100000000 is damaged" in warnings[0] and "has no manifest.json" in warnings[0]
    assert "step-00000002 is damaged" in warnings[1] and "weights-00001.safetensors has" in warnings[1]


def test_retention_keeps_valid_pinned_and_read_steps(tmp_path, cluster, cuts):
    def save(step, keep=None):
        return cluster.save(tmp_path, step, cuts.axis("w", torch.full((4, 4), float(step)), 2, 0), keep=keep)

    folders = {step: save(step) for step in range(1, 8)}
    retention.pin(folders[2])
    shutil.rmtree(folders[7])
    folders[7].mkdir()  # a damaged step does not count as kept
    with CheckpointReader(folders[3]) as reader:
        save(8, keep=2)
        assert [step for step, _ in step_folders(tmp_path)] == [8, 7, 6, 3, 2]
        assert reader.read("w").eq(3).all()
    retention.unpin(folders[2])
    save(9, keep=1)
    assert [step for step, _ in step_folders(tmp_path)] == [9]
    assert sorted(os.listdir(tmp_path)) == ["step-00000009"]


def test_a_failed_save_deletes_nothing_old(tmp_path, cluster, cuts, monkeypatch):
    parts = cuts.axis("w", torch.ones(4, 4), 2, 0)
    for step in (1, 2):
        cluster.save(tmp_path, step, parts)
    before = sorted(os.listdir(tmp_path))
    for call, code in (("fsync", errno.EIO), ("rename", errno.ENOSPC), ("write", errno.EDQUOT)):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, lambda *_, code=code: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
            with pytest.raises(CannotWrite):
                cluster.save(tmp_path, 3, parts, keep=1)
        assert sorted(os.listdir(tmp_path)) == before


def test_one_rank_without_space_fails_the_save_on_all_ranks(tmp_path, cluster, cuts, monkeypatch):
    """The third rank meets ENOSPC in the middle of its shard; nobody hangs and nothing is left."""
    parts, write, target = cuts.axis("w", torch.randn(6, 64), 3, 0), os.write, []

    def full_disk(fd, data):
        if os.readlink(f"/proc/self/fd/{fd}").endswith("weights-00002.safetensors"):
            target.append(fd)
            if len(target) > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(fd, data[:5])
        return write(fd, data)

    monkeypatch.setattr(os, "write", full_disk)
    results = cluster.run(3, lambda mesh: store.save(tmp_path, 4, parts[mesh.world.rank], {}, mesh))
    assert len(target) > 1
    assert all(isinstance(r, CannotWrite) and "weights-00002" in str(r) and "disk is full" in str(r) for r in results)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_fails_on_all_ranks(tmp_path, cluster, cuts):
    (tmp_path / "file").write_text("")
    parts = cuts.axis("w", torch.randn(6, 4), 2, 0)
    results = cluster.run(2, lambda mesh: store.save(tmp_path / "file" / "x", 4, parts[mesh.world.rank], {}, mesh))
    assert all(isinstance(r, CannotWrite) and "is a file, not a folder" in str(r) for r in results)


def test_parts_that_do_not_add_up_are_refused(tmp_path, cluster):
    whole = Part("w", (4,), (0,), torch.ones(4))
    cases = [
        ([[whole], [whole]], CheckpointError, "overlap"),
        ([[Part("w", (5,), (0,), torch.ones(4))]], CheckpointError, "hold 4 of 5"),
        ([[whole], [Part("w", (4,), (0,), torch.ones(4).double())]], CheckpointError, "Ranks disagree"),
        ([[Part("w", (4,), (2,), torch.ones(4))]], InternalError, "does not lie inside"),
        ([[Part("w", (4,), (0,), torch.ones(4, dtype=torch.complex64))]], InternalError, "complex64"),
        ([[whole, Part("w", (5,), (4,), torch.ones(1))]], InternalError, "differ in full shape"),
    ]
    for parts, kind, sentence in cases:
        with pytest.raises(kind, match=sentence):
            cluster.save(tmp_path, 1, parts)
        assert os.listdir(tmp_path) == []
    with pytest.raises(InternalError, match="must be JSON"):
        cluster.save(tmp_path, 1, [[whole]], meta={"x": object()})
    assert os.listdir(tmp_path) == []


def test_saving_a_step_again(tmp_path, cluster):
    first = cluster.save(tmp_path, 1, [[Part("w", (4,), (0,), torch.ones(4))]])
    inode = first.stat().st_ino
    assert cluster.save(tmp_path, 1, [[Part("w", (4,), (0,), torch.ones(4))]]).stat().st_ino == inode
    again = cluster.save(tmp_path, 1, [[Part("w", (4,), (0,), torch.zeros(4))]])
    assert not load_everything(again)["w"].any() and os.listdir(tmp_path) == ["step-00000001"]


def test_the_sweep_takes_only_our_dead_folders(tmp_path):
    host = retention._host()
    dead = next(pid for pid in range(4_000_000, 4_190_000) if not Path(f"/proc/{pid}").exists())
    names = {
        f"step-00000001.tmp-{host}.{dead}.0123abcd": True,
        f"step-00000001.tmp-{host}.{os.getpid()}.0123abcd": True,
        f"step-00000001.tmp-{host}.{os.getppid()}.0123abcd": False,
        "step-00000001.tmp-otherhost.1.0123abcd": False,
        "step-00000002.tmp-otherhost.1.0123abcd": True,  # made old below
        "step-00000001.tmp-mine": False,
        "my-step-00000001.tmp-host.1.0123abcd": False,
        "step-00000001": False,
    }
    for name in names:
        (tmp_path / name).mkdir()
    os.utime(tmp_path / "step-00000002.tmp-otherhost.1.0123abcd", (0, 0))
    (tmp_path / f"step-00000003.tmp-{host}.{dead}.0123abcd").symlink_to(tmp_path)
    assert {path.name for path in retention.remove_stale_folders(tmp_path)} == {
        name for name, goes in names.items() if goes
    }
    assert len(os.listdir(tmp_path)) == 6


def test_a_shard_on_a_disk_that_is_not_shared_is_told(tmp_path, cluster, cuts, monkeypatch):
    monkeypatch.setattr(store, "_APPEAR_SECONDS", 0.2)
    parts = cuts.axis("w", torch.ones(4, 4), 2, 0)
    disks = [tmp_path / "host0", tmp_path / "host1"]
    for disk in disks:
        disk.mkdir()
    results = cluster.run(2, lambda mesh: store.save(disks[mesh.world.rank], 1, parts[mesh.world.rank], {}, mesh))
    assert all(isinstance(r, CannotWrite) and "all hosts share" in str(r) for r in results)
    assert [os.listdir(disk) for disk in disks] == [[], []]


def test_a_manifest_that_leads_outside_is_refused(small):
    text = (small / MANIFEST).read_text()
    body = text[: text.rindex(",\n")].replace("weights-00000.safetensors", "../weights-00000.safetensors")
    shutil.copy(small / "weights-00000.safetensors", small.parent)
    (small / MANIFEST).write_text(body + f',\n"xxh3_128": "{digest(body.encode())}"\n}}\n')
    with pytest.raises(CheckpointError, match="does not match"):
        CheckpointReader(small)
