"""Issue R, C.23: nothing that others wrote steers the terminal, whoever prints it."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.progress import Progress
from rich.text import Text

from megallm.base import terminal
from megallm.cli import main as cli
from megallm.launch.local import RanksFailed, run_ranks
from megallm.run.console import Reporter

ESC = "\x1b[31m"
RAW = [chr(code) for code in (*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x2028, 0x202E, 0x2066, 0xDC80)]


def test_every_control_character_is_written_out_and_text_is_not():
    assert all(terminal.escaped(f"a{raw}b").isascii() and len(terminal.escaped(raw)) >= 4 for raw in RAW)
    text = "Zażółć\tgęślą\njaźń 日本語 👩‍👩‍👧 \\x1b"
    assert terminal.escaped(text) == text
    assert terminal.escaped(f"{ESC}x\r\x9b2J") == "\\x1b[31mx\\x0d\\x9b2J"
    assert terminal.escaped(terminal.escaped(ESC)) == terminal.escaped(ESC)


def test_progress_may_go_back_to_the_left_and_nothing_else():
    raw = io.StringIO()
    stream = terminal.Escaping(raw, notes=True)
    stream.write("\r\x1b[Kstep 1")
    stream.write("\rstep 2 \r\x1b[2J")
    assert raw.getvalue() == "\r\x1b[Kstep 1\rstep 2 \\x0d\\x1b[2J"
    raw = io.StringIO()
    terminal.Escaping(raw).writelines(["\rx", "\n"])
    assert raw.getvalue() == "\\x0dx\n"


def test_rich_keeps_its_own_codes():
    raw = io.StringIO()
    console = terminal.console(terminal.Escaping(raw), force_terminal=True, color_system="truecolor", width=60)
    console.print(Panel(Text(f"run {ESC}\x07", style="bold")))
    with Progress(console=console, auto_refresh=False) as bars:
        bars.add_task(f"file{ESC}", total=2)
    shown = raw.getvalue()
    assert ESC not in shown and "\x07" not in shown and "run \\x1b[31m" in shown and "file\\x1b" in shown
    assert "\x1b[1m" in shown and "\x1b[?25h" in shown  # bold, and the cursor is shown again


def test_the_panel_and_the_log_of_a_run():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown, log = Terminal(), io.StringIO()
    reporter = Reporter(shown, 3, log_stream=log)
    reporter.note(f"run folder {ESC}")
    reporter.close()
    for text in (shown.getvalue(), log.getvalue()):
        assert ESC not in text and "run folder \\x1b[31m" in text


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: ["config", folder / f"a{ESC}\x07.yaml"],  # a path
        lambda folder: ["config", written(folder, 'run:\n  "\\e]0;title\\a": 1\n')],  # a YAML key
        lambda folder: ["config", written(folder, 'optim: {rule: "\\e[2J"}\ndata: {sources: {"\\x9b2J": 1}}\n')],
        lambda folder: [f"{ESC}verb"],
        lambda folder: ["ckpt", f"{ESC}ls"],
        lambda folder: ["pretrain", "c.yaml", f"--{ESC}"],
        lambda folder: ["pretrain", "--text", folder / f"{ESC}"],
        lambda folder: ["config", "/dev/null", f"{ESC}=1", "\udc80=2"],
        lambda folder: ["data", "show", folder / f"\r{ESC}"],
        lambda folder: ["generate", "--model", folder / f"{ESC}", "--prompt", "x", "--json", f"/nowhere/{ESC}"],
        lambda folder: ["curate", written(folder, '"\\e[2J": 1\n'), "--output", folder / "out"],
    ],
)
def test_arguments_paths_keys_and_values(capfd, tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    code = cli.main([str(word) for word in make(tmp_path)])
    captured = capfd.readouterr()
    assert code not in (0, 70)
    assert not any(raw in captured.out + captured.err for raw in RAW), captured
    assert "\\x" in captured.err


def written(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text)
    return path


def test_contents_of_a_dataset(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.jsonl").write_text(json.dumps({"text": f"before{ESC}\x07after\tand\nso on"}) + "\n")
    assert cli.main(["preprocess", "--input", "t.jsonl", "--output", "d", "--tokenizer", "bytes"]) == 0
    capfd.readouterr()
    assert cli.main(["data", "show", "d_text_document", "--tokenizer", "bytes"]) == 0
    assert "before\\x1b[31m\\x07after\tand\nso on" in capfd.readouterr().out


def _print(env) -> None:
    print(f"rank {ESC}", flush=True)
    raise ValueError(f"bad {ESC}")


def test_what_a_rank_prints_and_its_traceback(capfd):
    with pytest.raises(RanksFailed):
        run_ranks(_print, (), 1, preload=())
    captured = capfd.readouterr()
    assert "rank \\x1b[31m" in captured.out and "bad \\x1b[31m" in captured.err
    assert ESC not in captured.out + captured.err


def test_rich_consoles_are_made_here_only():
    """A console on a filtered stream would have its own codes written out; one on a raw stream would filter nothing."""
    package = Path(terminal.__file__).parents[1]
    assert [path for path in package.rglob("*.py") if re.search(r"\bConsole\(", path.read_text())] == []


def test_the_streams_come_back():
    code = "import sys\nfrom megallm.cli.main import main\nbefore = sys.stdout\nmain(['--version'])\n"
    code += "assert sys.stdout is before\nprint('\\x1b')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.endswith("\x1b\n")
