"""Answers with rewards: which rows answer the same prompt, how much better than the others an
answer is, and the best of each prompt alone. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from megallm.base.errors import DataError
from megallm.data.chat import cache as caches
from megallm.data.chat.cache import Made, Tokenised, Writer
from megallm.data.chat.prepare import Prepared, files_of, weights_of
from megallm.data.chat.reader import first_sample
from megallm.data.chat.rows import RowCounts


def _rewards(sources: Mapping[str, Tokenised]) -> np.ndarray:
    return np.concatenate([source.table["label"] for source in sources.values()])


def groups_of(sources: Mapping[str, Tokenised]) -> np.ndarray:
    """Returns a number for each row of all files, the same where prompts are, int64 `[N]`."""
    rows = (source.row(number) for source in sources.values() for number in range(len(source)))
    digests = [xxhash.xxh3_64_intdigest(row.prompt.tobytes()) for row in rows]
    return np.unique(np.array(digests, np.uint64), return_inverse=True)[1].astype(np.int64)


def advantages(sources: Mapping[str, Tokenised], by_prompt: bool) -> np.ndarray:
    """Returns the reward of each row less the mean of its prompt, or of all rows, float64 `[N]`.

    Errors: DataError where every one is 0, so that nothing would be preferred to anything.
    """
    rewards = _rewards(sources)
    groups = groups_of(sources) if by_prompt else np.zeros(len(rewards), np.int64)
    found = rewards - (np.bincount(groups, rewards) / np.bincount(groups))[groups]
    if not np.abs(found).max(initial=0.0) > 1e-12 * max(1.0, np.abs(rewards).max(initial=0.0)):
        what, more = "all rewards are the same", ""
        if by_prompt:
            what = "no prompt has two answers with different rewards"
            more = ", or set offline.advantage=all"
        raise DataError(
            f"{', '.join(sources)}: {what}, so that every advantage is 0: add answers{more}."
        )
    return found


def samples_of(sources: Mapping[str, Tokenised]) -> np.ndarray:
    """Returns the id of each row of all files as a batch's `samples` has it, int64 `[N]`."""
    return np.concatenate(
        [first_sample(source) + np.arange(len(source)) for source in sources.values()]
    )


def keep_best(
    prepared: Prepared, keep: int, least: float | None, cache: Path, valid: bool = False
) -> Prepared:
    """Returns the rows whose reward is among the `keep` best of their prompt and at least `least`;
    of equal ones those that stand first. They are written to the folder `cache` once, where the
    other processes of a job find them. Errors: DataError where none is left.
    """
    rewards, groups = _rewards(prepared.sources), groups_of(prepared.sources)
    order = np.lexsort((np.arange(len(rewards)), -rewards, groups))
    place = np.arange(len(order)) - np.searchsorted(groups[order], groups[order])
    chosen = np.zeros(len(order), bool)
    chosen[order] = place < keep
    if least is not None:
        chosen &= rewards >= least
    if not chosen.any():
        raise DataError(f"{', '.join(prepared.sources)}: no row has a reward of at least {least}.")
    sources, begin = {}, 0
    for name, source in prepared.sources.items():
        mine = np.flatnonzero(chosen[begin : begin + len(source)])
        begin += len(source)
        if len(mine):
            sources[name] = _only(source, mine, prepared, cache)
    config = prepared.config
    found = files_of(config.valid_sources if valid else config.sources)
    kept = {name: weight for name, weight in found.items() if name in sources}
    said = (
        f"kept {chosen.sum()} of {len(chosen)} rows, the best {keep} of each of {groups.max() + 1} "
        f"prompts: mean reward {rewards.mean():.4g} -> {rewards[chosen].mean():.4g}"
    )
    weights = weights_of(kept, sources, config)
    return replace(prepared, sources=sources, weights=weights, notes=(*prepared.notes, said))


def _only(source: Tokenised, numbers: np.ndarray, prepared: Prepared, cache: Path) -> Tokenised:
    """Some rows of a file as a source of their own."""
    key = caches.cache_key(source.key, numbers.tolist())

    def make(folder: Path) -> None:
        counts = RowCounts(lines=len(source))
        with closing(Writer(folder, prepared.words.vocab_size)) as writer:
            for number in numbers.tolist():
                row = source.row(number)
                writer.add(Made(int(source.table["line"][number]), [row]))
                counts.rows += 1
                counts.tokens += len(row.sequence.ids)
                counts.trained += int(row.sequence.trained[1:].sum())
            writer.finish(key, source.said, counts)

    return caches.load_or_make(cache, key, prepared.kind, make, lambda line: None)
