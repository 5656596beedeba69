"""The extension is optional, and which form runs is never a secret."""

from __future__ import annotations

import types

import pytest

from megallm.base import extension
from megallm.base.errors import UsageError


@pytest.fixture(autouse=True)
def fresh():
    extension._load.cache_clear()
    yield
    extension._load.cache_clear()


def test_missing_extension_falls_back_and_says_why(monkeypatch):
    monkeypatch.setattr(extension, "MODULE", "megallm._no_such_module")
    assert extension.index() is None
    status = extension.status()
    assert not status.loaded and "numpy twin" in status.detail
    with pytest.raises(UsageError, match="asked for but"):
        extension.index(True)


@pytest.mark.parametrize("version, loaded", [(extension.VERSION, True), (extension.VERSION + 1, False)])
def test_stale_build_is_not_used(monkeypatch, version, loaded):
    fake = types.SimpleNamespace(VERSION=version, __file__="somewhere.so")
    monkeypatch.setattr(extension.importlib, "import_module", lambda name: fake)
    assert (extension.index() is fake) == loaded
    assert extension.status().loaded == loaded and "somewhere.so" in extension.status().detail
    assert extension.index(False) is None
