"""The run folder: one holder at a time, and rows that survive crashes, resumes and full disks."""

import errno
import json
import logging
import math
import os
import random
import signal
import time
from dataclasses import replace

import pytest

from megallm.base.errors import CannotWrite, InternalError
from megallm.run import lease as leases
from megallm.run.lease import Holder, Lease, drop_dead_lease
from megallm.run.rows import Events, JsonLines, Metrics, read_rows, rewind
from megallm.run.runfolder import RunFolder


@pytest.fixture(autouse=True)
def lines_reach_the_test(monkeypatch):
    """Whatever an earlier test did to logging."""
    monkeypatch.setattr(logging.getLogger("megallm"), "propagate", True)


@pytest.fixture
def folder(tmp_path):
    result = RunFolder(tmp_path / "run")
    result.prepare()
    return result


def rows(path):
    return list(read_rows(path))


def test_prepare_makes_the_folders_and_leaves_no_trace(folder):
    assert sorted(os.listdir(folder.path)) == ["checkpoints", "logs", "plots"]
    assert os.listdir(folder.checkpoints) == []
    folder.write_config("run: {}\n")
    folder.write_environment({"layout": {"tp": 2}})
    environment = json.loads(folder.environment.read_text())
    assert environment["layout"] == {"tp": 2} and environment["versions"]["torch"] and "commit" in environment
    assert folder.log_path(3).name == "rank-3.log"


def test_prepare_refuses_what_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="is a file, not a folder"):
        RunFolder(tmp_path / "file" / "run").prepare()

    def read_only(self, data):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.write_bytes", read_only)
    with pytest.raises(CannotWrite, match="read-only"):
        RunFolder(tmp_path / "run").prepare()


# --- the lease


def test_a_second_job_is_refused_and_may_come_after_the_first(folder):
    with Lease(folder) as first:
        with pytest.raises(CannotWrite, match=rf"held by host .*, process {os.getpid()}, since 20.*choose another run"):
            Lease(folder)
        first.check()
        assert sorted(os.listdir(folder.path)) == ["LOCK", "checkpoints", "logs", "plots"]
    assert not folder.lock.exists()
    with Lease(folder):
        pass


def test_the_lease_of_a_killed_process_is_taken_over_at_once(folder):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        Lease(folder)
        os.write(write, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    with pytest.raises(CannotWrite, match=f"process {pid}"):
        Lease(folder)
    os.kill(pid, signal.SIGKILL)
    for _ in range(200):  # the killed child is a zombie until it is waited for: it must count as dead
        with open(f"/proc/{pid}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] == "Z":
                break
        time.sleep(0.01)
    with Lease(folder) as lease:
        assert leases.read_holder(folder.lock).token == lease.holder.token
    os.waitpid(pid, 0)


def test_only_the_lock_of_a_dead_process_of_this_machine_is_dropped(folder):
    me = Holder.me()
    drop_dead_lease(folder)  # there is none
    for other in (me, replace(me, machine="another boot"), replace(me, host="another-host")):
        folder.lock.write_text(json.dumps(vars(other)))
        drop_dead_lease(folder)
        assert folder.lock.exists()
    folder.lock.write_text(json.dumps(vars(replace(me, process_start=me.process_start - 1))))
    drop_dead_lease(folder)
    assert not folder.lock.exists()
    drop_dead_lease(RunFolder(folder.path / "nowhere"))


def test_a_pid_that_was_used_again_is_not_the_holder(folder):
    me = Holder.me()
    folder.lock.write_text(json.dumps(vars(replace(me, process_start=me.process_start - 1))))
    with Lease(folder):
        pass


def test_a_lock_that_cannot_be_written_is_not_left_behind(folder, monkeypatch):
    def full(fd, *_, **__):
        os.close(fd)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CannotWrite, match="disk is full"):
        patch.setattr(leases.os, "fdopen", full)
        Lease(folder)
    assert not folder.lock.exists()
    Lease(folder).release()


def test_a_lease_of_another_machine_goes_by_its_heartbeat(folder):
    elsewhere = replace(Holder.me(), host="elsewhere", machine="another boot")
    folder.lock.write_text(json.dumps(vars(elsewhere)))
    old = time.time() - 200
    os.utime(folder.lock, (old, old))
    with pytest.raises(CannotWrite, match=r"held by host elsewhere.*last sign of life 20\d s ago.*after 300 s"):
        Lease(folder)
    with Lease(folder, stale_seconds=100):
        pass
    folder.lock.write_text("not json")
    with pytest.raises(CannotWrite, match="held by an unknown job"):
        Lease(folder)


def test_the_heartbeat_moves_and_a_lost_lease_is_noticed(folder):
    with Lease(folder, beat_seconds=0.01) as lease:
        os.utime(folder.lock, (0, 0))
        deadline = time.monotonic() + 60
        while folder.lock.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert folder.lock.stat().st_mtime > 1e9
        lease.check()
        folder.lock.write_text(json.dumps(vars(replace(Holder.me(), host="thief"))))
        while not lease.lost and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(CannotWrite, match="taken over by host thief"):
            lease.check()
    assert folder.lock.exists(), "a lease that is not ours must not be removed"


# --- rows


def test_floats_round_trip_exactly_and_nan_is_null(tmp_path):
    values = [0.1, 1 / 3, 2.0**-1074, 1.7976931348623157e308, 5e-324, math.pi]
    values += [random.Random(1).uniform(-1e9, 1e9) for _ in range(100)]
    lines = JsonLines(tmp_path / "a.jsonl")
    lines.append({"values": values, "nan": math.nan, "deep": {"inf": [math.inf]}})
    lines.close()
    assert rows(tmp_path / "a.jsonl") == [{"values": values, "nan": None, "deep": {"inf": [None]}}]


def test_resume_cuts_later_rows_and_writes_none_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, resume=0)
    for step in range(1, 8):
        metrics.append({"step": step, "train/loss": step / 7})
    metrics.close()
    first = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"step": 8, "train/lo')  # killed in the middle of a row
    metrics = Metrics(path, resume=5)
    assert metrics.last_step == 5
    with pytest.raises(InternalError, match="already has step 5"):
        metrics.append({"step": 5})
    for step in (6, 7):
        metrics.append({"step": step, "train/loss": step / 7})
    metrics.close()
    assert path.read_bytes() == first
    assert Metrics(path, resume=0).last_step == 0 and path.read_bytes() == b""


