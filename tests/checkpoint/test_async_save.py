"""A save beside training holds what the state was when it started, and a failure of its writer loses that step only."""

import errno
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from megallm.base.errors import CannotWrite, CheckpointError, Diverged, InternalError
from megallm.checkpoint import async_save, store
from megallm.checkpoint.async_save import AsyncSaver
from megallm.checkpoint.reader import CheckpointReader, load_manifest, step_folders
from megallm.checkpoint.store import Part, RetentionPolicy
from megallm.checkpoint.writer import is_finite
from megallm.parallel.mesh import Mesh


@pytest.fixture
def saver(tmp_path):
    made = AsyncSaver(tmp_path / "beside", Mesh.single())
    yield made
    made.close()


def parts_of(value: float, dtypes=(torch.float32, torch.bfloat16, torch.float64, torch.int64)) -> list[Part]:
    tensors = [torch.full((37, 5), value).to(dtype) for dtype in dtypes]
    return [Part(f"t.{i}", (37, 5), (0, 0), tensor) for i, tensor in enumerate(tensors)]


def run(saver: AsyncSaver, step: int, parts: list[Part]) -> async_save.SaveResult:
    saver.start(step, parts, {"step": step}, RetentionPolicy(2))
    saver.wait()
    return saver.result()


def test_it_writes_the_bytes_that_a_save_at_once_writes(tmp_path, saver, tensors):
    whole = [Part(name, tuple(t.shape), (0,) * t.dim(), t) for name, t in tensors.items()]
    run(saver, 7, whole).check()
    store.save(tmp_path / "once", 7, whole, {"step": 7}, Mesh.single())
    for name in os.listdir(tmp_path / "once" / "step-00000007"):
        ours, theirs = (tmp_path / where / "step-00000007" / name for where in ("beside", "once"))
        assert ours.read_bytes() == theirs.read_bytes()
    assert len(os.listdir(tmp_path / "beside" / "step-00000007")) == 2


def test_every_rank_writes_its_part_and_rank_0_commits(tmp_path, cluster, cuts, tensors):
    name, tensor = max(tensors.items(), key=lambda item: item[1].numel())
    shares = cuts.axis(name, tensor, 3, 0)
    shares[1] = []
    shares[0] = cuts.axis(name, tensor, 1, 0)[0]
    shares[2] = [Part("other", (4,), (0,), torch.arange(4.0))]

    def body(mesh):
        saver = AsyncSaver(tmp_path, mesh)
        saver.start(3, shares[mesh.world.rank], {"rank": mesh.world.rank}, RetentionPolicy())
        saver.wait()
        saver.close()
        return saver.result()

    assert [result.outcome for result in cluster.run(3, body)] == [{}, {}, {}]
    with CheckpointReader(tmp_path / "step-00000003") as reader:
        assert torch.equal(reader.read(name), tensor) and torch.equal(reader.read("other"), torch.arange(4.0))
        assert reader.meta == {"rank": 0} and not list(reader.problems())


def test_what_training_does_meanwhile_does_not_reach_the_file(tmp_path, saver):
    parts, meta = parts_of(1.0), {"ledger": {"step": 1}}
    saver.start(1, parts, meta, RetentionPolicy())
    for part in parts:
        part.tensor.fill_(9)
    meta["ledger"]["step"] = 9
    saver.wait()
    saver.result().check()
    with CheckpointReader(tmp_path / "beside" / "step-00000001") as reader:
        assert all(bool((reader.read(part.name) == 1).all()) for part in parts) and reader.meta["ledger"]["step"] == 1


def test_steps_of_other_sizes_follow_each_other_and_old_ones_go(tmp_path, saver):
    saver.prepare(parts_of(0.0))
    for step, count in ((1, 1), (2, 4), (3, 2)):
        assert run(saver, step, parts_of(float(step))[:count]).outcome == {}
    assert [step for step, _ in step_folders(tmp_path / "beside")] == [3, 2]
    for step, folder in step_folders(tmp_path / "beside"):
        assert load_manifest(folder).step == step


