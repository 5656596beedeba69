"""The live line as documented, the panel, the picture, TensorBoard; and nothing of it stops a run."""

import errno
import io
import logging
import struct
import sys
import warnings

import pytest

from megallm.run import console as reporting
from megallm.run.console import (
    EtaClock,
    LossCurve,
    Reporter,
    TensorBoard,
    format_count,
    format_line,
    format_lr,
    format_seconds,
)

ROW = {
    "step": 1200,
    "consumed_tokens": 1200 * 16384,
    "train/loss": 2.41352,
    "train/grad_norm": 0.8123,
    "train/lr": 3e-4,
    "perf/tokens_per_sec": 18204.3,
    "perf/tokens_per_sec_per_device": 4551.1,
    "perf/mfu": 0.4119,
    "perf/step_seconds": 0.9001,
    "mem/peak_gib": 3.1,
}
LINE = (
    "step 1200/20000 | loss 2.4135 | gnorm 0.81 | lr 3.0e-4 | 18.2k tok/s (4.6k/dev) | mfu 41.2% | 0.90 s"
    " | mem 3.1 GiB | ckpt 1150 | eta 4h41m"
)


@pytest.fixture(autouse=True)
def lines_reach_the_test(monkeypatch):
    """Whatever an earlier test did to logging."""
    monkeypatch.setattr(logging.getLogger("megallm"), "propagate", True)


def test_the_line_is_the_documented_one():
    assert format_line(ROW, 20000, 1150, 4 * 3600 + 41 * 60 + 10) == LINE


def test_what_is_not_known_keeps_its_place():
    line = format_line({"step": 1, "train/loss": float("nan")}, 10, None, None)
    assert line == (
        "step 1/10 | loss nan | gnorm - | lr - | - tok/s (-/dev) | mfu - | - s | mem - GiB | ckpt - | eta -"
    )
    assert line.count("|") == LINE.count("|")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.0"), (8.34, "8.3"), (99.96, "100"), (812.4, "812"), (999.6, "1.0k"), (18204, "18.2k"), (999949, "999.9k"),
     (999960, "1.0M"), (4.6e6, "4.6M"), (2.5e9, "2.5G"), (3e12, "3.0T")],
)  # fmt: skip
def test_counts(value, text):
    assert format_count(value) == text


def test_rates_and_times():
    assert [format_lr(v) for v in (3e-4, 0.0, 1.0, 2.96e-12)] == ["3.0e-4", "0.0e0", "1.0e0", "3.0e-12"]
    times = {0.4: "0s", 59.4: "59s", 59.6: "1m00s", 2480: "41m20s", 16860: "4h41m", 86399.6: "1d0h", 183600: "2d3h"}
    assert {seconds: format_seconds(seconds) for seconds in times} == times


def test_eta_is_the_pace_of_the_last_steps():
    clock = EtaClock(1000)
    assert clock.eta(1, 50.0) is None  # the start-up does not count
    assert clock.eta(2, 52.0) == pytest.approx(998 * 2)
    for step in range(3, 300):
        left = clock.eta(step, 52.0 + (step - 2) * 0.5)
    assert left == pytest.approx(701 * 0.5)
    assert clock.eta(1000, 500.0) == 0


def test_plain_lines_every_so_often_and_at_the_end():
    stream, kept = io.StringIO(), io.StringIO()
    reporter = Reporter(stream, total_steps=7, every=3, log_stream=kept)
    for step in range(1, 8):
        reporter.step({**ROW, "step": step, **({"val/loss": 2.5} if step == 4 else {})}, last_checkpoint=2)
    reporter.note("saved step 7")
    reporter.close()
    lines = stream.getvalue().splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "step 3/7", "step 4/7", "step 6/7", "step 7/7", "saved step 7",
    ]  # fmt: skip
    assert lines[1] == "step 4/7 | val loss 2.5000" and "\x1b" not in stream.getvalue()
    assert kept.getvalue() == stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_panel_and_the_log_its_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream, kept = Terminal(), io.StringIO()
    reporter = Reporter(stream, total_steps=20000, log_stream=kept)
    reporter.step(ROW, last_checkpoint=1150)
    reporter.note("saved step 1200")
    reporter.close()
    shown = stream.getvalue()
    assert all(part in shown for part in ("step 1200/20000", "2.4135", "41.2%", "saved step 1200", "╭"))
    assert kept.getvalue().startswith("step 1200/20000 | loss 2.4135")


