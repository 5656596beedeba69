"""Each command of README.md, run literally in a fresh clone in an empty folder.

The two long commands run literally in the test marked slow (they install PyTorch). The others, and the second one with
a documented argument, run in every suite: there the clone's `.venv` is a door to the interpreter that runs the tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megallm.cli.completion import options
from megallm.cli.table import VERBS
from tests.system.commands import ROOT

LONG = ("bash examples/01_pretrain/run.sh", "bash tests/run.sh")


def commands() -> list[str]:
    """The lines of README's code blocks that are commands, without the comments beside them."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [re.sub(r"\s+# .*", "", line) for line in lines if re.match(r"(bash|megallm|source|python|docker) ", line)]


def shell(command: str, cwd: Path, timeout: float, **more: str) -> subprocess.CompletedProcess[str]:
    kept = ("HOME", "LANG", "PATH", "PIP_INDEX_URL", "PIP_CONFIG_FILE", "HTTPS_PROXY", "SSL_CERT_FILE", "TMPDIR")
    environment = {name: os.environ[name] for name in kept if name in os.environ} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False,
        env=environment | more,
    )  # fmt: skip


@pytest.fixture
def clone(tmp_path) -> Path:
    """What a person gets: the committed files, nothing else."""
    target = tmp_path / "megallm"
    done = shell(f"git clone -q --no-hardlinks '{ROOT}' '{target}'", tmp_path, 120)
    if done.returncode:
        pytest.skip(f"this is no git repository that can be cloned: {done.stderr.strip()}")
    return target


def open_door(clone: Path) -> None:
    """A `.venv` in the clone whose programs are those of the interpreter that runs this test.

    It says of itself that it is installed, as tools/install.sh does, and installs nothing: that would change the
    interpreter's own packages.
    """
    binaries = clone / ".venv/bin"
    binaries.mkdir(parents=True)
    refusal = '[ "$1 $2" = "-m pip" ] && echo "nothing is installed through this .venv" >&2 && exit 9\n'
    for name, words in (("python", ""), ("megallm", "-m megallm ")):
        program = binaries / name
        program.write_text(f'#!/bin/sh\n{refusal}PYTHONPATH="{clone}" exec "{sys.executable}" {words}"$@"\n')
        program.chmod(0o755)
    (binaries / "activate").write_text(f'PATH="{binaries}:$PATH"\n')
    script = (clone / "tools/install.sh").read_text()
    state = re.findall(r"^state=\$\((.*)\)$", script, flags=re.M)
    assert len(state) == 1 and 'stamp=$venv/megallm-installed-${extras:-plain}' in script
    assert shell(f"extras=test; {state[0]} > .venv/megallm-installed-test", clone, 20).returncode == 0


def test_the_two_commands_are_there():
    assert commands()[:2] == list(LONG)


def test_short_commands_run_in_a_fresh_clone(clone):
    open_door(clone)
    short = [command for command in commands() if command not in LONG]
    assert len(short) >= 5
    for command in short:
        done = shell(f"source .venv/bin/activate; {command}", clone, 180)
        assert done.returncode == 0 and done.stdout, f"{command}: {done.stdout}{done.stderr}"
    assert shell("git status --porcelain", clone, 20).stdout == "", "a command left files behind"


def test_the_suite_starts_in_a_fresh_clone(clone):
    """`bash tests/run.sh` with a documented argument: which tests to run."""
    open_door(clone)
    done = shell("bash tests/run.sh tests/base", clone, 300, MEGALLM_FACILITIES="no")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_a_stale_clone_would_install(clone):
    """The control: with another setup.py the same command goes to pip."""
    open_door(clone)
    (clone / "setup.py").write_text((clone / "setup.py").read_text() + "\n")
    done = shell("bash tests/run.sh tests/base", clone, 60, MEGALLM_FACILITIES="no")
    assert done.returncode == 9 and "nothing is installed through this .venv" in done.stderr


@pytest.mark.slow
def test_the_two_commands_literally(clone):
    """Minutes, and needs a package index: both commands as they stand, one after the other."""
    for command in LONG:
        done = shell(command, clone, 3600)
        assert done.returncode == 0, f"{command}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    assert (clone / "examples/01_pretrain/work/run/plots/loss.png").exists()


def test_every_verb_is_in_the_table_and_every_path_exists():
    text = (ROOT / "README.md").read_text()
    table = " ".join(re.findall(r"^\| `megallm .*?\|", text, flags=re.M))
    for words in VERBS:
        assert words.split()[0] in table and words.split()[-1] in table, f"README does not name `megallm {words}`"
    for path in re.findall(r"\]\(([\w./-]+)\)", text) + re.findall(r"`((?:docs|megallm|examples)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"^  (\w+)/ ", text, flags=re.M):
        assert (ROOT / "megallm" / name).is_dir(), name
    packages = {path.name for path in (ROOT / "megallm").iterdir() if (path / "__init__.py").exists()}
    assert packages <= set(re.findall(r"^  (\w+)/ ", text, flags=re.M))


PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*/*.md")])


def unknown_options(text: str) -> list[str]:
    """Options of `megallm VERB --option` commands, in blocks or between backticks, that the verb does not have."""
    known, found = {verb: {name for name, _ in rows} for verb, rows in options().items()}, []
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for command in [*lines, *re.findall(r"`(megallm [^`]+)`", text)]:
        command = re.sub(r"\"[^\"]*\"|'[^']*'|\s# .*", " x", command)  # neither texts nor comments
        for words in re.findall(r"\bmegallm ([a-z].*)", command):
            first = words.split()
            verb = next((" ".join(first[:n]) for n in (2, 1) if " ".join(first[:n]) in known), None)
            if verb is not None:
                named = re.findall(r"(?:^|\s)(--[a-z][a-z-]*)", words)
                found += [f"megallm {verb} {name}" for name in named if name not in known[verb] | {"--help"}]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.parent.name + "/" + path.name)
def test_the_pages_name_real_options(page):
    assert unknown_options(page.read_text()) == []


def test_an_option_that_is_not_there_is_noticed():
    block = "megallm ckpt ls runs --outptu x   # --no\nmegallm config a --world 2 \\\n  --worlds 3\n"
    text = f"x\n```\n{block}```\n`megallm oracle --lst`"
    assert unknown_options(text) == ["megallm ckpt ls --outptu", "megallm config --worlds", "megallm oracle --lst"]


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_the_pages_name_real_files_and_verbs(page):
    text = (ROOT / "docs" / page).read_text()
    names = r"(?<![\w/.])((?:docs|megallm|examples|tests|tools)/[\w/]+\.(?:md|py|sh|sbatch|yaml))"
    for path in re.findall(names, text):
        assert (ROOT / path).exists() or "/work/" in path, f"{page} names {path}, which does not exist"
    firsts = {words.split()[0] for words in VERBS}
    code = "".join(re.findall(r"^```\n(.*?)^```", text, flags=re.M | re.S))
    for verb in re.findall(r"^megallm (\w+)", code, flags=re.M):
        assert verb in firsts, f"{page} names megallm {verb}, which is no verb"
