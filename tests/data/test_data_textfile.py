"""What a file is, is seen in its first bytes (issue R, B.16), and pipes are streamed and never hang (D.30)."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from megallm.base.errors import DataError, MegallmError, UsageError
from megallm.curate import decontaminate
from megallm.curate import readers as curate_readers
from megallm.curate.config import InputConfig
from megallm.curate.document import Document
from megallm.data.indexed.dataset import IndexedDataset
from megallm.data.indexed.openfile import OpenFile
from megallm.data.text import preprocess, readers, textfile
from megallm.data.text.preprocess import PreprocessConfig
from megallm.data.text.tokenizer import train_bpe

zstandard = pytest.importorskip("zstandard")
TEXTS = ["one", "zwölf", "тринадцать 𝄞", "last " * 300]
LINES = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


def zstd_of_window(data: bytes, log: int) -> bytes:
    """A frame as `zstd --long=LOG` heads it: a window of 2^log bytes, then the data as it is."""
    head = b"\x28\xb5\x2f\xfd\x00" + bytes([(log - 10) << 3])
    assert zstandard.get_frame_parameters(head + b"\0" * 8).window_size == 1 << log
    blocks = [data[at : at + 1000] for at in range(0, len(data), 1000)]
    for number, block in enumerate(blocks):
        head += ((len(block) << 3) | (number == len(blocks) - 1)).to_bytes(3, "little") + block
    return head


def skippable(data: bytes) -> bytes:
    return b"\x5a\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc" + zstandard.compress(data)


READABLE = {
    "window of 2 GiB, as in Pushshift's dumps": zstd_of_window(LINES, 31),
    "window of 256 MiB": zstd_of_window(LINES, 28),
    "zstd, several frames": zstandard.compress(LINES[:20]) + zstandard.compress(LINES[20:]),
    "zstd after a skippable frame": skippable(LINES),
    "bzip2": bz2.compress(LINES),
    "bzip2, two streams": bz2.compress(LINES[:9]) + bz2.compress(LINES[9:]),
    "xz": lzma.compress(LINES),
    "xz, two streams": lzma.compress(LINES[:9]) + lzma.compress(LINES[9:]),
    "gzip": gzip.compress(LINES),
    "utf-16 with a mark": LINES.decode().encode("utf-16"),
    "utf-16, big endian": b"\xfe\xff" + LINES.decode().encode("utf-16-be"),
    "utf-32 with a mark": LINES.decode().encode("utf-32"),
    "utf-8 with a mark": b"\xef\xbb\xbf" + LINES,
    "utf-16 in gzip": gzip.compress(LINES.decode().encode("utf-16")),
    "utf-16 in xz, CRLF": lzma.compress(LINES.replace(b"\n", b"\r\n").decode().encode("utf-16")),
    "lzma, the older format": lzma.compress(LINES, format=lzma.FORMAT_ALONE),
    "xz, zeros between two streams": lzma.compress(LINES[:9]) + bytes(8) + lzma.compress(LINES[9:]),
}
NAMES = ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst")


def by_preprocess(path: Path) -> list[str]:
    return list(readers.read_texts([str(path)], readers.ReadOptions()))


def by_curate(path: Path) -> list[str]:
    return list(curate_readers.document_texts([str(path)]))


@pytest.mark.parametrize("read", [by_preprocess, by_curate])
@pytest.mark.parametrize("name", READABLE)
def test_b16_the_first_bytes_say_what_a_file_is(tmp_path, name, read):
    """Whatever it is called: gzip named .jsonl, bzip2 named .zst."""
    for file in NAMES:
        (tmp_path / file).write_bytes(READABLE[name])
        assert read(tmp_path / file) == TEXTS


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress, gzip.compress, lambda data: zstd_of_window(data, 31)])
def test_b16_whole_text_files_are_read_by_both_too(tmp_path, pack):
    text = "Kapitel eins\n\nzwölf Häuser\n"
    (tmp_path / "a.txt").write_bytes(pack(text.encode("utf-16")))
    assert by_preprocess(tmp_path / "a.txt") == [text] == by_curate(tmp_path / "a.txt")


def test_b16_half_a_surrogate_pair_spoils_its_line_only(tmp_path):
    lines = ['{"text": "one"}', '{"text": "\ud800"}', '{"text": "three"}']
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe" + "\n".join(lines).encode("utf-16-le", "surrogatepass"))
    assert by_curate(tmp_path / "a.jsonl") == ["one", "three"]
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*UTF-8"):
        by_preprocess(tmp_path / "a.jsonl")


def archives() -> dict[str, bytes]:
    tar, packed = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        file.addfile(tarfile.TarInfo("a.jsonl"))
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("a.jsonl", LINES)
    return {
        "tar archive": tar.getvalue(), "tar archive, which is not read": gzip.compress(tar.getvalue()),
        "zip archive": packed.getvalue(), "lz4": b"\x04\x22\x4d\x18" + b"\0" * 20, "Arrow": b"ARROW1\0\0" + b"\0" * 20,
    }  # fmt: skip


@pytest.mark.parametrize("what", archives())
def test_b16_what_is_not_read_is_named(tmp_path, what):
    (tmp_path / "a.jsonl").write_bytes(archives()[what])
    for read in (by_preprocess, by_curate):
        with pytest.raises(DataError, match=f"a.jsonl.*{what}"):
            read(tmp_path / "a.jsonl")


def test_b16_lines_of_a_table_in_another_kind_of_file_are_not_called_wrong(tmp_path):
    """Files that hold the right data in a form that is not read: each is named with a remedy, not its first line."""
    pyarrow = pytest.importorskip("pyarrow")
    stream, table = io.BytesIO(), pyarrow.table({"text": TEXTS})
    with pyarrow.ipc.new_stream(stream, table.schema) as out:  # as `save_to_disk` of Hugging Face's datasets
        out.write_table(table)
    rows = io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(table, rows)
    cases = {
        "an Arrow stream": stream.getvalue(), "an Avro file": b"Obj\x01\x04\x16avro.schema",
        "an SQLite database": b"SQLite format 3\0" + bytes(100), "packed with lzip": b"LZIP\x01\x0c" + bytes(40),
        "packed twice": gzip.compress(gzip.compress(LINES)), "packed twice, bzip2": gzip.compress(bz2.compress(LINES)),
        "a packed Parquet file": gzip.compress(rows.getvalue()),
        "a zip archive": gzip.compress(archives()["zip archive"]),
    }  # fmt: skip
    for words, data in cases.items():
        for name in ("a.jsonl", "a.txt", *(["a.parquet.gz"] if "Parquet" in words else [])):
            (tmp_path / name).write_bytes(data)
            for read in (by_preprocess, by_curate):
                with pytest.raises(DataError, match=f"{name}.* is {words.partition(',')[0]}.*not read"):
                    read(tmp_path / name)


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_b16_wide_text_without_a_mark_is_never_read_as_utf_8(tmp_path, codec, pack):
    """Every other byte of it is NUL, which UTF-8 may hold: such a text was trained on, NULs and all."""
    for name, text in (("a.txt", "Hello there\n"), ("b.jsonl", LINES.decode()), ("c.txt", "x")):
        (tmp_path / name).write_bytes(pack(text.encode(codec)))
        for read in (by_preprocess, by_curate):
            with pytest.raises(DataError, match=f"{name}.*NUL.*UTF-16 or UTF-32 without a byte order mark.*iconv"):
                read(tmp_path / name)
    (tmp_path / "d.txt").write_bytes(pack(b"a few \0 are a matter of the text"))
    assert by_preprocess(tmp_path / "d.txt") == ["a few \0 are a matter of the text"]


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress, gzip.compress, zstandard.compress])
def test_b16_a_long_utf_16_file_in_several_streams(tmp_path, compress, monkeypatch):
    """The first bytes are looked at in whole, however little the library gives at once."""
    monkeypatch.setattr(textfile, "_READ_BYTES", 7)
    monkeypatch.setattr(textfile, "_FEED_BYTES", 7)
    wide = (LINES * 9).decode().encode("utf-16")
    (tmp_path / "a.jsonl").write_bytes(compress(wide[:1]) + compress(wide[1:]))
    assert by_preprocess(tmp_path / "a.jsonl") == TEXTS * 9 == by_curate(tmp_path / "a.jsonl")


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress, gzip.compress, zstandard.compress])
@pytest.mark.parametrize("damage", ["a bit", "cut", "no stream"])
def test_b16_a_damaged_later_stream_is_never_taken_for_the_end(tmp_path, compress, damage):
    """pbzip2 and Wikipedia's dumps have thousands of streams: what follows a damaged one was dropped without a word."""
    first, second = compress(LINES), bytearray(compress(LINES))
    if damage == "a bit":
        second[len(second) // 2] ^= 1
    second = {"a bit": second, "cut": second[:5], "no stream": b"garbage"}[damage]
    (tmp_path / "a.jsonl").write_bytes(first + bytes(second))
    for read in (by_preprocess, by_curate):
        if compress is zstandard.compress and damage == "a bit":
            continue  # the frame may have no checksum
        with pytest.raises(DataError, match="a.jsonl.*(damaged or incomplete)"):
            read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", [name for name in READABLE if "mark" not in name and "endian" not in name])
def test_b16_a_truncated_file_is_damaged_for_both(tmp_path, name):
    """Also where `curate train-lm` reads it: it passed over what it could not read."""
    (tmp_path / "a.jsonl").write_bytes(READABLE[name][:-5])
    for read in (by_preprocess, by_curate):
        with pytest.raises(DataError, match="a.jsonl.*(damaged or incomplete)"):
            read(tmp_path / "a.jsonl")


def test_b16_packed_files_take_bounded_memory(tmp_path):
    """64 MiB of one letter in each: `curate` and `preprocess` hold a block or two of it."""
    for name, packer in {"a.txt": bz2.BZ2Compressor(), "b.txt": lzma.LZMACompressor(preset=0)}.items():
        with open(tmp_path / name, "wb") as file:
            for _ in range(64):
                file.write(packer.compress(b"a" * (1 << 20)))
            file.write(packer.flush())
    code = (
        "import sys\nfrom pathlib import Path\nfrom megallm.data.text import readers\n"
        "options = readers.ReadOptions(max_document_bytes=1 << 20)\n"
        "assert [chunk.too_long for name in sys.argv[1:] for chunk in readers.chunks(name, options)] == [True, True]\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 90 << 10  # KiB; 50 were measured


def test_b16_a_missing_package_is_noticed_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_bytes(zstandard.compress(LINES))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UsageError, match="b.jsonl needs the package zstandard"):
        preprocess.run(PreprocessConfig((f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"), f"{tmp_path}/out/o", "bytes"))
    assert not (tmp_path / "out").exists()


# Pipes.


def fed(path: Path, data: bytes) -> threading.Thread:
    """A named pipe, and a thread that writes into it."""
    os.mkfifo(path)

    def write() -> None:
        with contextlib.suppress(BrokenPipeError), open(path, "wb") as file:
            file.write(data)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("name", ["utf-8 with a mark", "gzip", "window of 2 GiB, as in Pushshift's dumps", "xz"])
def test_d30_a_named_pipe_is_streamed(tmp_path, name):
    writer = fed(tmp_path / "a.jsonl", READABLE[name])
    stats = preprocess.run(PreprocessConfig((str(tmp_path / "a.jsonl"),), str(tmp_path / "o"), "bytes"))
    writer.join(10)
    assert stats.documents == len(TEXTS)
    assert IndexedDataset(tmp_path / "o_text_document").document(1).tolist() == list(TEXTS[1].encode())


def test_d30_pipes_and_files_together_and_a_tokenizer(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(LINES)
    writer = fed(tmp_path / "a.jsonl", LINES)
    found = train_bpe([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], 300, str(tmp_path / "tok"))
    writer.join(10)
    assert found["documents"] == 2 * len(TEXTS)


@pytest.mark.parametrize("words", [["--workers", "2"], []])
def test_d30_stdin_is_streamed(tmp_path, words):
    lines = LINES * 3000  # several chunks
    command = [sys.executable, "-m", "megallm", "preprocess", "--input", "/dev/stdin", "--output", "o"]
    command += ["--tokenizer", "bytes", *words]
    done = subprocess.run(command, input=lines, capture_output=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert IndexedDataset(tmp_path / "o_text_document").num_documents == 3000 * len(TEXTS)


def test_d30_a_killed_run_does_not_go_on_in_the_middle_of_a_pipe(tmp_path, monkeypatch):
    """What it had done is of no use: nobody knows what is in the pipe now. The control is a file, which goes on."""
    monkeypatch.setattr(preprocess, "_SAVE_SECONDS", -1.0)
    lines, resumed = LINES * 3000, {}
    for name in ("pipe.jsonl", "file.jsonl"):
        path, calls = tmp_path / name, []
        (tmp_path / "file.jsonl").write_bytes(lines)

        def stop(stats: object, calls: list[object] = calls) -> None:
            calls.append(stats)
            if len(calls) == 2:
                raise KeyboardInterrupt

        config = PreprocessConfig((str(path),), str(tmp_path / "o" / name), "bytes")
        for turn in (0, 1):
            if name.startswith("pipe"):
                path.unlink(missing_ok=True)
                fed(path, lines)
            os.utime(path, ns=(0, 0))
            if turn == 0:
                with pytest.raises(KeyboardInterrupt):
                    preprocess.run(config, stop)
        stats = preprocess.run(config)
        assert stats.documents == 3000 * len(TEXTS)
        resumed[name] = stats.resumed
    assert resumed == {"pipe.jsonl": 0, "file.jsonl": 2}


@pytest.mark.parametrize("case", ["no writer", "twice", "device", "folder", "parquet", "curate", "curate lm"])
def test_d30_what_cannot_be_streamed_is_refused_and_never_hangs(tmp_path, monkeypatch, case):
    monkeypatch.setattr(textfile, "WRITER_SECONDS", 0.2)
    pipe = tmp_path / "a.jsonl"
    os.mkfifo(pipe)
    config = PreprocessConfig((str(pipe),), str(tmp_path / "o"), "bytes")
    if case == "no writer":
        words = "nothing wrote to"
    elif case == "twice":
        config, words = PreprocessConfig((str(pipe),) * 2, config.output, "bytes"), "given twice"
    elif case == "device":
        config, words = PreprocessConfig(("/dev/zero",), config.output, "bytes"), "is a device"
    elif case == "folder":
        config, words = PreprocessConfig((str(tmp_path),), config.output, "bytes"), "is a folder"
    elif case == "parquet":
        pipe.unlink()
        fed(pipe, b"PAR1" + bytes(100))
        words = "is a pipe, but Parquet"
    else:
        words = "is a pipe or a device"
    with pytest.raises(MegallmError, match=words):
        if case == "curate":
            curate_readers.find_inputs(InputConfig(files=(str(pipe),)))
        elif case == "curate lm":
            list(curate_readers.document_texts([str(pipe)]))
        else:
            preprocess.run(config)


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_d30_a_pipe_for_a_dataset_is_refused_and_never_hangs(tmp_path, suffix):
    for name in ("idx", "bin"):
        (tmp_path / f"d.{name}").write_bytes(b"")
    (tmp_path / f"d.{suffix}").unlink()
    os.mkfifo(tmp_path / f"d.{suffix}")
    with pytest.raises(DataError, match=f"d.{suffix} is a pipe or a device"):
        OpenFile(str(tmp_path / f"d.{suffix}"))
    with pytest.raises(DataError, match="is a pipe or a device"):
        list(decontaminate.items(str(tmp_path / f"d.{suffix}"), ()))


def test_d30_a_pipe_in_a_folder_is_passed_over_by_curate(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "a.jsonl").write_bytes(LINES)
    config = InputConfig(files=(str(tmp_path),))
    (name,) = curate_readers.find_inputs(config)
    found = [
        item for unit in curate_readers.file_units(name, config) for item in curate_readers.parse_unit(unit, config)
    ]
    assert [item.text for item in found if isinstance(item, Document)] == TEXTS
