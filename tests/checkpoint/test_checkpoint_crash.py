"""A save that is killed at any system call leaves the older step as the newest valid one."""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from megallm.checkpoint import retention, store
from megallm.checkpoint.manifest import MANIFEST
from megallm.checkpoint.reader import CheckpointReader, load_manifest, step_folders
from megallm.checkpoint.store import Part, latest, save

CALLS = ("write", "fsync", "rename", "mkdir", "open", "unlink", "rmdir")


class Alone:
    """A world of one."""

    class world:
        rank, size = 0, 1

    def gather_json(self, value):
        return [json.loads(json.dumps(value))]

    def broadcast_json(self, value):
        return json.loads(json.dumps(value))


def parts(step):
    return [Part(f"t.{i}", (40, 3), (0, 0), torch.full((40, 3), float(step))) for i in range(3)]


def in_child(body):
    """Run `body` in a forked child; the wait status says how it ended."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        finally:
            os._exit(1)  # reached only when `body` raises
    return os.waitpid(pid, 0)[1]


def record_calls(sink, kill_at=None):
    """Wrap the system calls of this process: note each, and die by SIGKILL in place of call number `kill_at`."""
    for name in CALLS:
        original = getattr(os, name)

        def wrapped(*args, _name=name, _original=original, **kwargs):
            if kill_at is not None and len(sink) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if _name in ("write", "fsync"):
                sink.append((_name, os.readlink(f"/proc/self/fd/{args[0]}")))
            else:
                sink.append((_name, str(args[0])))
            return _original(*args, **kwargs)

        setattr(os, name, wrapped)


def calls_of_a_save(root):
    """The system calls of saving step 3 with retention over steps 1 and 2, in order."""
    read, write = os.pipe()

    def body():
        sink = []
        record_calls(sink)
        save(root, 3, parts(3), {"step": 3}, Alone(), keep=2)
        calls = list(sink)
        with os.fdopen(write, "w") as file:
            file.write(json.dumps(calls))
        os._exit(0)

    assert in_child(body) == 0
    os.close(write)
    with os.fdopen(read) as file:
        return json.loads(file.read())


def prepare(root):
    for step in (1, 2):
        save(root, step, parts(step), {"step": step}, Alone())


def test_killed_at_every_system_call_the_newest_valid_step_is_whole(tmp_path):
    prepare(tmp_path / "dry")
    calls = calls_of_a_save(tmp_path / "dry")
    assert len(calls) > 20
    outcomes = []
    for number in range(len(calls)):
        root = tmp_path / str(number)
        prepare(root)

        def body(root=root, number=number):
            record_calls([], kill_at=number)
            save(root, 3, parts(3), {"step": 3}, Alone(), keep=2)
            os._exit(0)

        status = in_child(body)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"call {number} was not reached"
        found, warnings = latest(root)
        assert warnings == [] and found is not None
        with CheckpointReader(found) as reader:
            assert reader.meta["step"] == reader.step
            assert all(reader.read(name).eq(reader.step).all() for name in reader.names())
            outcomes.append(reader.step)
        for _, folder in step_folders(root):  # nor does a deletion leave half a step
            load_manifest(folder)
        save(root, 4, parts(4), {"step": 4}, Alone(), keep=1)  # what the dead one left is swept
        assert os.listdir(root) == ["step-00000004"]
    commit = next(i for i, (name, path) in enumerate(calls) if name == "rename" and path.count("step-00000003.tmp"))
    assert outcomes == [2] * (commit + 1) + [3] * (len(calls) - commit - 1)


def test_a_power_cut_cannot_reorder_the_commit(tmp_path):
    """Shard, manifest, folder and parent are synced in the order that makes the rename the commit."""
    prepare(tmp_path)
    calls = calls_of_a_save(tmp_path)
    kinds = []
    for name, path in calls:
        last = os.path.basename(path)
        what = next((k for k in ("weights", MANIFEST, "step-00000003.tmp") if last.startswith(k)), "root")
        if (name, what) not in (("open", "root"), ("fsync", "other")):
            kinds.append(f"{name} {what}")

    def last(event):
        return len(kinds) - 1 - kinds[::-1].index(event)

    order = [
        last("write weights"),
        last("fsync weights"),
        kinds.index(f"write {MANIFEST}"),
        last(f"fsync {MANIFEST}"),
        last("fsync step-00000003.tmp"),
        kinds.index("rename step-00000003.tmp"),
        last("fsync root"),
        kinds.index("rmdir root") if "rmdir root" in kinds else len(kinds),
    ]
    assert order == sorted(order) and len(set(order)) == len(order)


def test_killed_from_outside_at_random_times(tmp_path):
    rng = random.Random(5)
    prepare(tmp_path)
    step, kills, deadline = 2, 0, time.monotonic() + 60
    while kills < 12 or (step <= 10 and time.monotonic() < deadline):  # a busy machine saves fewer between two kills
        kills, first = kills + 1, step + 1

        def body(first=first):
            for number in range(first, first + 10000):
                save(tmp_path, number, parts(number), {"step": number}, Alone(), keep=2)

        pid = os.fork()
        if pid == 0:
            try:
                body()
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.01, 0.08))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found, warnings = latest(tmp_path)
        assert warnings == []
        with CheckpointReader(found) as reader:
            assert reader.step >= step
            assert all(reader.read(name).eq(reader.step).all() for name in reader.names())
            step = reader.step
    assert step > 10, "the child never saved anything"


class PipeMesh:
    """Real processes: rank 0 holds a pipe to each other rank."""

    def __init__(self, rank, pipes):
        self.pipes = pipes

        class world:
            pass

        self.world = world
        world.rank, world.size = rank, len(pipes) + 1

    def gather_json(self, value):
        if self.world.rank:
            self.pipes[0].send(value)
            return None
        return [value, *(pipe.recv() for pipe in self.pipes)]

    def broadcast_json(self, value):
        if self.world.rank:
            return self.pipes[0].recv()
        for pipe in self.pipes:
            pipe.send(value)
        return value


@pytest.mark.parametrize("victim", [None, 2])
def test_real_processes_save_together(tmp_path, cuts, victim):
    """Three processes write one step; when one of them has died, no step appears and nobody waits for ever."""
    tensor = torch.arange(30.0).view(10, 3)
    own = cuts.axis("w", tensor, 3, 1)
    context = multiprocessing.get_context("fork")
    links = [context.Pipe() for _ in range(2)]

    def rank_body(rank):
        for index, (near, far) in enumerate(links):
            near.close()
            if index != rank - 1:
                far.close()
        if rank == victim:
            record_calls([], kill_at=3)
        save(tmp_path, 7, own[rank], {"seed": 1}, PipeMesh(rank, [links[rank - 1][1]]))

    children = [context.Process(target=rank_body, args=(rank,)) for rank in (1, 2)]
    for child in children:
        child.start()
    for _, far in links:
        far.close()
    mesh = PipeMesh(0, [near for near, _ in links])
    if victim is None:
        with CheckpointReader(save(tmp_path, 7, own[0], {"seed": 1}, mesh)) as reader:
            assert torch.equal(reader.read("w"), tensor)
            assert len(reader.manifest.files) == 3
    else:
        with pytest.raises((EOFError, ConnectionError)):
            save(tmp_path, 7, own[0], {"seed": 1}, mesh)
        assert store.latest(tmp_path) == (None, [])
    for near, _ in links:
        near.close()
    for child in children:
        child.join(timeout=60)
        assert child.exitcode is not None
    if victim is not None:
        retention.remove_stale_folders(tmp_path)
        assert os.listdir(tmp_path) == []
