"""Hidden tokens in rows: what is hidden hangs on the document and the epoch only; padding and specials never are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megallm.base.errors import UsageError
from megallm.data.batches import MegatronReader, Share, StreamReader
from megallm.data.masking import MaskRule
from megallm.data.objective import (
    DIFFUSION,
    MLM,
    TokenMasker,
    mask_token_of,
    special_tokens,
    word_start_table,
)
from megallm.data.stream.plan import Reading, StreamPlan, StreamSegment
from megallm.data.stream.stream import Stream
from megallm.data.text.tokenizer import ByteTokenizer, FolderTokenizer
from tests.data.stream_cases import sources_of, write

MASK, EOD = 257, 256
RULE = MaskRule(MASK, 256, (EOD, MASK))
LENGTHS = [5, 40, 3, 17, 1, 64, 9, 2] * 8


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    """Documents whose number stands in their tokens, each ended by EOD."""
    draw = np.random.RandomState(0)
    documents = [np.append(draw.randint(0, 256, n), EOD) for n in LENGTHS]
    return write(tmp_path_factory.mktemp("objective") / "a", documents)


def reader(prefix: str, kind: str, share: Share, apart: bool = True, seed: int = 5, seq_len: int = 32) -> StreamReader:
    plan = StreamPlan((StreamSegment(0, {prefix: 1.0}, Reading(seq_len, "best_fit", 8)),), seed=1)
    return StreamReader(Stream(plan, sources_of(plan)), share, 1, apart, TokenMasker(kind, RULE, seed))


def seen(stream: StreamReader, steps: int) -> dict[tuple, np.ndarray]:
    """(document, begin, epoch) -> [tokens, labels, mask, weight] of that text, from packed batches."""
    found = {}
    for step in range(1, steps + 1):
        batches, rows = stream.batches(step), stream.consumed(step)
        lines = np.concatenate([np.stack([b[n][0] for n in ("tokens", "labels", "mask", "weight") if n in b], -1)
                                for b in batches])  # fmt: skip
        length = len(lines) // len(rows)
        for number, row in enumerate(rows):
            at = number * length
            for document, begin, end in row["spans"]:
                found[document, begin, row["epoch"]] = lines[at : at + end - begin]
                at += end - begin
            assert not lines[at : (number + 1) * length, 1:].any(), "padding has no labels and does not count"
    return found


@pytest.mark.parametrize("kind", [MLM, DIFFUSION])
def test_what_is_hidden_hangs_on_the_document_and_the_epoch(prefix, kind):
    one = seen(reader(prefix, kind, Share(6, 3)), 40)
    halves = [seen(reader(prefix, kind, Share(6, 1, 2, rank)), 40) for rank in range(2)]
    again = halves[0] | halves[1]
    assert one.keys() == again.keys() and len(one) > 200
    assert all(np.array_equal(one[key], again[key]) for key in one)
    larger = seen(reader(prefix, kind, Share(4, 2), seq_len=96), 20)  # other rows, the same documents in them
    whole = [key for key in larger if key in one and len(one[key]) == len(larger[key])]
    assert len(whole) > 40 and all(np.array_equal(one[key], larger[key]) for key in whole)
    epochs = [key for key in one if (*key[:2], key[2] + 1) in one and len(one[key]) > 30]
    assert epochs and all((one[key] != one[*key[:2], key[2] + 1]).any() for key in epochs)
    other = seen(reader(prefix, kind, Share(6, 3), seed=6), 10)
    assert any((one[key] != other[key]).any() for key in other)


def test_masked_language_model_rows(prefix):
    """Labels are what stood there; what is predicted is 15 %; EOD stays; hidden tokens are mostly the mask token."""
    tokens, labels, mask = np.concatenate(list(seen(reader(prefix, MLM, Share(6, 3)), 60).values())).T
    mask = mask.astype(bool)
    assert not mask[labels == EOD].any() and (tokens[~mask] == labels[~mask]).all()
    assert abs(mask[labels != EOD].mean() - 0.15) < 0.02
    assert abs((tokens[mask] == MASK).mean() - 0.8) < 0.04 and (labels != MASK).all()
    assert 0.05 < (tokens[mask] == labels[mask]).mean() < 0.15


def test_diffusion_rows(prefix):
    """Each text has a rate of its own; hidden tokens weigh one over it, and the mask counts all that could be."""
    rates = []
    for tokens, labels, mask, weight in (x.T for x in seen(reader(prefix, DIFFUSION, Share(6, 3)), 60).values()):
        hidden = weight > 0
        assert np.array_equal(mask.astype(bool), labels != EOD) and not hidden[labels == EOD].any()
        assert (tokens[hidden] == MASK).all() and (tokens[~hidden] == labels[~hidden]).all()
        if hidden.any():
            assert len(set(weight[hidden].tolist())) == 1
            rates.append((1 / weight[hidden][0], hidden.sum(), mask.sum()))
    large = [(rate, hidden / total) for rate, hidden, total in rates if total >= 30]
    assert np.abs(np.array([rate - share for rate, share in large])).mean() < 0.08
    assert np.std([rate for rate, _ in large]) > 0.2


def test_documents_apart_or_rows_whole(prefix):
    """Without document masks a row is one text to attention, but its padding still is not part of it."""
    apart = reader(prefix, MLM, Share(4, 2)).batches(1)[0]
    joined = reader(prefix, MLM, Share(4, 2), apart=False).batches(1)[0]
    assert np.array_equal(apart["tokens"], joined["tokens"]) and np.array_equal(apart["mask"], joined["mask"])
    assert set(joined["cu_seqlens"]) < set(apart["cu_seqlens"]) and {0, 32, 64} <= set(joined["cu_seqlens"])
    for batch in (apart, joined):
        ends = batch["cu_seqlens"]
        assert batch["positions"][0].tolist() == [i for a, b in zip(ends, ends[1:], strict=False) for i in range(b - a)]
    filled = [
        sum(end - begin for _, begin, end in row["spans"]) for row in reader(prefix, MLM, Share(4, 2)).consumed(1)
    ]
    assert set(joined["cu_seqlens"]) == {0, 32, 64, filled[0], 32 + filled[1]}


class Samples:
    """Megatron's samples: number i holds i, i + 1, ..."""

    def sample(self, i: int) -> np.ndarray:
        return (np.arange(33) * 7 + i) % 250