def test_a_metrics_file_cut_at_any_byte_resumes_to_the_same_rows(tmp_path):
    whole = b"".join(b'{"step": %d, "x": %f}\n' % (step, step / 3) for step in range(1, 6))
    path = tmp_path / "metrics.jsonl"
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        left = rewind(path, 4)
        kept = path.read_bytes()
        assert kept == b"".join(whole.splitlines(keepends=True)[:left])
        assert left == min(4, whole[:length].count(b"\n"))
    assert rewind(tmp_path / "none", 3) == 0


def test_damaged_and_doubled_rows_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00\n{"step": 2}\n{"step": 2}\n[3]\n{"step": "3"}\n{"step": 3}\n')
    assert rewind(path, 9) == 3
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    inode = path.stat().st_ino
    assert rewind(path, 9) == 3 and path.stat().st_ino == inode, "a good file is not written again"


def test_events_go_on_after_a_half_line(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event": "start"}\n' + b"x" * 70000)
    events = Events(path)
    events.add("save", step=3)
    events.close()
    first, second = rows(path)
    assert first == {"event": "start"} and second["event"] == "save" and second["step"] == 3 and second["time"] > 1e9


def test_a_full_disk_keeps_the_rows_and_warns_once(tmp_path, monkeypatch, caplog):
    """First a short write, then nothing goes; when there is space again every row is there, in order."""
    metrics, write, room = Metrics(tmp_path / "m.jsonl", 0), os.write, [10]

    def full_disk(fd, data):
        if room[0]:
            count = write(fd, data[: room.pop()])
            room.append(0)
            return count
        raise OSError(errno.ENOSPC, "No space left on device")

    metrics.append({"step": 1})
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "write", full_disk)
        for step in range(2, 6):
            metrics.append({"step": step, "train/loss": 0.1})
        metrics.sync()
    assert len(caplog.records) == 1 and "disk is full" in caplog.text
    assert rows(tmp_path / "m.jsonl") == [{"step": 1}] and (tmp_path / "m.jsonl").read_bytes().endswith(b"\n")
    metrics.append({"step": 6})
    metrics.close()
    assert [row["step"] for row in rows(tmp_path / "m.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_killed_while_appending_at_random_times(tmp_path):
    rng, path, resume = random.Random(3), tmp_path / "metrics.jsonl", 0
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            try:
                metrics = Metrics(path, resume)
                for step in range(resume + 1, 10**7):
                    metrics.append({"step": step, "train/loss": 1 / step})
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.01, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = [row["step"] for row in rows(path)]
        assert found == list(range(1, len(found) + 1))
        resume = rng.randint(0, len(found))
    assert resume or found
