"""A file is whole or absent, and what the system refuses becomes a sentence."""

from __future__ import annotations

import errno
import json
import os

import pytest

from megallm.base import files
from megallm.base.errors import CannotWrite


def test_written_files_are_whole(tmp_path):
    files.atomic_write_text(tmp_path / "a", "é\n")
    files.atomic_write_json(tmp_path / "b", {"x": 0.1 + 0.2})
    assert (tmp_path / "a").read_bytes() == "é\n".encode()
    assert json.loads((tmp_path / "b").read_text()) == {"x": 0.1 + 0.2}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_error_keeps_the_old_file_and_removes_the_new(tmp_path):
    files.atomic_write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), files.atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path and files.TEMPORARY in temporary.name
        _ = 1 / 0
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), files.atomic_path(tmp_path / "a") as temporary:
        temporary.mkdir()
        (temporary / "half").write_text("new")
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_reader_never_sees_a_part(tmp_path):
    with files.atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("half")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_text() == "half"


@pytest.mark.parametrize("code, words", [
    (errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only"), (errno.EACCES, "permission"),
    (errno.EIO, "input/output"), (errno.EMFILE, os.strerror(errno.EMFILE)),
])  # fmt: skip
def test_sentences(tmp_path, monkeypatch, code, words):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CannotWrite, match=f"Cannot write .*/a: .*{words}"):
        files.atomic_write_text(tmp_path / "a", "x")
    assert not list(tmp_path.iterdir())


def test_missing_folder_and_folder_in_the_way(tmp_path):
    with pytest.raises(CannotWrite, match="does not exist"):
        files.atomic_write_text(tmp_path / "no" / "a", "x")
    (tmp_path / "d").mkdir()
    with pytest.raises(CannotWrite, match="it is a folder"):
        files.atomic_write_text(tmp_path / "d", "x")
