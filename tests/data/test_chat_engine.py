"""The same conversations, padded and packed, give a model the same loss and the same gradients in float64."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from megallm.data.batches import Share
from megallm.data.chat.config import ChatDataConfig
from megallm.data.chat.prepare import prepare
from megallm.data.chat.reader import reader_of
from megallm.data.loader import Loader, to_tensors
from megallm.losses.language import NextToken
from tests.data.chat_cases import conversation, write_jsonl
from tests.engine.tiny import MODEL, engine_of, gradients_of, state_of

SHAPE = replace(MODEL, vocab_size=257, max_positions=640)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("engine"), random.Random(4)
    path = write_jsonl(folder / "F.jsonl", [{"messages": conversation(draw)} for _ in range(9)])

    def made(packing: bool):
        config = ChatDataConfig({path: None}, tokenizer="bytes", seed=2, seq_len=640, packing=packing)
        return prepare(config, "sft", folder / "cache")

    return made


def everything(prepared, packing: bool) -> list[dict]:
    """All conversations once, as the microbatches of one step."""
    rows = reader_of(prepared(packing), Share(1, 1)).steps()
    count = rows if packing else rows + rows % 2
    read = reader_of(prepared(packing), Share(count, 1 if packing else 2), epochs=1, multiple=4)
    with Loader(read.batches, 1, 2) as loader:
        ((_, batches),) = loader
    return batches


def trained(batches: list[dict]) -> tuple[float, dict, int]:
    engine = engine_of(model=SHAPE)
    stats = engine.train_step(batches, NextToken(), lr=1e-3)
    return stats.losses["loss"], gradients_of(state_of(engine)), stats.counts["loss"]


def apart(one: dict, two: dict) -> float:
    assert one.keys() == two.keys() and one
    return max(float((one[name] - two[name]).abs().max() / two[name].abs().max()) for name in one)


def test_packed_equals_padded_and_the_masks_matter(prepared):
    loss, gradients, count = trained(everything(prepared, packing=False))
    packed = everything(prepared, packing=True)
    assert len(packed) > 1 and max(len(batch["cu_seqlens"]) for batch in packed) > 3
    other, others, same = trained(packed)
    assert count == same and other == pytest.approx(loss, rel=1e-12) and apart(others, gradients) < 1e-10
    leaking = [{key: value for key, value in batch.items() if key != "cu_seqlens"} for batch in packed]
    assert abs(trained(leaking)[0] - loss) > 1e-6  # sequences that see each other are noticed
    read = reader_of(prepared(False), Share(2, 2))
    assert to_tensors(read.batches(1)[0])["samples"].shape == (2,)
