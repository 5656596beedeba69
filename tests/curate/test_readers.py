"""Files of every kind and every fault: a document, or a reject with file and line, in bounded memory."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megallm.base import optional
from megallm.base.errors import DataError
from megallm.curate import readers, run
from megallm.curate.config import CurateConfig, InputConfig
from megallm.curate.document import Document

from .test_chain import config_of, kept, ledger, prose


def read(*names: Path, **changes: object) -> list[Document | readers.Reject]:
    config = InputConfig(files=tuple(map(str, names)), **changes)  # type: ignore[arg-type]
    files = readers.find_inputs(config)
    return [
        item for name in files for unit in readers.file_units(name, config) for item in readers.parse_unit(unit, config)
    ]


def line_of(item: Document | readers.Reject) -> tuple[int, str]:
    return (item.line, item.reason) if isinstance(item, readers.Reject) else (item.line, "")


def test_lines_that_are_no_documents(tmp_path: Path) -> None:
    lines: list[bytes] = [
        b'\xef\xbb\xbf{"text": "bom"}', b'{"text": "crlf"}\r', b"", b'{"text": "\xff"}', b"{", b"[" * 100_000,
        b'{"x": 1}',
        b'{"text": 5}',
        b'{"text": "\\ud800"}', b'{"text": "a\\u0000b"}', b"7", b'{"text": ' + b"1" * 5000 + b"}",
        b'{"text": "long ' + b"x" * 5000 + b'"}', b'{"text": "last"}',
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = read(tmp_path / "a.jsonl", max_document_bytes=120_000)
    assert [(item.line, item.text) for item in found if isinstance(item, Document)][:2] == [(1, "bom"), (2, "crlf")]
    reasons = dict(map(line_of, found))
    for line, words in (
        (4, "invalid UTF-8 at byte 10"), (5, "not valid JSON"), (6, "nested too deeply"), (7, "'text' is missing"),
        (8, "is a number, want a string"), (9, "lone surrogate"), (10, "NUL"), (11, "JSON number, want an object"),
        (12, "not usable JSON"),
    ):  # fmt: skip
        assert words in reasons[line], (line, reasons[line])
    assert found[-1].line == 14 and found[0].file.endswith("a.jsonl")
    found = read(tmp_path / "a.jsonl", max_document_bytes=1000)
    assert "longer than input.max_document_bytes=1000" in dict(map(line_of, found))[13]
    assert isinstance(found[-1], Document) and found[-1].line == 14


def test_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain text\nof two lines\n")
    (tmp_path / "b.py").write_text("x = 1\n")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "d.txt.zst").write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two"))
    (tmp_path / "e.bin").write_bytes(b"\x00\x01")
    (tmp_path / "f.txt").write_bytes(b"good\nbad \xe9\n")
    (tmp_path / "g.txt.gz").write_bytes(gzip.compress(b"cut off" * 100)[:-20])
    (tmp_path / "h.txt").write_bytes(b"")
    found = {Path(item.file).name: item for item in read(tmp_path)}
    texts = {name: item.text for name, item in found.items() if isinstance(item, Document)}
    assert texts == {
        "a.txt": "plain text\nof two lines\n", "b.py": "x = 1\n", "c.txt.gz": "packed", "d.txt.zst": "one two",
        "h.txt": "",
    }  # fmt: skip
    rejects = {name: line_of(item) for name, item in found.items() if isinstance(item, readers.Reject)}
    assert "NUL" in rejects["e.bin"][1] and rejects["f.txt"][0] == 2 and "damaged" in rejects["g.txt.gz"][1]


def test_ids_and_kept_keys(tmp_path: Path) -> None:
    rows = [{"id": "x", "body": "a", "url": "u"}, {"id": 7, "body": "b"}, {"body": "c"}, {"id": [], "body": "d"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(tmp_path / "a.jsonl", key="body", id_key="id", keep_keys=("url",))
    assert [item.id for item in found[:3]] == ["x", "7", f"{tmp_path}/a.jsonl:3"]  # type: ignore[union-attr]
    assert found[0].meta == {"url": "u"} and "is a list" in line_of(found[3])[1]  # type: ignore[union-attr]


def test_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'megallm[data]'")
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [f"row {k}" for k in range(600)] + [None], "n": list(range(601))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", keep_keys=("n",))
    assert [item.line for item in found] == list(range(1, 602))
    assert isinstance(found[599], Document) and found[599].meta == {"n": 599}
    assert "is a null" in line_of(found[600])[1]
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-30])
    assert "not a Parquet file" in line_of(read(tmp_path / "b.parquet")[0])[1]


def test_html(tmp_path: Path) -> None:
    if not optional.available("selectolax"):
        pytest.skip("selectolax is not installed: pip install 'megallm[data]'")
    page = (
        "<html><head><title>T</title><script>var x;</script></head><body><nav>Menu</nav><h1>Head</h1><p>One <b>bold"
        "</b>\nword<p>Two<ul><li>a<li>b</ul><pre>x = 1\n  y = 2</pre><table><tr><td>1<td>2</tr></table>"
        + "<div>"
        * 5000
    )
    (tmp_path / "a.html").write_text(page)
    (tmp_path / "b.html").write_bytes('<meta charset="iso-8859-1"><p>Caf\xe9</p>'.encode("latin-1"))
    (tmp_path / "c.html").write_bytes('<meta charset="nonsense"><p>Caf\xe9</p>'.encode("latin-1"))
    first, second, third = read(tmp_path)
    assert isinstance(first, Document) and isinstance(second, Document)
    assert first.text.startswith("Head\n\nOne bold word\n\nTwo\n\na\nb\n\nx = 1\n  y = 2\n\n")
    assert "Menu" not in first.text and "var" not in first.text
    assert second.text == "Café"
    assert "nonsense" in line_of(third)[1]


def test_a_damaged_archive_keeps_what_came_before(tmp_path: Path) -> None:
    chance = "".join(json.dumps({"text": prose(k, 300)}) + "\n" for k in range(2000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(chance.encode(), 1)[:-1000])
    found = read(tmp_path / "a.jsonl.gz")
    assert sum(isinstance(item, Document) for item in found) > 500
    assert isinstance(found[-1], readers.Reject) and found[-1].line > 500 and "damaged" in found[-1].reason
    with pytest.raises(DataError, match="matches no file"):
        read(tmp_path / "absent*.jsonl")


MEASURE = """
import json, sys
from pathlib import Path
from megallm.base import config as configs
from megallm.curate import run
from megallm.curate.config import CurateConfig
stats = run.run(configs.load(CurateConfig, None, sys.argv[2:]), sys.argv[1])
peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]  # ru_maxrss would be pytest's, if larger
print(json.dumps({"mib": int(peak) // 1024, "totals": stats["totals"]}))
"""


def test_bombs_and_endless_lines_take_bounded_memory(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    good = json.dumps({"text": prose(1, 300)}).encode() + b"\n"
    with open(raw / "a.jsonl", "wb") as file:  # a line of 1 GB (sparse behind its beginning), then a good one
        file.write(b"x" * 4096)
        file.seek(1 << 30)
        file.write(b"\n" + good)
    many = zstandard.ZstdCompressor(level=1).compressobj()
    line = (b'{"text": "' + b"again and again " * 4000 + b'"}\n') * 16
    with open(raw / "b.jsonl.zst", "wb") as file:  # 100 MB of lines in a few kB
        file.write(many.compress(good))
        for _ in range(100):
            file.write(many.compress(line))
        file.write(many.flush())
    single = zstandard.ZstdCompressor(level=1).compressobj()
    with open(raw / "c.txt.zst", "wb") as file:  # a text of 256 MB in a few kB
        for _ in range(16):
            file.write(single.compress(b"x" * (1 << 24)))
        file.write(single.flush())
    assert sum((raw / name).stat().st_size for name in ("b.jsonl.zst", "c.txt.zst")) < 200_000
    overrides = [
        f"input.files=['{raw}']", "steps=[quality]", "input.max_document_bytes=1000000", "input.max_reject_percent=100",
        "quality.off=[newlines, top_2gram]", "shard_mib=4", "input.on_bad_file=skip",
    ]  # fmt: skip
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "out"), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    result = json.loads(done.stdout)
    rejects = {
        (Path(str(row["file"])).name, row["line"]): row["reason"]
        for row in ledger(tmp_path / "out")
        if row["action"] == "reject"
    }
    assert "longer than" in str(rejects["a.jsonl", 1]) and "longer than" in str(rejects["c.txt.zst", 1])
    assert any(name == "b.jsonl.zst" and "unfolds to over 1000 times" in str(why) for (name, _), why in rejects.items())
    assert ("a.jsonl", 2) in {(Path(str(row["file"])).name, row["line"]) for row in kept(tmp_path / "out")}
    assert result["mib"] < 300, result  # of 1.4 GB; 105 were measured


def test_rejects_stay_out_of_memory_of_the_result(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n" * 50 + json.dumps({"text": prose(1)}) + "\n")
    config = CurateConfig(
        input=InputConfig(files=(str(tmp_path / "a.jsonl"),), max_reject_percent=99), steps=("exact",)
    )
    stats = run.run(config, tmp_path / "out")
    assert stats["totals"] == {
        "lines_rejected": 50, "documents": 1, "characters": len(prose(1)), "kept": 1, "characters_kept": len(prose(1)),
    }  # fmt: skip
    assert [row["line"] for row in ledger(tmp_path / "out")] == list(range(1, 52))


def test_what_utf8_cannot_hold_in_names_and_keys_ends_nothing(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = [json.dumps({"text": prose(1), "url": "\ud800"}), '{"\\ud800": 1}']
    (raw / os.fsdecode(b"a\xff.jsonl")).write_text("\n".join(rows) + "\n")
    run.run(config_of(raw, steps=("exact",)), tmp_path / "out")
    (document, reject), (row,) = ledger(tmp_path / "out"), kept(tmp_path / "out")
    assert document["file"] == reject["file"] == os.fsdecode(os.fsencode(raw) + b"/a\xff.jsonl")
    assert row["url"] == "\ud800" and "\ud800" in str(reject["reason"])


def test_kept_values_are_strict_json_or_a_reject(tmp_path: Path) -> None:
    table = {
        "text": [prose(1), prose(2), prose(3)],
        "when": [datetime.datetime(2020, 1, 2), None, None],
        "price": [Decimal("1.50"), None, None],
        "share": [float("nan"), 0.5, 0.1],
        "raw": [None, None, b"\xff"],
    }
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    first, second, third = read(tmp_path / "a.parquet", keep_keys=("when", "price", "share", "raw"))
    assert isinstance(first, Document) and isinstance(second, Document) and isinstance(third, readers.Reject)
    assert first.meta == {"when": "2020-01-02T00:00:00", "price": "1.50", "share": None, "raw": None}
    assert second.meta["share"] == 0.5
    assert (third.line, third.reason) == (3, "the value of 'raw' is of the type bytes, which JSON cannot hold")
    (tmp_path / "deep.jsonl").write_text(f'{{"text": "x", "url": {"[" * 900}{"]" * 900}}}')
    (deep,) = read(tmp_path / "deep.jsonl", keep_keys=("url",))
    assert line_of(deep) == (1, "the value of 'url' is nested more than 100 levels deep")
