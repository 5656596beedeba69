"""What the documentation says in Python: the README's snippet runs, and docs/api.md names what is there."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_readme_s_snippet_trains(tmp_path):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{snippet}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.findall(r"\d+\.\d+", done.stdout))
    assert before > 5 and after < 0.5 * before


def missing_names(text: str) -> list[str]:
    """Names in the first column of the table that cannot be imported."""
    names, missing = re.findall(r"^\| `(megallm[\w.]*)` \|", text, re.MULTILINE), []
    assert names, "no row of the table was read"
    for name in names:
        module, _, leaf = name.rpartition(".")
        if leaf not in vars(importlib.import_module(module)):
            missing.append(name)
    return missing


def test_the_public_api_is_there():
    assert missing_names((ROOT / "docs" / "api.md").read_text()) == []


def test_a_name_that_is_gone_is_noticed():
    assert missing_names("| `megallm.engine.engine.Motor` | x |") == ["megallm.engine.engine.Motor"]
    with pytest.raises(AssertionError):
        missing_names("no table")


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), f"{page} links to {target}"


def strange_lines(page: str, source: str) -> list[str]:
    """Lines of a page's Python blocks that do not stand in the file that the page takes them from."""
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    return [line for line in block.splitlines() if line.strip() and f"\n{line}\n" not in source]


def test_the_trainer_of_the_page_is_the_one_that_is_tested():
    page = (ROOT / "docs/adding_a_trainer.md").read_text()
    assert strange_lines(page, (ROOT / "tests/training/test_supervised.py").read_text()) == []
    assert strange_lines("```python\nx = 1\ny = 2\n```", "\nx = 1\n") == ["y = 2"]
