"""docs/faults.md: every test that it names exists, and every row of the contract has its place."""

from __future__ import annotations

import re

import pytest

from tests.system.commands import ROOT

PAGE = (ROOT / "docs/faults.md").read_text()
NAMED = re.compile(r"`([a-z_]+/test_[a-z0-9_]+\.py)::(test_[a-z0-9_]+)`")
ROWS = 90


def rows_of(page: str) -> set[int]:
    """Numbers of rows in the first column of the table."""
    cells = re.findall(r"^\| ([0-9][0-9, ]*) \|", page, flags=re.M)
    return {int(number) for cell in cells for number in cell.split(",")}


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED.findall(PAGE))))
def test_what_the_page_names_is_there(file, name):
    assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), flags=re.M)


def test_every_row_has_tests_or_stands_among_what_is_not_covered():
    table, _, rest = PAGE.partition("## Not covered")
    told = {int(number) for number in re.findall(r"\b(\d+)\b", rest.splitlines()[2] + rest.splitlines()[3])}
    assert rows_of(table) | told >= set(range(1, ROWS + 1)) and not rows_of(table) & told
    without_tests = [line for line in table.splitlines() if re.match(r"\| \d", line) and not NAMED.search(line)]
    assert without_tests == []


def test_a_row_that_is_missing_is_noticed():
    assert 41 in rows_of(PAGE) and 41 not in rows_of(PAGE.replace("| 41 |", "| 1 |"))
