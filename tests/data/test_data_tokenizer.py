"""Tokenizers: nothing in a text becomes a special id, broken folders are sentences, training is repeatable."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.base.errors import CannotWrite, DataError, UsageError
from megallm.data.text import tokenizer
from megallm.data.text.readers import ReadOptions

TEXT = "In the beginning God created the heaven and the earth. " * 40 + "été 中文 😀\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("bpe")
    (root / "a.txt").write_text(TEXT)
    made = tokenizer.train_bpe([str(root / "a.txt")], 300, str(root / "tok"))
    assert made["vocab_size"] == 300 and made["documents"] == 1
    return root / "tok"


SOUND = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=60, deadline=None)
@given(text=SOUND)
def test_every_text_comes_back(folder, text):
    for one in (tokenizer.load("bytes"), tokenizer.load(str(folder))):
        ids = one.encode(text)
        assert one.decode(ids) == text
        assert joined(one, [text, "x"]) == [ids, one.encode("x")]
        assert all(0 <= i < one.vocab_size and i != one.eod for i in ids)


def joined(one, texts):
    """What `encode_joined` gives, cut again."""
    ids, lengths = one.encode_joined(texts)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def test_bytes():
    one = tokenizer.load("bytes")
    assert (one.vocab_size, one.eod) == (257, 256)
    assert one.encode("é") == [0xC3, 0xA9] and one.decode([0xC3, 256, 0xA9, 255]) == "é\ufffd"


@pytest.mark.parametrize("text", ["a<|endoftext|>b", "<|endoftext|>"])
def test_written_special_token_is_text_unless_asked(folder, text):
    one = tokenizer.load(str(folder))
    assert one.eod not in one.encode(text) and one.decode(one.encode(text)) == text
    assert one.eod not in one.encode_joined([text])[0]
    assert one.encode(text, special=True).count(one.eod) == 1  # the control: the token does exist
    assert one.eod not in one.encode(text)  # and asking once changes nothing for others


@pytest.mark.parametrize("spec", ["bytes", "folder"])
def test_lone_surrogate_is_a_sentence(folder, spec):
    one = tokenizer.load(str(folder) if spec == "folder" else spec)
    with pytest.raises(DataError, match="lone surrogate at character 2"):
        one.encode("ab\ud800")


def test_training_is_repeatable_and_ignores_layout(folder, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    again = tokenizer.train_bpe([str(tmp_path / "a.txt")], 300, str(tmp_path / "tok"))
    one = tokenizer.load(str(folder))
    assert again["fingerprint"] == one.fingerprint
    definition = json.loads((folder / "tokenizer.json").read_text())
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(definition))
    assert tokenizer.load(str(tmp_path / "other")).fingerprint == one.fingerprint
    definition["model"]["merges"].pop()
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(definition))
    assert tokenizer.load(str(tmp_path / "other")).fingerprint != one.fingerprint


def test_truncation_and_padding_of_the_file_are_off(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "t")
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "t/tokenizer.json").write_text(json.dumps(definition))
    cut, whole = tokenizer.load(str(tmp_path / "t")), tokenizer.load(str(folder))
    assert cut.encode(TEXT) == whole.encode(TEXT) and len(cut.encode(TEXT)) > 4
    assert cut.fingerprint == whole.fingerprint


def test_eod_is_found_or_asked_for(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "t")
    (tmp_path / "t/special_tokens_map.json").unlink()
    (tmp_path / "t/tokenizer_config.json").write_text('{"eos_token": {"content": "a"}}')
    one = tokenizer.load(str(tmp_path / "t"))
    assert one.eod == one.encode("a")[0]
    (tmp_path / "t/tokenizer_config.json").write_text('{"eos_token": "<nothing>"}')
    with pytest.raises(DataError, match="<nothing>"):
        _ = tokenizer.load(str(tmp_path / "t")).eod
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["model"]["vocab"]["<other>"] = definition["model"]["vocab"].pop("<|endoftext|>")
    definition["added_tokens"] = []
    (tmp_path / "t/tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "t/tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match="does not say which token ends a document"):
        _ = tokenizer.load(str(tmp_path / "t")).eod


def test_broken_folders_are_sentences(tmp_path):
    with pytest.raises(DataError, match="tokenizer.json does not exist"):
        tokenizer.load(str(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        tokenizer.load(str(tmp_path / "nowhere"))
    for text, sentence in [("{", "JSON"), ("[]", "object"), ('{"model": {"type": "Unknown"}}', "not a tokenizer")]:
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(DataError, match=sentence):
            tokenizer.load(str(tmp_path))


def test_training_refuses_what_it_cannot_do(tmp_path):
    text, empty, broken = tmp_path / "a.txt", tmp_path / "empty.txt", tmp_path / "b.jsonl"
    text.write_text("abc")
    empty.write_text("")
    broken.write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(UsageError, match="257"):
        tokenizer.train_bpe([str(text)], 256, str(tmp_path / "t"))
    with pytest.raises(DataError, match="no usable text"):
        tokenizer.train_bpe([str(empty)], 300, str(tmp_path / "t"))
    with pytest.raises(DataError, match=r"b.jsonl:2: the value of 'text' is a number"):
        tokenizer.train_bpe([str(broken)], 300, str(tmp_path / "t"))
    with pytest.raises(DataError, match="cannot be read"):
        tokenizer.train_bpe([str(tmp_path / "nowhere")], 300, str(tmp_path / "t"))
    assert not (tmp_path / "t").exists()
    with pytest.raises(CannotWrite):
        tokenizer.train_bpe([str(text)], 300, str(text / "t"))
    assert tokenizer.train_bpe([str(text)], 5000, str(tmp_path / "t"))["vocab_size"] < 300


def test_training_reads_several_keys(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "why", "a": "because"}\n')
    made = tokenizer.train_bpe([str(tmp_path / "a.jsonl")], 270, str(tmp_path / "t"), ReadOptions(("q", "a")))
    assert made["documents"] == 2


def test_transformers_loads_the_folder(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    ours = tokenizer.load(str(folder))
    assert theirs.eos_token_id == ours.eod and len(theirs) == ours.vocab_size
    for text in (TEXT, "  two  spaces\n\n", "don't"):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text


def test_ids_are_numpy_integers(folder):
    for spec in ("bytes", str(folder)):
        ids, lengths = tokenizer.load(spec).encode_joined(["a", ""])
        assert np.issubdtype(ids.dtype, np.integer) and lengths.tolist() == [1, 0]
