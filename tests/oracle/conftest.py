"""Options of the layout oracle's tests: `pytest tests/oracle -m oracle --layouts 200 --seed 7`."""

from __future__ import annotations

import pytest

DEFAULT_LAYOUTS, DEFAULT_SEED = 6, 0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("oracle")
    group.addoption("--layouts", type=int, default=DEFAULT_LAYOUTS, help="random layouts to compare with the reference")
    group.addoption("--seed", type=int, default=DEFAULT_SEED, help="seed of the random layouts")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "oracle: layouts against the independent float64 reference")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "random_row" in metafunc.fixturenames:
        from megallm.oracle.table import sample_rows

        wanted = metafunc.config.getoption("--layouts", default=DEFAULT_LAYOUTS)
        rows = sample_rows(wanted, metafunc.config.getoption("--seed", default=DEFAULT_SEED))
        metafunc.parametrize("random_row", rows, ids=[f"{row.name}-{row.model}-{row.layout_text}" for row in rows])
