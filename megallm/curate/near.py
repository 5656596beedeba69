"""Near duplicates: MinHash and bands find candidates (Broder 1997; Leskovec et al., "Mining of
Massive Datasets", ch. 3), the true Jaccard similarity of their word n-gram sets decides, and
clusters are stars.

A document is dropped only when it is similar to a *kept* earlier document, its centre; similarity
is never passed on through a chain of neighbours. Word n-grams are lower-cased and ignore
punctuation and space.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from megallm.base import extension
from megallm.curate.config import NearConfig
from megallm.curate.document import KEEP, DocumentBatch, Verdict, drop
from megallm.curate.exact import INDEX_BITS, Signatures, load_array, of_batch
from megallm.curate.external import Scatter, contains, partition_of, parts_for
from megallm.curate.text import Analysis, mix, sorted_set

ENTRY = np.dtype([("hash", "<u8"), ("document", "<u8")])
MEMBER = np.dtype([("document", "<u8"), ("bucket", "<u8")])
DROP = np.dtype([("document", "<u8"), ("centre", "<u8"), ("jaccard", "<f8")])
_OPEN_SHARDS = 64


def shingles(analysis: Analysis, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the set of word n-grams of every document as sorted uint32 hashes laid end to end,
    and offsets [documents + 1].

    A document of fewer than `size` words has none.
    """
    hashes, _ = analysis.words.ngrams(size)
    numbers = np.arange(len(analysis), dtype=np.uint64) << np.uint64(32)
    document = np.repeat(numbers, np.maximum(analysis.words.counts - size + 1, 0))
    packed = sorted_set(document | (hashes >> np.uint64(32)))
    offsets = np.searchsorted(
        packed, np.arange(len(analysis) + 1, dtype=np.uint64) << np.uint64(32)
    )
    return packed.astype(np.uint32), offsets


@lru_cache(maxsize=4)
def _multipliers(count: int) -> np.ndarray:
    return mix(np.arange(1, 2 * count + 1, dtype=np.uint64)).astype(np.uint32).reshape(
        count, 2
    ) | np.uint32(1)