def test_samples_of_megatrons_order_are_texts_by_number():
    hide = TokenMasker(MLM, MaskRule(MASK, 256, (EOD, MASK), rate=0.5), 5)
    one = MegatronReader(Samples(), Share(4, 4), hide)
    two = [MegatronReader(Samples(), Share(4, 1, 2, rank), hide) for rank in range(2)]
    for step in (1, 2):
        (whole,) = one.batches(step)
        parts = [batch for rank in two for batch in rank.batches(step)]
        for name, array in whole.items():
            assert np.array_equal(array, np.concatenate([part[name] for part in parts])), name
        assert whole["tokens"].shape == (4, 32) and whole["mask"].any()
        assert np.array_equal(whole["labels"][1], Samples().sample((step - 1) * 4 + 1)[:-1])


# Tokens


def folder(path: Path, pieces: list[str], specials: tuple[str, ...]) -> FolderTokenizer:
    """A tokenizer.json with these pieces, the special ones first."""
    import tokenizers

    names = [*specials, *pieces]
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="a"))
    built.add_special_tokens(list(specials))
    path.mkdir()
    built.save(str(path / "tokenizer.json"))
    return FolderTokenizer(str(path))


def test_the_mask_token_is_found_or_named(tmp_path):
    bert = folder(tmp_path / "bert", ["a", "##b", "c"], ("[PAD]", "[CLS]", "[SEP]", "[MASK]"))
    assert mask_token_of(bert, None, 7) == 3 and mask_token_of(bert, "c", 7) == 6 and mask_token_of(bert, "6", 7) == 6
    assert special_tokens(bert) == {0, 1, 2, 3}  # and it does not say what ends a document
    with pytest.raises(UsageError, match=r"id 7, but model.vocab_size is 7: give the model at least 8"):
        mask_token_of(bert, "7", 7)
    with pytest.raises(UsageError, match="has no wobble: name one of its tokens or an id"):
        mask_token_of(bert, "wobble", 7)
    with pytest.raises(UsageError, match=r"data.masking.token=257 and model.vocab_size=258\."):
        mask_token_of(ByteTokenizer(), None, 257)
    assert special_tokens(ByteTokenizer()) == {256} and special_tokens(None) == set()


@pytest.mark.parametrize(
    ("pieces", "starts"),
    [
        (["a", "##b", "c"], [True, False, True]),
        (["Ġa", "b", "Ġ", "Ġc"], [True, False, True, True]),
        (["▁a", "b", "▁c"], [True, False, True]),
    ],
)
def test_where_words_begin(pieces, starts, tmp_path):
    assert word_start_table(folder(tmp_path / "t", pieces, ())).tolist() == starts


def test_whole_words_are_hidden_together(tmp_path):
    text = np.frombuffer(b" one two three four five six seven eight nine ten" * 40, np.uint8).astype(np.int64)
    hide = TokenMasker(MLM, MaskRule(MASK, 256, (EOD, MASK)), 5, word_start_table(ByteTokenizer()))
    mask = hide(text, "document", 1)["mask"]
    words = np.cumsum(text == 32)
    for word in range(1, words[-1] + 1):
        assert len(set(mask[words == word].tolist())) == 1
    assert 0.1 < mask.mean() < 0.2
    alone = TokenMasker(MLM, MaskRule(MASK, 256, (EOD, MASK)), 5)(text, "document", 1)["mask"]  # negative control
    assert any(len(set(alone[words == word].tolist())) == 2 for word in range(1, words[-1] + 1))


def test_a_tokenizer_that_hides_its_words(tmp_path):
    with pytest.raises(UsageError, match="cannot tell where words begin"):
        word_start_table(folder(tmp_path / "t", ["a", "b"], ()))
    with pytest.raises(UsageError, match="needs a tokenizer.json"):
        word_start_table(None)
    assert json.loads((tmp_path / "t/tokenizer.json").read_text())["model"]["type"] == "WordLevel"
