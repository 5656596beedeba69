"""Completion scripts: every verb and option is in them, and the shells that are here read them."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import time

import pytest

from megallm.cli.completion import SHELLS, options, script
from megallm.cli.main import main
from megallm.cli.table import VERBS


@pytest.mark.parametrize("shell", SHELLS)
def test_every_verb_and_option_is_there(shell):
    text = script(shell)
    words = set(text.replace("'", " ").replace("\n", " ").split())
    for verb, rows in options().items():
        assert words >= set(verb.split())
        for name, _ in rows:
            assert name in words or f"-l {name[2:]} " in text, (verb, name)
    assert options().keys() == VERBS.keys() and "--socket" not in text


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_reads_it(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    path = tmp_path / "completion"
    path.write_text(script(shell))
    done = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0 and done.stderr == ""


def complete(line: str) -> set[str]:
    """What bash offers for the last word of a line."""
    words = line.split(" ")
    array = " ".join(f"'{word}'" for word in words)
    code = f'{script("bash")}\nCOMP_WORDS=({array}); COMP_CWORD={len(words) - 1}; _megallm; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=30, check=True, cwd="/")
    return set(done.stdout.split())


def test_bash_completes():
    assert complete("megallm gen") == {"generate"}
    assert {"ls", "show", "dump"} <= complete("megallm ckpt ")
    assert complete("megallm ckpt d") >= {"diff", "dump"} and "ls" not in complete("megallm ckpt d")
    assert complete("megallm ckpt dump --ou") == {"--output"}
    assert complete("megallm generate --rep") == {"--repetition-penalty"}
    assert complete("megallm nonsense --rep") == set()


def test_fish_completes(tmp_path):
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    (tmp_path / "megallm.fish").write_text(script("fish"))
    for line, words in (("megallm gen", ["generate"]), ("megallm ckpt dump --ou", ["--output"])):
        code = f"source {tmp_path}/megallm.fish; complete -C '{line}'"
        done = subprocess.run(["fish", "-c", code], capture_output=True, text=True, timeout=60, check=True)
        assert [row.split("\t")[0] for row in done.stdout.splitlines()] == words


def press_tab(lines: list[str], expected: list[str]) -> None:
    """Type each line and a tab into an interactive zsh; fails when the expected words do not appear."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update({"TERM": "dumb", "PS1": "> "})
        os.execvp("zsh", ["zsh", "-f", "-i"])
    try:
        for line, wanted in zip(lines, expected, strict=True):
            os.write(terminal, line.encode())
            seen, deadline = "", time.monotonic() + 30
            while wanted not in seen:
                assert time.monotonic() < deadline, (line, seen)
                if select.select([terminal], [], [], 0.2)[0]:
                    seen += os.read(terminal, 4096).decode(errors="replace")
            while select.select([terminal], [], [], 1.0)[0]:  # the prompt has come when nothing more does
                os.read(terminal, 4096)
            os.write(terminal, b"\x15")  # empties the line
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


@pytest.mark.parametrize("way", ["a folder of $fpath", "source"])
def test_zsh_completes(way, tmp_path):
    """A file named _megallm that compinit finds by its first line, and at the first tab; or sourced."""
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    (tmp_path / "_megallm").write_text(script("zsh"))
    begin = f"fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -u -D; echo rea''dy\n"
    if way == "source":
        begin = f"autoload -Uz compinit; compinit -u -D; source {tmp_path}/_megallm; echo rea''dy\n"
    press_tab([begin, "megallm genera\t", "megallm generate --repe\t"], ["ready", "generate ", "tition-penalty "])


def test_an_unknown_shell_is_refused(capsys):
    assert main(["completion", "powershell"]) == 2
    assert "bash" in capsys.readouterr().err
