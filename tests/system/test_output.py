"""Output never decides over training (issue R, B.11): full disks, vanished terminals, readers that do not read."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from megallm.base.output import BackgroundWriter, FdWriter, LossyText
from tests.system.commands import _environment, make_corpus, rows_of, write_config

STEPS = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def popen(folder: Path, prefix: str, out, err, **sections) -> subprocess.Popen:
    """`megallm pretrain` of a few steps with these streams."""
    sections = {"train": {"steps": STEPS}, "checkpoint": {"every": 0}} | sections
    config = write_config(folder / "c.yaml", prefix, **sections)
    return subprocess.Popen(
        [sys.executable, "-m", "megallm", "pretrain", str(config)],
        cwd=folder, env=_environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
    )  # fmt: skip


def full_pipe() -> tuple[int, int]:
    """A pipe that takes nothing any more: a reader that does not read."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(write_end, b"x" * 4096)
    os.set_blocking(write_end, True)
    return read_end, write_end


def wait_for_row(run: Path, step: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while max((row["step"] for row in rows_of(run)), default=0) < step:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_b11_a_full_disk_under_stdout_costs_lines_and_their_count_is_told(tmp_path, corpus):
    with open("/dev/full", "wb") as full:
        process = popen(tmp_path, corpus, full, subprocess.PIPE)
        err = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 0, err
    assert "lines could not be written to stdout (No space left on device)" in err
    log = (tmp_path / "run/logs/rank-0.log").read_text()
    assert f"step {STEPS}/{STEPS}" in log and "lines could not be written to stdout" in log
    assert saved(tmp_path / "run") == [f"step-{STEPS:08d}"]


def test_b11_a_reader_that_does_not_read_neither_blocks_nor_keeps_sigterm_away(tmp_path, corpus):
    """stdout and stderr are one pipe that is full: TERM saves and leaves with 75 within seconds."""
    read_end, write_end = full_pipe()
    process = popen(tmp_path, corpus, write_end, write_end, train={"steps": 5000}, checkpoint={"every": 0})
    os.close(write_end)
    wait_for_row(tmp_path / "run", 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    os.close(read_end)
    step = rows_of(tmp_path / "run")[-1]["step"]
    assert saved(tmp_path / "run") == [f"step-{step:08d}"] and not (tmp_path / "run/LOCK").exists()


@pytest.mark.parametrize("verb", ["presets", "data verify PREFIX", "--help"])
@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_b11_a_result_that_cannot_be_written_is_no_bug_of_ours(tmp_path, corpus, verb, buffered):
    """It was exit code 70 with a traceback, or 120 of the interpreter."""
    words = [sys.executable, "-m", "megallm", *verb.replace("PREFIX", corpus).split()]
    environment = _environment() | {"PYTHONUNBUFFERED": buffered}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
        told = subprocess.run(words, stdout=subprocess.PIPE, stderr=full, text=True, env=environment, cwd=tmp_path)
    wanted = "megallm: error: The standard output cannot be written: No space left on device.\n"
    assert (done.returncode, done.stderr) == (73, wanted)
    assert told.returncode == 0 and told.stdout, "what is only told decides over nothing"


@pytest.fixture
def text_run(tmp_path) -> list[str]:
    """The words of `pretrain --text` on a little text."""
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / f"text/{number}.txt").write_text(f"The river runs by mill {number}, all day long. " * 5)
    settings = "layout.dp=1 train.steps=2 train.global_batch=2 train.micro_batch=2 eval.batches=0 log.plot=false"
    words = ["pretrain", "--text", "text", "--preset", "tiny-1m", "run.dir=run", *settings.split()]
    return [sys.executable, "-m", "megallm", *words]


def test_b11_from_text_with_an_output_that_is_full(tmp_path, text_run):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(text_run, cwd=tmp_path, env=_environment(), stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert saved(tmp_path / "run") == ["step-00000002"]


def test_b11_from_text_with_a_reader_that_does_not_read_ends(tmp_path, text_run):
    """Its last word blocked, when the signals had nothing to end any more."""
    read_end, write_end = full_pipe()
    process = subprocess.Popen(text_run, cwd=tmp_path, env=_environment(), stdout=write_end, stderr=subprocess.DEVNULL)
    os.close(write_end)
    try:
        assert process.wait(90) == 0
    finally:
        process.kill()
        os.close(read_end)
    assert saved(tmp_path / "run") == ["step-00000002"]


def test_b11_descriptors_that_are_not_there(tmp_path, corpus):
    """`<&- >&- 2>&-`: the next files that are opened must not become stdout and stderr."""
    config = write_config(tmp_path / "c.yaml", corpus, train={"steps": STEPS}, checkpoint={"every": 0})
    words = f"exec {sys.executable} -m megallm pretrain {config} <&- >&- 2>&-"
    process = subprocess.Popen(["bash", "-c", words], cwd=tmp_path, env=_environment(), start_new_session=True)
    assert process.wait(60) == 0
    assert saved(tmp_path / "run") == [f"step-{STEPS:08d}"] and len(rows_of(tmp_path / "run")) == STEPS


def on_terminal(folder: Path, prefix: str, ignore_hangup: bool) -> tuple[subprocess.Popen, int]:
    """A run whose controlling terminal is a new pty; its master end."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, b"\x28\0\x78\0\0\0\0\0")
    config = write_config(folder / "c.yaml", prefix, train={"steps": 5000}, checkpoint={"every": 0})

    def own_the_terminal() -> None:
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        if ignore_hangup:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = subprocess.Popen(
        [sys.executable, "-m", "megallm", "pretrain", str(config)],
        cwd=folder, env=_environment() | {"TERM": "xterm"}, stdin=slave, stdout=slave, stderr=slave,
        preexec_fn=own_the_terminal,
    )  # fmt: skip
    os.close(slave)
    os.set_blocking(master, False)
    return process, master


def read_terminal(master: int) -> str:
    text = b""
    try:
        while chunk := os.read(master, 1 << 16):
            text += chunk
    except OSError:  # nothing more, or the other end is closed
        pass
    return text.decode(errors="replace")


@pytest.mark.parametrize("nohup", [False, True])
def test_b12_a_terminal_that_closes_saves_and_under_nohup_the_run_goes_on(tmp_path, corpus, nohup):
    """A real hangup of the kernel; then every write to the terminal is EIO."""
    process, master = on_terminal(tmp_path, corpus, nohup)
    wait_for_row(tmp_path / "run", 3, process)
    read_terminal(master)
    os.close(master)
    if nohup:
        wait_for_row(tmp_path / "run", rows_of(tmp_path / "run")[-1]["step"] + 10, process)
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    step = rows_of(tmp_path / "run")[-1]["step"]
    assert saved(tmp_path / "run") == [f"step-{step:08d}"] and not (tmp_path / "run/LOCK").exists()


def test_b15_ctrl_c_on_a_terminal_is_answered_and_the_last_word_says_what_is_saved(tmp_path, corpus):
    process, master = on_terminal(tmp_path, corpus, False)
    wait_for_row(tmp_path / "run", 3, process)
    os.write(master, b"\x03")  # the terminal makes SIGINT of it
    shown, end = "", time.monotonic() + 30
    while process.poll() is None and time.monotonic() < end:
        shown += read_terminal(master)
        time.sleep(0.02)
    shown += read_terminal(master)
    step = rows_of(tmp_path / "run")[-1]["step"]
    assert process.returncode == 130
    assert "stopping when this step is done; press Ctrl-C again to stop at once" in shown
    last = shown.rstrip().splitlines()[-1]
    assert f"Interrupted after step {step}: step {step} is saved in run/checkpoints/" in last
    assert "error" not in last and "the same command goes on." in last


# --- the writers


def test_lines_that_were_dropped_are_counted_where_they_are_missing():
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    writer = BackgroundWriter(write_end, limit_bytes=8192)
    begin = time.monotonic()
    for number in range(400):
        writer.write(b"%0100d\n" % number)
    assert time.monotonic() - begin < 10 and writer.dropped > 200
    got = b""
    while writer._taken < writer._given or not got:  # the last bytes may be here before they count as taken
        if select.select([read_end], [], [], 0.05)[0]:
            got += os.read(read_end, 1 << 16)
    writer.write(b"after\n")
    assert writer.close(5) == writer.dropped
    got += os.read(read_end, 1 << 16)
    lines = got.decode().splitlines()
    assert lines[-1] == "after"
    assert lines[-2] == f"megallm: {writer.dropped} lines of output are missing here (nobody read them)."
    assert [int(line) for line in lines[:-2]] == list(range(400 - writer.dropped))


def test_a_stream_of_a_rank_never_raises_and_recovers():
    with open("/dev/full", "wb", buffering=0) as full:
        writer = FdWriter(full.fileno())
        text = LossyText(writer)
        for _ in range(3):
            text.write("line\n")
        text.write("half a line")
        text.flush()
        assert writer.close() == 4 and writer.reason == "No space left on device"
        read_end, write_end = os.pipe()
        os.close(read_end)
        writer.fd = write_end
        text.write("nobody is there\n")
        assert writer.close() == 5 and writer.reason == "Broken pipe"
        read_end, write_end = os.pipe()
        writer.fd = write_end
        text.write("again \ud800\n")
    assert os.read(read_end, 999) == (
        b"megallm: 5 lines of output are missing here (Broken pipe).\nagain \\ud800\n"
    )
