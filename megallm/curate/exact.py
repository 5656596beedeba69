"""Exact duplicates of documents, paragraphs and lines: the first occurrence in input order stays.

Units are equal when they are equal after folding (folding.py: compatibility forms, case, marks,
invisible characters) and after runs of white space became one blank; punctuation counts. The key is
xxh3-128. Workers sign every shard; one pass over files sorted on disk decides; the next segment
applies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from megallm.base.files import writing
from megallm.curate.config import ExactConfig
from megallm.curate.document import KEEP, DocumentBatch, TextSpan, Verdict, drop, edit
from megallm.curate.external import Scatter, contains, partition_of, parts_for
from megallm.curate.folding import comparable

RECORD = np.dtype(
    [("hi", "<u8"), ("lo", "<u8"), ("document", "<u8"), ("paragraph", "<u4"), ("unit", "<u4")]
)
DROP = np.dtype([("document", "<u8"), ("unit", "<u4"), ("first", "<u8")])
LEVELS = ("document", "paragraph", "line")
_PARAGRAPH = re.compile(r"\n[ \t\r]*\n\s*")
_LINE = re.compile(r"\n")
_UNIT_BITS = 32
INDEX_BITS = 32  # a document's number is shard << 32 | index


def text_key(text: str) -> bytes:
    """Returns 16 bytes that are equal exactly (but for a chance of 2^-128) for texts that compare
    alike.
    """
    return xxhash.xxh3_128_digest(comparable(text))


def split_units(
    text: str, separator: re.Pattern[str], begin: int = 0, end: int | None = None
) -> Iterator[tuple[int, int, int]]:
    """Yields units as (begin, end of content, end including the separator)."""
    end = len(text) if end is None else end
    for match in separator.finditer(text, begin, end):
        yield begin, match.start(), match.end()
        begin = match.end()
    if begin < end:
        yield begin, end, end


def text_units(text: str, level: str) -> Iterator[tuple[int, int, int, int]]:
    """Yields paragraphs or lines as (begin, end, end with separator, number of the paragraph)."""
    for number, (begin, end, stop) in enumerate(split_units(text, _PARAGRAPH)):
        if level == "paragraph":
            yield begin, end, stop, number
        else:
            for one in split_units(text, _LINE, begin, stop):
                yield *one, number


@dataclass
class Signatures:
    """What a shard's documents are compared by; written as NAME.npy files next to the shard's
    documents.
    """

    arrays: dict[str, list[np.ndarray]] = field(default_factory=dict)
    ids: dict[int, str] = field(default_factory=dict)

    def add(self, **arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            self.arrays.setdefault(name, []).append(array)

    def save(self, folder: Path) -> None:
        with writing(folder):
            for name, pieces in self.arrays.items():
                np.save(folder / f"{name}.npy", np.concatenate(pieces), allow_pickle=False)
            (folder / "ids.json").write_text(json.dumps(self.ids), "utf-8")


def load_array(folder: Path, name: str) -> np.ndarray | None:
    """Returns one array of a shard as a memory map; None when the shard has none."""
    path = folder / f"{name}.npy"
    return np.load(path, mmap_mode="r", allow_pickle=False) if path.exists() else None


def of_batch(rows: np.ndarray | None, batch: DocumentBatch) -> np.ndarray | tuple[()]:
    """Returns the decisions of a shard, sorted by document, from the first to the last document of
    a batch of it.
    """
    if rows is None or not len(batch):
        return ()
    numbers = rows["document"] & np.uint64((1 << INDEX_BITS) - 1)
    index = [document.index for document in batch.documents]
    low, high = np.searchsorted(numbers, np.array([min(index), max(index) + 1], np.uint64))
    return rows[low:high]


class Exact:
    """The step `exact`. `sign` runs in workers, `resolve` once, `judge` in workers again."""

    name = "exact"

    def __init__(self, config: ExactConfig) -> None:
        self.config = config
        self._levels = [level for level in LEVELS if {"document": config.document, "paragraph": config.paragraph,
                                                      "line": config.line}[level]]  # fmt: skip

    def sign(self, batch: DocumentBatch, shard: int, out: Signatures) -> None:
        """Add the keys of the batch's documents and units."""
        for level in self._levels:
            out.add(**{f"exact_{level}": self._keys(batch, shard, level)})

    def _keys(self, batch: DocumentBatch, shard: int, level: str) -> np.ndarray:
        keys, where = [], []
        for document in batch.documents:
            number = shard << INDEX_BITS | document.index
            if level == "document":
                keys.append(text_key(document.text))
                where.append((number, 0, 0))
                continue
            for unit, (begin, end, _, paragraph) in enumerate(text_units(document.text, level)):
                if end - begin >= self.config.min_chars:
                    keys.append(text_key(document.text[begin:end]))
                    where.append((number, paragraph, unit))
        out = np.empty(len(keys), RECORD)
        digests = np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2)
        out["hi"], out["lo"] = digests[:, 0], digests[:, 1]
        places = np.array(where, np.uint64).reshape(-1, 3)
        out["document"], out["paragraph"], out["unit"] = places[:, 0], places[:, 1], places[:, 2]
        return out

    def resolve(
        self, shards: Sequence[Path], scratch: Path, memory_bytes: int, gone: np.ndarray
    ) -> dict[int, dict[str, np.ndarray]]:
        """Returns for every shard and level the records to drop. A unit that is gone with its
        document or paragraph is no first occurrence for others.
        """
        out: dict[int, dict[str, np.ndarray]] = {shard: {} for shard in range(len(shards))}
        gone_paragraphs = np.zeros(0, np.dtype([("document", "<u8"), ("unit", "<u4")]))
        for level in self._levels:
            drops = _duplicates(shards, level, scratch, memory_bytes, gone, gone_paragraphs)
            if level == "document":
                gone = np.union1d(gone, drops["document"])
            elif level == "paragraph":
                gone_paragraphs = np.sort(drops[["document", "unit"]].astype(gone_paragraphs.dtype))
            shard_of = drops["document"] >> np.uint64(INDEX_BITS)
            cuts = np.searchsorted(shard_of, np.arange(len(shards) + 1))
            for shard in range(len(shards)):
                out[shard][level] = drops[cuts[shard] : cuts[shard + 1]]
        return out

    def dropped(self, decisions: dict[int, dict[str, np.ndarray]]) -> np.ndarray:
        rows = [
            levels["document"]["document"] for levels in decisions.values() if "document" in levels
        ]
        return np.sort(np.concatenate([np.zeros(0, np.uint64), *rows]))

    def judge(
        self, batch: DocumentBatch, decisions: dict[str, np.ndarray], name_of: dict[int, str]
    ) -> list[Verdict]:
        """Apply what `resolve` decided for this shard; `name_of` gives the id of a first
        occurrence.
        """
        documents = {
            int(row["document"]) & (1 << INDEX_BITS) - 1: int(row["first"])
            for row in of_batch(decisions.get("document"), batch)
        }
        cuts: dict[str, dict[int, set[int]]] = {}
        for level in ("paragraph", "line"):
            cuts[level] = {}
            for row in of_batch(decisions.get(level), batch):
                index = int(row["document"]) & (1 << INDEX_BITS) - 1
                cuts[level].setdefault(index, set()).add(int(row["unit"]))
        return [
            self._verdict(document.text, document.index, documents, cuts, name_of)
            for document in batch.documents
        ]

    def _verdict(
        self,
        text: str,
        index: int,
        documents: dict[int, int],
        cuts: dict[str, dict[int, set[int]]],
        name_of: dict[int, str],
    ) -> Verdict:
        if index in documents:
            return drop("duplicate_document", of=name_of.get(documents[index], ""))
        spans = []
        for level in ("paragraph", "line"):
            chosen = cuts[level].get(index)
            if chosen:
                spans += [
                    TextSpan(begin, stop, f"duplicate_{level}")
                    for unit, (begin, _, stop, _) in enumerate(text_units(text, level))
                    if unit in chosen
                ]
        if not spans:
            return KEEP
        verdict = edit(spans)
        left = len(text) - sum(span.end - span.begin for span in verdict.spans)
        return verdict if left else drop("only_duplicate_parts")


