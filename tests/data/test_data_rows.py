"""Packing, fill in the middle, and the targets of other objectives: pure functions of what a row holds and a key."""

from __future__ import annotations

import json
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.base import rng
from megallm.base.errors import UsageError
from megallm.data.batches import Share, StreamReader
from megallm.data.masking import MaskRule, diffuse_tokens, mask_tokens, word_starts_of
from megallm.data.stream import fim, packing
from megallm.data.stream.fim import PLAIN, PSM, SPM, Rearranger, Sentinels
from megallm.data.stream.plan import CONTEXT, Reading, StreamPlan, StreamSegment
from megallm.data.stream.source import DocumentSource
from megallm.data.stream.stream import Stream
from megallm.data.text import tokenizer
from tests.data.stream_cases import check_exactly_once, write

# Packing.


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 80))
def test_best_fit_holds_everything_once_and_wastes_little(sizes, capacity):
    rows = packing.best_fit(sizes, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    assert all(0 < sum(sizes[i] for i in row) <= capacity for row in rows)
    least = -(-sum(sizes) // capacity)
    assert len(rows) <= 11 * least / 9 + 4  # Johnson's bound, with the sum in place of the optimum it is not less than
    if len(rows) > 1:  # no two rows could have been one
        fills = sorted(sum(sizes[i] for i in row) for row in rows)
        assert fills[0] + fills[1] > capacity


def test_best_fit_puts_pieces_where_least_room_is_left():
    assert packing.best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    with pytest.raises(ValueError, match="A piece of 11"):
        packing.best_fit([11], 10)


def test_concatenate_cuts_everywhere():
    assert packing.concatenate([3, 0, 9, 2], 5) == [[(0, 0, 3), (2, 0, 2)], [(2, 2, 7)], [(2, 7, 9), (3, 0, 2)]]


def cut_documents(reading, documents, tmp_path):
    """(documents that fit into a row but were cut, share of the rows that is filled) over the first epoch."""
    prefix = write(tmp_path / reading.packing, documents)
    plan = StreamPlan((StreamSegment(0, {prefix: 1.0}, reading),), seed=1)
    stream, cut, rows, tokens = Stream(plan, {prefix: DocumentSource(prefix, plan)}), set(), 0, 0
    while (row := stream.take(1)[0]).epoch == 0:
        rows, tokens = rows + 1, tokens + sum(item.size for item in row.items)
        for document, begin, end in row.spans:
            if len(documents[document]) <= reading.seq_len and (begin, end) != (0, len(documents[document])):
                cut.add(document)
    return len(cut), tokens / (rows * reading.seq_len)


def test_best_fit_never_cuts_a_document_that_fits(tmp_path):
    lengths = np.random.RandomState(2).lognormal(4, 1.2, 1500).astype(int) + 1
    documents = [np.ones(n, np.uint16) for n in lengths]
    cut, fill = cut_documents(Reading(256, "best_fit", 256), documents, tmp_path)
    assert cut == 0 and fill > 0.96
    cut, fill = cut_documents(Reading(256, "concat", 256), documents, tmp_path)
    assert cut > 0.2 * len(documents) and fill > 0.99  # what the option costs


# Fill in the middle.

SENTINELS = Sentinels(257, 258, 259)
BYTES = tokenizer.ByteTokenizer()
TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    text = "the quick brown fox jumps over the lazy dog, naïve 漢字 and 🙂 emoji\n"
    (folder / "t.jsonl").write_text(json.dumps({"text": text * 20}) + "\n")
    tokenizer.train_bpe([str(folder / "t.jsonl")], 320, str(folder / "tok"), special_tokens=fim.KNOWN[0])
    return tokenizer.load(str(folder / "tok"))


@settings(max_examples=150, deadline=None)
@given(TEXT, st.integers(0, 2**32), st.sampled_from([PSM, SPM]))
def test_fim_strips_back_to_the_original_bytes(text, seed, form):
    ids = fim.rearrange(text, form, rng.key_of(seed), BYTES.encode, SENTINELS)
    assert len(ids) == len(text.encode()) + 3
    assert fim.restore(ids, BYTES.decode, SENTINELS)[1].encode() == text.encode()


def test_fim_with_a_bpe_strips_back_and_cuts_inside_tokens(bpe):
    sentinels = fim.find_sentinels(bpe, None, None)
    assert [bpe.decode([i]) for i in vars(sentinels).values()] == list(fim.KNOWN[0])
    text, inside = "the quick brown naïve 漢字 🙂 fox", 0
    whole = bpe.encode(text)
    for seed in range(60):
        for form in (PSM, SPM):
            ids = fim.rearrange(text, form, rng.key_of(seed), bpe.encode, sentinels)
            assert fim.restore(ids, bpe.decode, sentinels)[1] == text
            inside += len(ids) - 3 > len(whole)
    assert inside > 30  # tokens were cut, which a rearrangement of tokens could not do


def test_fim_rates_and_shares_are_what_was_asked():
    n = 6000
    for rate, spm in ((0.5, 0.5), (0.9, 0.2)):
        forms = [fim.choose_form(rng.key_of(1, "x", i), rate, spm) for i in range(n)]
        changed = n - forms.count(PLAIN)
        assert abs(changed - n * rate) < 4 * sqrt(n * rate * (1 - rate))
        assert abs(forms.count(SPM) - changed * spm) < 4 * sqrt(changed * spm * (1 - spm))


def test_fim_cuts_are_uniform_over_code_points():
    counts = np.zeros(6)
    for i in range(3000):
        for place in fim.cuts(rng.key_of(1, i), 5):
            counts[place] += 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 5 + 5 * sqrt(10)


def test_fim_keeps_the_end_of_document_last_and_leaves_broken_text_alone():
    rearranger = Rearranger(BYTES, SENTINELS)
    out = rearranger(np.array([*"héllo".encode(), 256]), PSM, 5)
    assert out[-1] == 256 and fim.restore(out[:-1].tolist(), BYTES.decode, SENTINELS)[1] == "héllo"
    assert rearranger(np.array([0xFF, 65]), PSM, 5) is None and rearranger(np.array([256]), PSM, 5) is None


@pytest.mark.parametrize("form", [PSM, SPM])
def test_fim_leaves_the_frame_of_a_document_around_it(form):
    class Framed(tokenizer.ByteTokenizer):
        specials = {256, 260, 261}

    out = Rearranger(Framed(), SENTINELS)(np.array([260, *"héllo".encode(), 261, 256]), form, 5).tolist()
    assert (out[0], out[-2:]) == (260, [261, 256])
    assert fim.restore(out[1:-2], BYTES.decode, SENTINELS)[1] == "héllo"
    assert Rearranger(Framed(), SENTINELS)(np.array([*b"a", 261, *b"b"]), form, 5) is None, "it is not one text"


def test_fim_needs_sentinels_inside_the_vocabulary(bpe):
    with pytest.raises(UsageError, match="tokenizer train --special-tokens"):
        fim.find_sentinels(BYTES, None, None)
    assert fim.find_sentinels(BYTES, ("257", "258", "259"), 260) == SENTINELS
    with pytest.raises(UsageError, match="has the id 259, but model.vocab_size is 259"):
        fim.find_sentinels(BYTES, ("257", "258", "259"), 259)
    with pytest.raises(UsageError, match="three different tokens"):
        fim.find_sentinels(bpe, ("<|fim_prefix|>",) * 3, None)


TEXTS = [f"document {i} says {'é' * (i % 7)} {'word ' * (i % 23)}" for i in range(120)]


def fim_stream(tmp_path, reading, name="f"):
    prefix = write(tmp_path / name, [np.array([*text.encode(), 256], np.uint16) for text in TEXTS])
    plan = StreamPlan((StreamSegment(0, {prefix: 1.0}, reading),), seed=4)
    return prefix, lambda state=None: Stream(
        plan, {prefix: DocumentSource(prefix, plan, 260, Rearranger(BYTES, SENTINELS))}, state
    )


@pytest.mark.parametrize("packing_kind", ["best_fit", "concat"])
def test_documents_of_the_stream_strip_back(tmp_path, packing_kind):
    """Pieces of each document joined again, whatever rows they were in, give the original text."""
    prefix, make = fim_stream(tmp_path, Reading(64, packing_kind, 8, fim_rate=0.5))
    stream, pieces, forms = make(), {}, {}
    while (row := stream.take(1)[0]).epoch == 0:
        for item in row.items:
            tokens, _ = stream.sources[prefix].read(item, 0)
            pieces.setdefault(item.document, {})[item.begin] = tokens.tolist()
            assert forms.setdefault(item.document, item.form) == item.form
    for document, text in enumerate(TEXTS):
        ids = [i for begin in sorted(pieces[document]) for i in pieces[document][begin]]
        assert ids[-1] == 256 and fim.restore(ids[:-1], BYTES.decode, SENTINELS)[1] == text
    share = sum(form != PLAIN for form in forms.values()) / len(TEXTS)
    assert abs(share - 0.5) < 4 * sqrt(0.25 / len(TEXTS))


def test_fim_does_not_depend_on_ranks_resume_or_folder(tmp_path):
    reading = Reading(64, "best_fit", 8, fim_rate=0.7)
    prefix, make = fim_stream(tmp_path, reading)
    quiet = StreamReader(make(), Share(4, 1), 1)
    wanted = [quiet.batches(step) for step in range(1, 13)]
    for step in (1, 5, 9):
        state = quiet.state_after(step - 1) if step > 1 else None
        ranks = [StreamReader(make(state), Share(4, 1, 2, rank), step) for rank in range(2)]
        got = [batch for reader in ranks for batch in reader.batches(step)]
        for one, two in zip(got, wanted[step - 1], strict=True):
            assert all(np.array_equal(one[name], two[name]) for name in two)
    _, other = fim_stream(tmp_path, reading, name="elsewhere")
    assert [r.spans for r in other().take(4)] == [r.spans for r in make().take(4)]


def test_context_form_rearranges_what_a_row_holds(tmp_path):
    prefix, make = fim_stream(tmp_path, Reading(128, "best_fit", 8, fim_rate=1.0, fim_form=CONTEXT))
    stream, rows, seen = make(), [], {}
    while (row := stream.take(1)[0]).epoch == 0:
        rows.append(row)
        for item in row.items:
            tokens, following = stream.sources[prefix].read(item, 0)
            ids = [i for i in tokens.tolist() if i != 256]
            assert len(tokens) == item.size <= 128 and (item.form == PLAIN or following is None)
            seen[item.document, item.begin] = fim.restore(ids, BYTES.decode, SENTINELS)[1]
    check_exactly_once({}, rows)
    for document, text in enumerate(TEXTS):
        assert "".join(seen[key] for key in sorted(seen) if key[0] == document) == text
    assert sum(item.form != PLAIN for row in rows for item in row.items) > 100


# Masked language modelling.

RULE = MaskRule(mask_token=4, vocab_size=1000, special=(0, 1, 4))


def test_masking_follows_80_10_10_and_spares_special_tokens():
    n = 40000
    tokens = 5 + np.arange(n) % 900
    tokens[::50] = 1
    out = mask_tokens(tokens, RULE, key=1)
    chosen, ordinary = out["mask"], tokens != 1
    assert (out["labels"] == tokens).all() and not chosen[~ordinary].any()
    assert (out["tokens"][~chosen] == tokens[~chosen]).all()
    count, free = chosen.sum(), ordinary.sum()
    assert abs(count - 0.15 * free) < 4 * sqrt(free * 0.15 * 0.85)
    for share, found in ((0.8, out["tokens"] == 4), (0.1, chosen & (out["tokens"] == tokens))):
        assert abs((found & chosen).sum() - share * count) < 5 * sqrt(count * share * (1 - share))
    assert not np.isin(out["tokens"][chosen & (out["tokens"] != 4)], RULE.special).any()
    assert (mask_tokens(tokens, RULE, key=1)["tokens"] == out["tokens"]).all()
    assert (mask_tokens(tokens, RULE, key=2)["mask"] != chosen).any()  # dynamic


def test_whole_words_are_chosen_together():
    starts = word_starts_of(["Ġa", "b", "c", "Ġd", "Ġe", "f"] * 2000)
    assert starts.tolist()[:6] == [True, False, False, True, True, False]
    assert word_starts_of(["un", "##do", "it"], "##").tolist() == [True, False, True]
    tokens = 5 + np.arange(len(starts)) % 900
    chosen = mask_tokens(tokens, MaskRule(4, 1000), 3, starts)["mask"]
    words = np.split(chosen, np.flatnonzero(starts)[1:])
    assert all(word.all() or not word.any() for word in words)
    assert abs(np.mean([word.any() for word in words]) - 0.15) < 0.03
    assert any(0 < sum(w) < len(w) for w in np.split(mask_tokens(tokens, RULE, 3)["mask"], np.flatnonzero(starts)[1:]))


def test_bad_shares_are_refused():
    with pytest.raises(UsageError, match="masked \\+ random <= 1"):
        MaskRule(4, 1000, masked=0.8, random=0.3)


# Diffusion.


def test_diffusion_masks_at_its_level_and_weighs_by_it():
    tokens, levels = np.arange(1, 2001), []
    keep = np.arange(2000) < 100
    for key in range(200):
        out = diffuse_tokens(tokens, key, 0, keep)
        assert not out["mask"][:100].any() and (out["labels"] == tokens).all()
        assert ((out["tokens"] == 0) == out["mask"]).all() and (out["weight"][~out["mask"]] == 0).all()
        if out["mask"].any():
            level = 1 / out["weight"][out["mask"]][0]
            assert abs(out["mask"][100:].mean() - level) < 5 * sqrt(0.25 / 1900)
            levels.append(level)
    assert abs(np.mean(levels) - 0.5) < 0.1 and min(levels) < 0.1 and max(levels) > 0.9