def test_a_killed_writer_loses_that_step_only(tmp_path, saver):
    run(saver, 1, parts_of(1.0)).check()
    os.kill(saver._writer.pid, signal.SIGKILL)
    while saver._writer.alive:
        time.sleep(0.01)
    assert run(saver, 2, parts_of(2.0)).outcome == {}, "a writer that died between saves is started again"
    os.kill(saver._writer.pid, signal.SIGSTOP)
    saver.start(3, parts_of(3.0), {}, RetentionPolicy())
    assert saver.busy and saver.result() is None
    os.kill(saver._writer.pid, signal.SIGKILL)
    saver.wait()
    with pytest.raises(CannotWrite, match=r"ended with status -9; the next save starts another"):
        saver.result().check()
    assert run(saver, 4, parts_of(4.0)).outcome == {}
    assert [step for step, _ in step_folders(tmp_path / "beside")] == [4, 2]
    assert not list((tmp_path / "beside").glob("*.tmp-*"))


def test_the_writer_dies_with_its_rank(tmp_path):
    code = (
        "import sys, time, torch\n"
        "from megallm.checkpoint.async_save import AsyncSaver\nfrom megallm.parallel.mesh import Mesh\n"
        f"saver = AsyncSaver({str(tmp_path)!r}, Mesh.single()); saver.prepare([]); saver.wait()\n"
        "print(saver._writer.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as rank:
        writer = int(rank.stdout.readline())
        os.kill(writer, 0)
        rank.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(writer, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the writer outlived its rank")


def test_numbers_that_are_not_finite_are_never_committed(tmp_path, saver):
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
        for bad in (math.nan, math.inf, -math.inf):
            parts = parts_of(1.0, (dtype,))
            parts[0].tensor[20, 3] = bad
            with pytest.raises(Diverged, match=r"The state after step 1 is not finite, as in t\.0\."):
                run(saver, 1, parts).check()
    assert step_folders(tmp_path / "beside") == []


def test_finite_numbers_pass_whatever_their_bits():
    for name, dtype in (("float32", np.float32), ("float64", np.float64), ("float16", np.float16)):
        info = np.finfo(dtype)
        edge = np.array([info.max, info.min, info.tiny, info.smallest_subnormal, 0.0, -0.0], dtype)
        assert is_finite(memoryview(edge.tobytes()), name)
        assert not is_finite(memoryview(np.append(edge, dtype(np.inf)).tobytes()), name)
    assert is_finite(memoryview(b"\xff" * 64), "int64")
    late = np.zeros(3 << 18, np.float32)
    late[-1] = np.nan
    assert not is_finite(memoryview(late.tobytes()), "float32"), "in a later chunk"


def test_too_little_memory_on_one_rank_fails_the_save_on_all(tmp_path, cluster):
    """The others have a save under way by then: nobody may leave before its result is known."""

    def body(mesh):
        saver = AsyncSaver(tmp_path, mesh)
        if mesh.world.rank == 1:

            def grow(nbytes):
                raise OSError(errno.ENOMEM, "Cannot allocate memory")

            saver._memory.grow = grow
        parts = [Part(f"of.{mesh.world.rank}", (3,), (0,), torch.ones(3))]
        saver.start(1, parts, {}, RetentionPolicy())
        saver.wait()
        saver.close()
        return saver.result()

    results = cluster.run(3, body)
    assert [result.outcome.get("kind") for result in results] == ["CannotWrite", "CannotWrite", None]
    assert "Cannot allocate memory" in results[0].outcome["error"] and step_folders(tmp_path) == []


def test_a_folder_that_goes_away_is_told_and_nothing_is_left(tmp_path, saver):
    saver.prepare(parts_of(1.0))
    saver.wait()
    os.kill(saver._writer.pid, signal.SIGSTOP)
    saver.start(2, parts_of(1.0), {}, RetentionPolicy())
    (folder,) = (tmp_path / "beside").iterdir()
    folder.rmdir()
    folder.write_text("in the way")
    os.kill(saver._writer.pid, signal.SIGCONT)
    saver.wait()
    with pytest.raises(CannotWrite, match="not a folder|exists"):
        saver.result().check()
    assert step_folders(tmp_path / "beside") == []


def test_parts_that_overlap_are_refused_when_it_commits(saver):
    twice = [*parts_of(1.0, (torch.float32,)), *parts_of(2.0, (torch.float32,))]
    with pytest.raises(CheckpointError, match="held exactly once"):
        run(saver, 1, twice).check()


def test_a_second_save_waits_for_the_result_of_the_first(saver):
    saver.start(1, parts_of(1.0), {}, RetentionPolicy())
    with pytest.raises(InternalError, match="before the result"):
        saver.start(2, parts_of(2.0), {}, RetentionPolicy())