def test_a_warning_stands_above_the_panel_and_the_last_words_below_it(monkeypatch):
    """Issue R, B.15: a line on stderr is drawn over by the next frame of the panel."""
    monkeypatch.setenv("TERM", "xterm")
    stream, kept = Terminal(), io.StringIO()
    reporter = Reporter(stream, total_steps=20000, log_stream=kept)
    reporter.step(ROW)
    logging.getLogger("megallm.run.rows").warning("Cannot write %s.", "metrics.jsonl")
    warnings.warn("of a library", stacklevel=1)
    reporter.step({**ROW, "step": 1201})
    reporter.close(("step 1201 is saved", "next: megallm generate"))
    shown = stream.getvalue()
    assert shown.index("Cannot write metrics.jsonl.") < shown.index("step 1201/20000") and "of a library" in shown
    assert shown.endswith("step 1201 is saved\nnext: megallm generate\n")
    assert kept.getvalue().endswith("step 1201 is saved\nnext: megallm generate\n")
    assert "Cannot write metrics.jsonl." in kept.getvalue()
    assert not [one for one in logging.getLogger("megallm").handlers if one.__class__.__name__ == "_Notes"]


def test_a_closed_terminal_or_a_full_disk_does_not_stop_a_run(caplog):
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    class BrokenTerminal(Broken):
        def isatty(self):
            return True

    for stream in (Broken(), BrokenTerminal()):
        kept = io.StringIO()
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            reporter = Reporter(stream, total_steps=3, log_stream=kept)
            for step in (1, 2, 3):
                reporter.step({**ROW, "step": step})
            reporter.close()
        assert len(kept.getvalue().splitlines()) == 3
        assert len(caplog.records) == 1


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_the_loss_curve(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "train/loss": 3.0, "consumed_tokens": 10}\n{"step": 2, "train/loss": null}\nbad')
    curve = LossCurve(tmp_path / "loss.png", "a run", metrics, seconds=1e9)
    curve.add({"step": 3, "train/loss": 2.0, "val/loss": 2.5, "consumed_tokens": 30})
    assert not (tmp_path / "loss.png").exists()
    figure = curve._figure()
    axes = figure.axes[0]
    assert [line.get_label() for line in axes.lines] == ["training", "held out"]
    assert list(axes.lines[0].get_xdata()) == [1, 3] and list(axes.lines[1].get_ydata()) == [2.5]
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("a run", "step", "loss (nats per token)")
    assert axes.child_axes[0].get_xlabel() == "consumed tokens"
    curve.close()
    assert png_size(tmp_path / "loss.png") == (960, 540)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_a_long_curve_is_thinned_to_its_means():
    series = reporting._Series()
    for step in range(1, 10001):
        series.add(step, step * 2.0)
    steps, values = series.thinned()
    assert len(steps) == 2000 and steps[0] == 3 and values[0] == 6.0 and values[-1] == 2 * 9998


def test_a_picture_that_cannot_be_drawn_is_told_once(tmp_path, caplog, monkeypatch):
    curve = LossCurve(tmp_path / "missing" / "loss.png", "a run", seconds=0)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            curve.add({"step": step, "train/loss": 2.0})
        assert len(caplog.records) == 1 and "cannot be drawn" in caplog.text
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        other = LossCurve(tmp_path / "loss.png", "a run", seconds=0)
        other.add({"step": 1, "train/loss": 2.0})
    assert len(caplog.records) == 2 and list(tmp_path.iterdir()) == []


def test_tensorboard_gets_every_metric_and_hides_the_cut_steps(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((0, 5), (3, 6)):
        board = TensorBoard(tmp_path, first)
        for step in range(first + 1, last + 1):
            board.add({"step": step, "consumed_tokens": 1, "train/loss": float(step + first), "perf/mfu": None})
        board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, 7), (5, 8), (6, 9)]


def test_tensorboard_that_is_missing_or_fails_is_told_once(tmp_path, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING):
        board = TensorBoard(tmp_path / "a")
        if board._writer is not None:

            def full(*_):
                raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(board._writer, "add_scalar", full)
        for step in (1, 2):
            board.add({"step": step, "train/loss": 1.0})
        board.close()
        assert len(caplog.records) == 1
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        board = TensorBoard(tmp_path / "b")
        board.add({"step": 1, "train/loss": 1.0})
        board.close()
    assert len(caplog.records) == 2 and "Install the package" in caplog.text