def _duplicates(
    shards: Sequence[Path],
    level: str,
    scratch: Path,
    memory_bytes: int,
    gone: np.ndarray,
    paragraphs: np.ndarray,
) -> np.ndarray:
    """Returns every record but the first of equal keys, sorted by document and unit."""
    arrays = [load_array(folder, f"exact_{level}") for folder in shards]
    total = sum(array.nbytes for array in arrays if array is not None)
    parts = parts_for(total, memory_bytes)
    scatter = Scatter(scratch / f"exact-{level}", parts, RECORD)
    for array in arrays:
        if array is None:
            continue
        records = np.asarray(array)
        records = records[~contains(gone, records["document"])]
        if level == "line" and len(paragraphs):
            own = np.empty(len(records), paragraphs.dtype)
            own["document"], own["unit"] = records["document"], records["paragraph"]
            records = records[~_contains_rows(paragraphs, own)]
        scatter.add(records, partition_of(records["hi"], parts))
    found = []
    for records in scatter.each():
        order = np.lexsort((records["unit"], records["document"], records["lo"], records["hi"]))
        records = records[order]
        same = (records["hi"][1:] == records["hi"][:-1]) & (records["lo"][1:] == records["lo"][:-1])
        start = np.concatenate([[True], ~same]) if len(records) else np.zeros(0, bool)
        leader = np.flatnonzero(start)[np.cumsum(start) - 1]
        rows = np.flatnonzero(~start)
        drops = np.empty(len(rows), DROP)
        drops["document"], drops["unit"] = records["document"][rows], records["unit"][rows]
        drops["first"] = records["document"][leader[rows]]
        found.append(drops)
    drops = np.concatenate(found)
    return drops[np.lexsort((drops["unit"], drops["document"]))]


def _contains_rows(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`contains` for (document, unit) pairs, sorted."""
    place = np.minimum(np.searchsorted(table, rows), len(table) - 1)
    return table[place] == rows