def band_hashes(values: np.ndarray, offsets: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """Returns uint64 [sets, bands] of sets that are not empty: each band mixes `rows` MinHash
    values.

    Permutation i of the 32-bit hashes is x -> (x ^ b_i) * a_i, a_i odd; the minimum over a set is
    its value.
    """
    native = extension.index()
    if native is not None:
        out = native.bands(values, offsets, _multipliers(bands * rows), rows)
        return mix(out + mix(np.arange(1, bands + 1, dtype=np.uint64)))
    out = np.zeros((len(offsets) - 1, bands), np.uint64)
    scratch = np.empty_like(values)
    for k, (factor, flip) in enumerate(_multipliers(bands * rows)):
        np.bitwise_xor(values, flip, out=scratch)
        np.multiply(scratch, factor, out=scratch)
        least = (
            np.minimum.reduceat(scratch, offsets[:-1]) if len(values) else np.zeros(0, np.uint32)
        )
        band = out[:, k // rows]
        band[:] = band * np.uint64(0x9FB21C651E98DF25) + least + np.uint64(1)
    return mix(out + mix(np.arange(1, bands + 1, dtype=np.uint64)))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the Jaccard similarity of two sorted sets of hashes."""
    both = np.concatenate([a, b])
    both.sort()
    common = int(np.count_nonzero(both[1:] == both[:-1]))
    return common / max(len(both) - common, 1)


class Near:
    """The step `near`. `sign` runs in workers, `resolve` once over files on disk, `judge` in
    workers again.
    """

    name = "near"

    def __init__(self, config: NearConfig) -> None:
        self.config = config

    def sign(self, batch: DocumentBatch, shard: int, out: Signatures) -> None:
        """Add the n-gram sets and band hashes of the batch's documents; documents without n-grams
        are left out.
        """
        analysis, rows = batch.shared_analysis()
        values, offsets = shingles(analysis, self.config.ngram)
        sizes = np.diff(offsets)
        wanted = np.zeros(len(sizes), bool)
        wanted[rows] = True
        values = values[np.repeat(wanted, sizes)]
        used, sizes = np.flatnonzero(sizes[rows]), sizes[rows]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        index = np.array([document.index for document in batch.documents], np.uint64)
        out.add(
            near_number=index[used] | np.uint64(shard << INDEX_BITS),
            near_bands=band_hashes(
                values,
                np.append(starts[:-1][used], len(values)),
                self.config.bands,
                self.config.rows,
            ),
            near_sizes=sizes[used],
            near_values=values,
        )

    def resolve(
        self, shards: Sequence[Path], scratch: Path, memory_bytes: int, gone: np.ndarray
    ) -> dict[int, dict[str, np.ndarray]]:
        """Returns for every shard the documents to drop, their centres and similarities."""
        members = self._buckets(shards, scratch, memory_bytes, gone)
        drops = _stars(members, _Sets(shards), self.config)
        shard_of = drops["document"] >> np.uint64(INDEX_BITS)
        cuts = np.searchsorted(shard_of, np.arange(len(shards) + 1))
        return {
            shard: {"near": drops[cuts[shard] : cuts[shard + 1]]} for shard in range(len(shards))
        }

    def dropped(self, decisions: dict[int, dict[str, np.ndarray]]) -> np.ndarray:
        rows = [levels["near"]["document"] for levels in decisions.values()]
        return np.sort(np.concatenate([np.zeros(0, np.uint64), *rows]))

    def _buckets(
        self, shards: Sequence[Path], scratch: Path, memory_bytes: int, gone: np.ndarray
    ) -> Scatter:
        """Band values that several documents share, numbered, as (document, bucket) scattered by
        document.
        """
        sizes = [
            array.nbytes
            for folder in shards
            if (array := load_array(folder, "near_bands")) is not None
        ]
        parts = parts_for(2 * sum(sizes), memory_bytes)
        entries = Scatter(scratch / "near-entries", parts, ENTRY)
        for folder in shards:
            bands, numbers = load_array(folder, "near_bands"), load_array(folder, "near_number")
            if bands is None or numbers is None:
                continue
            records = np.empty(bands.size, ENTRY)
            records["hash"] = np.asarray(bands).ravel()
            records["document"] = np.repeat(np.asarray(numbers), bands.shape[1])
            records = records[~contains(gone, records["document"])]
            entries.add(records, partition_of(records["hash"], parts))
        members = Scatter(
            scratch / "near-members", len(shards), MEMBER
        )  # a shard's documents meet in one file
        count = 0
        for records in entries.each():
            records = records[np.lexsort((records["document"], records["hash"]))]
            same = records["hash"][1:] == records["hash"][:-1]
            shared = np.zeros(len(records), bool)
            shared[1:] |= same
            shared[:-1] |= same
            start = np.concatenate([[True], ~same]) if len(records) else np.zeros(0, bool)
            rows = np.empty(int(shared.sum()), MEMBER)
            rows["document"] = records["document"][shared]
            rows["bucket"] = count + np.cumsum(start[shared]) - 1
            count += int(start[shared].sum())
            members.add(rows, rows["document"] >> np.uint64(INDEX_BITS))
        return members

    def judge(
        self, batch: DocumentBatch, decisions: dict[str, np.ndarray], name_of: dict[int, str]
    ) -> list[Verdict]:
        """Apply what `resolve` decided for this shard."""
        rows = {
            int(row["document"]) & (1 << INDEX_BITS) - 1: row
            for row in of_batch(decisions.get("near"), batch)
        }
        verdicts = []
        for document in batch.documents:
            row = rows.get(document.index)
            if row is None:
                verdicts.append(KEEP)
            else:
                centre = name_of.get(int(row["centre"]), "")
                verdicts.append(
                    drop("near_duplicate", of=centre, jaccard=round(float(row["jaccard"]), 4))
                )
        return verdicts


class _Sets:
    """The n-gram set of any document, read from the shards' memory maps."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards = shards
        self._open = lru_cache(_OPEN_SHARDS)(self._load)

    def _load(self, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        folder = self._shards[shard]
        sizes, values, numbers = (
            load_array(folder, f"near_{name}") for name in ("sizes", "values", "number")
        )
        assert sizes is not None and values is not None and numbers is not None
        return np.asarray(numbers), np.concatenate([[0], np.cumsum(sizes)]), values

    def __getitem__(self, document: int) -> np.ndarray:
        numbers, offsets, values = self._open(document >> INDEX_BITS)
        row = int(np.searchsorted(numbers, np.uint64(document)))
        return np.asarray(values[offsets[row] : offsets[row + 1]])


def _stars(members: Scatter, sets: _Sets, config: NearConfig) -> np.ndarray:
    """Go through the documents in order; drop one when a kept document of one of its buckets is
    similar enough.

    Only the latest `max_centres` kept documents of a bucket are looked at. Memory: the kept ones of
    shared buckets.
    """
    centres: dict[int, list[int]] = {}
    drops = []
    for rows in members.each():
        if not len(rows):
            continue
        rows = rows[np.lexsort((rows["bucket"], rows["document"]))]
        documents, first = np.unique(rows["document"], return_index=True)
        for document, own in zip(
            documents.tolist(), np.split(rows["bucket"], first[1:]), strict=True
        ):
            own = own.tolist()
            candidates = {centre for bucket in own for centre in centres.get(bucket, ())}
            best, similarity = _most_similar(sets, document, sorted(candidates), config.threshold)
            if similarity >= config.threshold:
                drops.append((document, best, similarity))
                continue
            for bucket in own:
                kept = centres.setdefault(bucket, [])
                kept.append(document)
                del kept[: -config.max_centres]
    return np.array(drops, DROP)


def _most_similar(
    sets: _Sets, document: int, candidates: list[int], threshold: float
) -> tuple[int, float]:
    """Returns the most similar candidate, the earliest of equals. Sets whose sizes alone rule it
    out are not compared.
    """
    best, similarity = -1, 0.0
    own = sets[document] if candidates else np.zeros(0, np.uint32)
    for candidate in candidates:
        other = sets[candidate]
        if min(len(own), len(other)) < threshold * max(len(own), len(other)):
            continue
        value = jaccard(own, other)
        if value > similarity:
            best, similarity = candidate, value
    return best, similarity
