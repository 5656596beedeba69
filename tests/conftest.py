"""`--without-extension` hides megallm._index, so that a run exercises the numpy twins."""

from __future__ import annotations

import sys

import pytest

from megallm.base import extension


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-extension", action="store_true", help="use the numpy twins of megallm._index")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--without-extension"):
        sys.modules[extension.MODULE] = None  # an import of it raises ImportError


def pytest_report_header(config: pytest.Config) -> str:
    status = extension.status()
    return f"{status.name}: {'loaded' if status.loaded else 'not loaded'}, {status.detail}"
