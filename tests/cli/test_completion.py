"""Completion scripts: every verb and option is in them, and the shells that are here read them."""

from __future__ import annotations

import shutil
import subprocess

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


def test_an_unknown_shell_is_refused(capsys):
    assert main(["completion", "powershell"]) == 2
    assert "bash" in capsys.readouterr().err
