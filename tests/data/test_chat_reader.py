"""Order and batches of conversations: exactly once an epoch, the same on every layout and after every resume."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from megallm.base.config import loads, schema
from megallm.base.errors import DataError, UsageError
from megallm.data.batches import Share
from megallm.data.chat import prepare as preparing
from megallm.data.chat.cache import load_or_make
from megallm.data.chat.config import ChatDataConfig
from megallm.data.chat.prepare import prepare
from megallm.data.chat.preview import first_rows, preview, show_row
from megallm.data.chat.reader import open_chat_reader, reader_of
from megallm.data.text import tokenizer
from tests.data.chat_cases import CHATML, END, conversation, make_tokenizer, text, write_jsonl

ROWS, PAIRS = 37, 23
SHARE = Share(4, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder, draw = tmp_path_factory.mktemp("chat"), random.Random(1)
    make_tokenizer(folder / "tokenizer", CHATML)
    write_jsonl(folder / "a.jsonl", [{"messages": conversation(draw)} for _ in range(ROWS)])
    write_jsonl(folder / "b.jsonl", [{"messages": conversation(draw)} for _ in range(11)])
    pairs = [
        {
            "prompt": [{"role": "user", "content": text(draw)}],
            "chosen": text(draw),
            "rejected": text(draw),
            "margin": i / 8,
        }
        for i in range(PAIRS)
    ]
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": one["prompt"], "solution": i} for i, one in enumerate(pairs)])
    return folder


def config(folder: Path, *names: str, **more) -> ChatDataConfig:
    sources = {str(folder / name): None for name in names or ("a.jsonl",)}
    return ChatDataConfig(
        sources, **{"seq_len": 192, "tokenizer": str(folder / "tokenizer"), "seed": 5, "window": 3} | more
    )


KINDS = {
    "sft": "a.jsonl",
    "preference": "pairs.jsonl",
    "reward": "pairs.jsonl",
    "unpaired": "pairs.jsonl",
    "prompts": "prompts.jsonl",
}


def reader(folder: Path, kind: str = "sft", share: Share = SHARE, state=None, step: int = 1, **more):
    names = more.pop("names", (KINDS[kind],))
    made = prepare(config(folder, *names, **more), kind, folder / "cache")
    return reader_of(made, share, step, state, multiple=4)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_read_once_an_epoch(folder, kind, packing):
    read, epochs = reader(folder, kind, packing=packing), 2
    found: dict[int, Counter] = {}
    for step in range(1, read.steps(epochs) + 1):
        for row in read.consumed(step):
            for document, _, _ in row["spans"]:
                found.setdefault(row["epoch"], Counter())[document] += 1
    (source,) = read.prepared.sources.values()
    for epoch in range(epochs):
        assert found[epoch] == Counter(range(len(source)))
    assert [*found[0]] != sorted(found[0])


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_ranks_and_microbatches_divide_the_same_rows(folder, packing):
    whole = reader(folder, "preference", Share(4, 4), packing=packing)
    parts = [reader(folder, "preference", Share(4, 1, 2, rank), packing=packing) for rank in range(2)]
    for step in range(1, 9):
        (expected,) = whole.batches(step)
        micros = [micro for part in parts for micro in part.batches(step)]
        shapes = {
            tuple((key, micro[key].shape) for key in ("tokens", "mask", "labels", "positions")) for micro in micros
        }
        assert len(micros) == 4 and len(shapes) == 1  # equal on every rank and in every microbatch
        samples = np.concatenate([one["samples"] for one in micros])
        assert samples[samples >= 0].tolist() == expected["samples"][expected["samples"] >= 0].tolist()
        assert sum(one["mask"].sum() for one in micros) == expected["mask"].sum()
        for one in (expected, *micros):  # a pair lies in one microbatch, chosen before rejected
            ids = one["samples"]
            pairs = ids[: len(ids) // 2 * 2]  # one left over is padding
            assert (pairs[0::2] == pairs[1::2]).all() and (len(ids) % 2 == 0 or ids[-1] == -1)
            real = ids[ids >= 0]
            assert (ids[: len(real)] == real).all()


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_resumed_reader_reads_on_whatever_the_layout(folder, packing):
    names = ("a.jsonl", "b.jsonl")
    whole = reader(folder, names=names, packing=packing)
    expected, states = {}, {}
    for step in range(1, 25):
        expected[step], states[step] = whole.batches(step), whole.state_after(step)
    for step in (1, 7, 12, 23):
        state = json.loads(json.dumps(states[step]))
        again = reader(folder, state=state, step=step + 1, names=names, packing=packing)
        for one, two in zip(again.batches(step + 1), expected[step + 1], strict=True):
            assert one.keys() == two.keys() and all((one[key] == two[key]).all() for key in one)
    other = reader(folder, share=Share(4, 1, 4, 2), state=states[7], step=8, names=names, packing=packing)
    assert set(other.batches(8)[0]["samples"]) <= {sample for micro in expected[8] for sample in micro["samples"]} | {
        -1
    }


def targets(batches: list[dict]) -> Counter:
    """(sample, position, token, label) of each label that counts."""
    found: Counter = Counter()
    for batch in batches:
        if "cu_seqlens" in batch:
            owner = np.repeat(batch["samples"], np.diff(batch["cu_seqlens"]))[None]
        else:
            owner = np.repeat(batch["samples"][:, None], batch["tokens"].shape[1], 1)
        keys = (owner, batch["positions"], batch["tokens"], batch["labels"])
        found.update(zip(*(key[batch["mask"]].tolist() for key in keys), strict=True))
    return found


def all_targets(read) -> Counter:
    found: Counter = Counter()
    read.epochs = 1
    for step in range(1, read.steps() + 1):
        found += targets(read.batches(step))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_padded_train_the_same_tokens_at_the_same_positions(folder, kind):
    padded, packed = (all_targets(reader(folder, kind, packing=packing)) for packing in (False, True))
    assert padded == packed and (kind == "prompts" or padded)
    assert kind == "unpaired" or max(padded.values(), default=1) == 1 or kind in ("preference", "reward")


def test_a_packed_row_keeps_its_sequences_apart(folder):
    read = reader(folder, packing=True, share=Share(2, 2))
    end = read.prepared.words.token_id(END["chatml"])
    for step in range(1, read.steps() + 1):
        (batch,) = read.batches(step)
        ends = batch["cu_seqlens"].tolist()
        assert ends[0] == 0 and ends[-1] == batch["tokens"].shape[1] == 2 * 192 and sorted(set(ends)) == ends
        for number, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
            assert batch["positions"][0, a:b].tolist() == [*range(b - a)]
            assert not batch["mask"][0, b - 1]  # nothing of the next sequence is predicted
            tokens, labels, mask = (batch[key][0, a:b] for key in ("tokens", "labels", "mask"))
            assert (labels[:-1][mask[:-1]] == tokens[1:][mask[:-1]]).all()
            row = read.examples(step)[number][1] if batch["samples"][number] >= 0 else None
            assert mask.any() == (row is not None)
            if row is not None:
                turns = read.prepared.words.decode(row.ids.tolist()).count("<|im_start|>assistant")
                assert int((labels[mask] == end).sum()) == turns  # each turn's end is trained
                assert labels[mask].tolist() == row.ids[1:][row.trained[1:]].tolist()


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_the_labels_of_a_batch_are_what_the_assistant_said(folder, packing):
    read = reader(folder, packing=packing, share=Share(1, 1), names=("b.jsonl",))
    talks = [json.loads(line)["messages"] for line in (folder / "b.jsonl").read_text(encoding="utf-8").splitlines()]
    said = Counter("".join(m["content"] + "<|im_end|>" for m in talk if m["role"] == "assistant") for talk in talks)
    found: Counter = Counter()
    read.epochs = 1
    for step in range(1, read.steps() + 1):
        (batch,) = read.batches(step)
        ends = batch["cu_seqlens"].tolist() if packing else [0, batch["tokens"].shape[1]]
        for a, b in zip(ends, ends[1:], strict=False):
            labels, mask = batch["labels"][0, a:b], batch["mask"][0, a:b]
            found[read.prepared.words.decode(labels[mask].tolist())] += bool(mask.any())
    assert +found == said


def test_the_heads_of_reward_models_read_the_last_token(folder):
    for packing in (False, True):
        (batch,) = reader(folder, "reward", Share(2, 2), packing=packing).batches(1)
        places = np.argwhere(batch["mask"])
        real = batch["samples"][batch["samples"] >= 0]
        assert len(places) == len(real) == (4 if not packing else len(real))
        ends = {tuple(place) for place in places.tolist()}
        if packing:
            assert {(0, end - 1) for end in batch["cu_seqlens"][1 : len(real) + 1].tolist()} == ends
        assert (batch["margin"][1 : len(real) : 2] == 0).all() and batch["margin"].max() > 0


def test_a_pair_shares_its_prompt_and_its_completions_are_trained(folder):
    read = reader(folder, "preference")
    for _, row in read.examples(1):
        size, words = len(row.prompt), read.prepared.words
        for one in (row.chosen, row.rejected):
            assert (one.ids[:size] == row.prompt).all() and not one.trained[:size].any()
            assert words.decode(one.ids[one.trained].tolist()).endswith("<|im_end|>")
        assert words.decode(row.prompt.tolist()).endswith("<|im_start|>assistant\n")
    (batch, _) = read.batches(1)
    assert batch["prompt_tokens"][0] == batch["prompt_tokens"][1] > 0


def test_pairs_without_margins_have_none(folder, tmp_path):
    write_jsonl(tmp_path / "F.jsonl", [{"prompt": "q", "chosen": "x", "rejected": "y"}] * 2)
    section = config(tmp_path, "F.jsonl", tokenizer=str(folder / "tokenizer"))
    read = reader_of(prepare(section, "preference", tmp_path / "cache"), Share(2, 2))
    assert "margin" not in read.batches(1)[0]  # a loss that cannot use it may refuse it
    assert "margin" in reader(folder, "preference").batches(1)[0]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_ranked_answers_stay_together(folder, tmp_path, packing):
    rows = [{"prompt": f"q{i}", "completions": ["x", "yy", "zzz"][: 2 + i % 2], "ranks": [2, 1, 2][: 2 + i % 2]}
            for i in range(6)]  # fmt: skip
    write_jsonl(tmp_path / "F.jsonl", rows)
    more = {"seq_len": 16, "packing": packing, "tokenizer": str(folder / "tokenizer")}
    made = prepare(config(tmp_path, "F.jsonl", **more), "ranked", tmp_path / "cache")
    read = reader_of(made, Share(2, 2), epochs=1)
    found: dict[int, list] = {}
    for step in range(1, read.steps() + 1):
        (batch,) = read.batches(step)
        assert int(batch["mask"].sum()) == (batch["samples"] >= 0).sum()
        real = batch["samples"] >= 0
        assert (batch["prompt"] == batch["samples"]).all() and not batch["rank"][~real].any()
        assert packing or batch["tokens"].shape[0] == 6
        for sample in {*batch["samples"][real].tolist()}:
            assert sample not in found
            found[sample] = batch["rank"][batch["samples"] == sample].tolist()
    assert sorted(found.values()) == [[0, 1]] * 3 + [[0, 1, 1]] * 3
    assert made.counts.rows == 6 and "--- rank 1" in first_rows(made.sources, made.words)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_classes_and_values_stand_at_the_last_token(folder, tmp_path, packing):
    rows = [{"text": f"text {i}", "label": i} for i in range(6)]
    write_jsonl(tmp_path / "F.jsonl", rows)
    more = {"seq_len": 16, "packing": packing, "tokenizer": str(folder / "tokenizer")}
    for kind, name in (("classification", "labels"), ("regression", "targets")):
        read = reader_of(prepare(config(tmp_path, "F.jsonl", **more), kind, tmp_path / "cache"), Share(6, 6), epochs=1)
        (batch,) = read.batches(1)
        assert sorted(batch[name][batch["mask"]].tolist()) == [*range(6)]
        assert (batch["tokens"][batch["mask"]] == read.prepared.words.eod).all()
        assert not batch[name][~batch["mask"]].any()


def test_prompts_come_with_their_columns(folder):
    read = reader(folder, "prompts", Share(3, 3))
    found = [row for _, row in read.examples(1)]
    assert len(found) == 3 and all(row.columns["solution"] == row.number for row in found)
    assert read.prepared.words.decode(found[0].ids.tolist()).endswith("<|im_start|>assistant\n")


def test_held_out_rows_count_once_and_the_last_batch_is_filled_up(folder):
    made = prepare(
        replace(config(folder), valid_sources={str(folder / "b.jsonl"): None}), "sft", folder / "cache", valid=True
    )
    both = [reader_of(made, Share(8, 2, 2, rank), epochs=1) for rank in (0, 1)]
    assert both[1].steps() == 2
    samples = [
        one for step in (1, 2) for part in both for micro in part.batches(step) for one in micro["samples"].tolist()
    ]
    assert len(samples) == 16 and sorted(Counter(samples).values()) == [1] * 11 + [5]
    empty = both[1].batches(2)[-1]
    assert not empty["mask"].any() and (empty["samples"] == -1).all()


def test_weights_share_the_rows_and_patterns_share_a_weight(folder):
    sources = {str(folder / "a.jsonl"): 0.75, str(folder / "b.json*"): 0.25}
    read = open_chat_reader(replace(config(folder), sources=sources), "sft", Share(4, 4), folder / "cache")
    names = Counter(row["source"] for step in range(1, 11) for row in read.consumed(step))
    assert names == {str(folder / "a.jsonl"): 30, str(folder / "b.jsonl"): 10}
    with pytest.raises(UsageError, match="must be a multiple of 64"):
        open_chat_reader(config(folder, packing=True, seq_len=200), "sft", Share(4, 4), folder / "cache", multiple=64)


# The cache.


def test_rows_are_made_once_and_a_damaged_cache_again(folder, tmp_path, monkeypatch):
    notes: list[str] = []
    first = prepare(config(folder), "sft", tmp_path, note=notes.append)
    (made,) = first.sources.values()
    rows = [made.row(i) for i in range(len(made))]
    monkeypatch.setattr(preparing, "RowMaker", lambda *_: pytest.fail("tokenised again"))
    copy = tmp_path / "moved.jsonl"
    copy.write_bytes((folder / "a.jsonl").read_bytes())
    prepare(config(tmp_path, "moved.jsonl", tokenizer=str(folder / "tokenizer")), "sft", tmp_path)  # the content counts
    monkeypatch.undo()
    for name in ("trained.bin", "rows.bin", "cache.json", "table.bin"):
        path = made.folder / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data if name != "table.bin" else data[:-5])
        notes.clear()
        (again,) = prepare(config(folder), "sft", tmp_path, note=notes.append).sources.values()
        assert any("It is made again" in note for note in notes), name
        for i, row in enumerate(rows):
            assert (again.row(i).ids == row.ids).all() and (again.row(i).trained == row.trained).all()
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


def test_of_two_processes_that_make_the_same_rows_one_wins(folder, tmp_path):
    first = prepare(config(folder), "sft", tmp_path / "one")
    (made,) = first.sources.values()

    def late(temporary: Path) -> None:
        """Another process is done while this one still writes."""
        shutil.copytree(made.folder, tmp_path / "two" / made.key)
        shutil.copytree(made.folder, temporary, dirs_exist_ok=True)

    found = load_or_make(tmp_path / "two", made.key, "sft", late, lambda line: pytest.fail(line))
    assert len(found) == len(made) and [path.name for path in (tmp_path / "two").iterdir()] == [made.key]


def test_other_rows_are_refused_on_resume(folder):
    state = (read := reader(folder)).batches(1) and read.state_after(1)
    for change in ({"seq_len": 128}, {"train_on": "all"}, {"template_date": "2020-01-01"}):
        with pytest.raises(DataError, match="has changed since this run read it"):
            reader(folder, state=state, step=2, **change)
    with pytest.raises(DataError, match="seed"):
        reader(folder, state=state, step=2, seed=6)


def test_a_bad_template_ends_the_run_and_leaves_nothing(folder, tmp_path):
    wrong = {"{{ messages | length }}" + CHATML: "a.jsonl.*prefix-preserving", "{% for %}": "Syntax"}
    for template, words in wrong.items():
        (tmp_path / "bad.jinja").write_text(template)
        for policy in ("stop", "skip"):
            section = config(folder, template=str(tmp_path / "bad.jinja"), on_error=policy)
            with pytest.raises(DataError, match=words) as error:
                prepare(section, "sft", tmp_path / "cache")
            assert error.value.exit_code == 65


def test_ids_that_a_model_lacks_are_noticed(folder):
    made = prepare(config(folder), "sft", folder / "cache")
    made.check_vocabulary(made.words.vocab_size)
    with pytest.raises(DataError, match="but model.vocab_size is 7: give the model at least"):
        made.check_vocabulary(7)


def test_every_key_of_the_section_is_documented():
    keys = schema(ChatDataConfig)["properties"]
    assert len(keys) > 15 and all(key.get("description") for key in keys.values())
    section = loads(ChatDataConfig, "sources: {F.jsonl: 1}\ntemplate_options: {enable_thinking: false}\n")
    assert section.template_options == {"enable_thinking": False} and not [*section.faults()]


# Too long.


def test_long_rows_are_cut_left_out_or_refused(folder, tmp_path):
    long = {"messages": [{"role": "user", "content": "a" * 90}, {"role": "assistant", "content": "b" * 90}]}
    short = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    write_jsonl(tmp_path / "L.jsonl", [short, long])
    words = tokenizer.load(str(folder / "tokenizer"))

    def made(policy: str, seq_len: int):
        more = {"too_long": policy, "seq_len": seq_len, "tokenizer": str(folder / "tokenizer")}
        return prepare(config(tmp_path, "L.jsonl", **more), "sft", tmp_path / "cache")

    counts = made("drop", 100).counts
    assert (counts.rows, counts.dropped, counts.truncated) == (1, 1, 0) and "1 too long and left out" in counts.told()
    with pytest.raises(DataError, match="L.jsonl:2: the row has .* more than data.seq_len 100"):
        made("error", 100)
    for policy, end in (("keep_end", "b<|im_end|>\n"), ("keep_start", "bb")):
        result = made(policy, 150)
        (source,) = result.sources.values()
        row = source.row(1)
        assert len(row.ids) == 150 and words.decode(row.ids.tolist()).endswith(end) and result.counts.truncated == 1
    counts = made("keep_start", 60).counts
    assert (counts.rows, counts.untrained) == (1, 1)  # of the long one only its prompt would be left


def test_long_pairs_stay_pairs(folder, tmp_path):
    for policy in ("keep_start", "keep_end"):
        more = {"too_long": policy, "seq_len": 30, "tokenizer": str(folder / "tokenizer")}
        made = prepare(config(folder, "pairs.jsonl", **more), "preference", tmp_path)
        (source,) = made.sources.values()
        assert made.counts.truncated > 3
        for i in range(len(source)):
            row = source.row(i)
            for one in (row.chosen, row.rejected):
                assert len(one.ids) <= 30 and one.trained[1:].any() and (one.ids[: len(row.prompt)] == row.prompt).all()


# What a person sees.


def test_the_first_rows_show_what_is_trained(folder):
    made = prepare(config(folder, "pairs.jsonl"), "preference", folder / "cache")
    (source,) = made.sources.values()
    shown = first_rows(made.sources, made.words, 2)
    assert f"{folder / 'pairs.jsonl'}, line 2\n--- chosen" in shown and shown.count("--- rejected") == 2
    assert shown.count("<|im_end|>]]") == 4 and "<|im_start|>assistant\n[[" in shown

    class Console:
        def print(self, text, **_) -> None:
            self.spans = [(text.plain[span.start : span.end], span.style) for span in text.spans]

    console = Console()
    show_row(source.row(0), made.words, console)
    green = [text for text, style in console.spans if style == "bold green"]
    assert len(green) == 1 and green[0].endswith("<|im_end|>")
    assert preview(source.row(0), made.words).count("[[") == 2


@pytest.mark.parametrize("packing", [False, True])
def test_a_tokenizers_padding_and_truncation_change_no_pair(folder, tmp_path, packing):
    """Left or right, with the end of the text or a token of its own for padding, or short cuts in tokenizer.json: the
    rows are the same, and the end of an answer is trained."""
    for name in ("plain", "left"):
        shutil.copytree(folder / "tokenizer", tmp_path / name)
    settings = json.loads((tmp_path / "left/tokenizer_config.json").read_text())
    more = {"padding_side": "left", "truncation_side": "left", "model_max_length": 8}
    (tmp_path / "left/tokenizer_config.json").write_text(json.dumps(settings | more))
    built = Tokenizer.from_file(str(tmp_path / "left/tokenizer.json"))
    built.enable_padding(direction="left", length=300, pad_id=1)
    built.enable_truncation(6)
    built.save(str(tmp_path / "left/tokenizer.json"))
    (tmp_path / "plain/tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|begin|>"}))
    rows = [{"prompt": f"{n} what?", "chosen": " yes" * n, "rejected": " no"} for n in range(1, 4)]
    write_jsonl(tmp_path / "texts.jsonl", rows)
    found = []
    for name in ("plain", "left"):
        data = config(tmp_path, "texts.jsonl", tokenizer=str(tmp_path / name), packing=packing)
        (source,) = prepare(data, "preference", tmp_path / "cache").sources.values()
        found.append([source.row(n) for n in range(len(source))])
        for batch in open_chat_reader(data, "preference", Share(2, 2), tmp_path / "cache").batches(1):
            ends = (batch["labels"] == tokenizer.load(str(tmp_path / name)).eod) & batch["mask"]
            assert ends.sum() == (batch["samples"] >= 0).sum() > 0
    for mine, other in zip(*found, strict=True):
        assert mine.prompt.tolist() == other.prompt.tolist()
        for one, two in ((mine.chosen, other.chosen), (mine.rejected, other.rejected)):
            assert one.ids.tolist() == two.ids.tolist() and one.trained.tolist() == two.trained.tolist()
