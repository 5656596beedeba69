"""`data stream` and `data trace` of a far step (issue R, item 29: 10,000 steps took 2.8 s): nothing is walked twice."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from megallm.data.indexed.dataset import IndexedWriter
from megallm.data.stream import state_cache
from megallm.data.stream.plan import CONCAT, Reading, StreamPlan, StreamSegment
from megallm.data.stream.source import DocumentSource
from megallm.data.stream.state_cache import StreamStateCache
from megallm.data.stream.stream import Stream

BATCH = 4


def dataset(prefix: Path, documents: int, seed: int) -> str:
    chance = np.random.RandomState(seed)
    lengths = chance.randint(0, 90, documents).astype(np.int32)
    with IndexedWriter(str(prefix), np.dtype("<u2")) as writer:
        writer.add(chance.randint(97, 122, lengths.sum()), lengths)
        writer.commit()
    return str(prefix)


def plan_of(kind: str, a: str, b: str) -> StreamPlan:
    reading = Reading(64, packing=CONCAT if kind == "concat" else "best_fit", window=16)
    later = [StreamSegment(40 * BATCH * 64, {b: 1.0, a: 2.0}, Reading(32, window=8))] if kind == "segments" else []
    return StreamPlan((StreamSegment(0, {a: 0.7, b: 0.3}, reading), *later), 3)


def sources_of(plan: StreamPlan) -> dict[str, DocumentSource]:
    return {prefix: DocumentSource(prefix, plan, 500) for prefix in plan.prefixes}


@pytest.fixture
def takes(monkeypatch):
    """The number of steps that were walked."""
    counted, original = [], Stream.take
    monkeypatch.setattr(Stream, "take", lambda self, count: counted.append(1) or original(self, count))
    return counted


@pytest.mark.parametrize("kind", ["best_fit", "concat", "segments"])
def test_item_29_rows_are_the_same_wherever_the_walk_begins(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(state_cache, "_ROWS", 7 * BATCH)
    monkeypatch.setattr(state_cache, "_MOST", 10)
    plan = plan_of(kind, dataset(tmp_path / "a", 300, 1), dataset(tmp_path / "b", 90, 2))
    sources, straight = sources_of(plan), Stream(plan, sources_of(plan))
    rows = [straight.take(BATCH) for _ in range(160)]
    chance = random.Random(5)
    for step in (30, 29, *chance.sample(range(160), 14), 0, 159):
        stream = StreamStateCache(plan, sources, BATCH).walked(plan, sources, step, BATCH)
        assert stream.take(BATCH) == rows[step], step
    (kept,) = Path(state_cache.FOLDER).iterdir()
    assert len(json.loads(kept.read_text())["marks"]) <= 11


def test_item_29_a_far_step_is_walked_to_once(tmp_path, takes):
    plan = plan_of("best_fit", dataset(tmp_path / "a", 300, 1), dataset(tmp_path / "b", 90, 2))
    sources, stride = sources_of(plan), state_cache._ROWS // BATCH
    walked = []
    for step in (1400, 1400, 1399, 1100, 1401):
        takes.clear()
        StreamStateCache(plan, sources, BATCH).walked(plan, sources, step, BATCH)
        walked.append(len(takes))
    assert walked[:2] == [1400, 0] and max(walked[2:]) < stride and walked[4] == 1


@pytest.mark.parametrize("change", ["tokens", "seed", "batch", "damaged", "unwritable"])
def test_item_29_bookmarks_of_something_else_are_not_used(tmp_path, takes, change, monkeypatch):
    a, b = dataset(tmp_path / "a", 300, 1), dataset(tmp_path / "b", 90, 2)
    plan, batch = plan_of("best_fit", a, b), BATCH
    if change == "unwritable":
        monkeypatch.setattr(state_cache, "FOLDER", "/proc/nowhere")
    StreamStateCache(plan, sources_of(plan), batch).walked(plan, sources_of(plan), 50, batch)
    if change == "tokens":
        os.utime(f"{a}.bin", (1, 1))
    elif change == "seed":
        plan = StreamPlan(plan.segments, 4)
    elif change == "batch":
        batch = 3
    elif change == "damaged":
        for path in Path(state_cache.FOLDER).iterdir():
            path.write_text(path.read_text()[:-9])
    takes.clear()
    sources = sources_of(plan)
    stream = StreamStateCache(plan, sources, batch).walked(plan, sources, 50, batch)
    assert len(takes) == 50
    straight = Stream(plan, sources_of(plan))
    for _ in range(50):
        straight.take(batch)
    assert stream.take(batch) == straight.take(batch)
