"""Issue R, A.1: data keep the tokenizer that made them, in every form, through preprocess, merge and split."""

from __future__ import annotations

import base64
import json
import os
import shutil

import numpy as np
import pytest

from megallm.base.errors import DataError
from megallm.data.indexed import dataset as indexed
from megallm.data.indexed import meta, split_merge
from megallm.data.text import tokenizer
from megallm.data.text.partial import remove_stale_outputs
from megallm.data.text.preprocess import PreprocessConfig, run
from megallm.data.text.tokenizer_folder import saved_tokenizer

TEXT = "In the beginning God created the heaven and the earth. " * 40 + "été 中文 😀\n"
HARD = "  Don't stop, 1234567 naïve façade e\u0301 \u00a0 漢字\n\n x\ty <|endoftext|> 'LL été 😀"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trained BPE in every form: {name: what --tokenizer says}."""
    root = tmp_path_factory.mktemp("forms")
    (root / "a.txt").write_text(TEXT)
    tokenizer.train_bpe([str(root / "a.txt")], 300, str(root / "json"))
    definition = json.loads((root / "json/tokenizer.json").read_text())
    (root / "pair").mkdir()
    (root / "pair/vocab.json").write_text(json.dumps(definition["model"]["vocab"]))
    merges = [" ".join(pair) for pair in definition["model"]["merges"]]
    (root / "pair/merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    shutil.copy(root / "json/tokenizer.json", root / "mine.json")
    sentencepiece(root / "pieces.model")
    (root / "sp").mkdir()
    shutil.copy(root / "pieces.model", root / "sp/tokenizer.model")
    rank_file(root / "ranks.tiktoken")
    return {
        "folder": str(root / "json"), "pair": str(root / "pair"), "file": str(root / "mine.json"),
        "sentencepiece file": str(root / "pieces.model"), "sentencepiece folder": str(root / "sp"),
        "tiktoken": str(root / "ranks.tiktoken"),
    }  # fmt: skip


def sentencepiece(path):
    library = pytest.importorskip("sentencepiece")
    library.SentencePieceTrainer.Train(
        sentence_iterator=iter([TEXT] * 3), model_prefix=str(path.with_suffix("")), vocab_size=330, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, bos_id=1, eos_id=2, unk_id=0, pad_id=-1, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
    )  # fmt: skip
    path.with_suffix(".vocab").unlink()


def rank_file(path):
    pytest.importorskip("tiktoken")
    ranks = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b"in"]
    path.write_text("".join(f"{base64.b64encode(one).decode()} {n}\n" for n, one in enumerate(ranks)))
    rules = {"pattern": r"\S+|\s+", "special_tokens": {"<|endoftext|>": 300}}
    path.with_suffix(".json").write_text(json.dumps(rules))


FORMS = ["folder", "pair", "file", "sentencepiece file", "sentencepiece folder", "tiktoken"]


def preprocess(folder, spec, name="d", text="In the beginning\n", backend="auto"):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(6)))
    run(PreprocessConfig((str(folder / f"{name}.jsonl"),), str(folder / name), spec, append_eod=True, backend=backend))
    return str(folder / f"{name}_text_document")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_kept_and_read_again(made, tmp_path, form):
    prefix = preprocess(tmp_path, made[form])
    kept, own = meta.kept_tokenizer(prefix), tokenizer.load(made[form])
    again = tokenizer.load(kept)
    assert kept == str(saved_tokenizer(prefix)) and again.fingerprint == own.fingerprint
    assert (again.encode(HARD), again.eod, again.vocab_size) == (own.encode(HARD), own.eod, own.vocab_size)
    first = indexed.IndexedDataset(prefix).document(0).tolist()
    assert first == [*again.encode("In the beginning\n"), again.eod]


@pytest.mark.parametrize("form", ["folder", "pair", "sentencepiece folder"])
def test_the_fast_way_gives_the_same_ids(made, tmp_path, form):
    """Or is not taken: gigatoken reads a tokenizer.json only."""
    for folder, backend in (("slow", "tokenizers"), ("fast", "auto")):
        (tmp_path / folder).mkdir()
        preprocess(tmp_path / folder, made[form], text=HARD, backend=backend)
    slow, fast = ((tmp_path / folder / "d_text_document.bin").read_bytes() for folder in ("slow", "fast"))
    assert slow == fast


@pytest.mark.parametrize("form", [*FORMS, "bytes"])
def test_rows_that_pad_a_vocabulary_give_no_text(made, form):
    """A model has often more rows than its tokenizer tokens, and may choose one."""
    words = tokenizer.load(made.get(form, form))
    ids = words.encode("In the")
    assert words.decode([*ids, words.vocab_size, *words.encode("x"), 10**6]) == words.decode([*ids, *words.encode("x")])


def test_bytes_keep_nothing_and_an_older_tokenizer_goes(made, tmp_path):
    prefix = preprocess(tmp_path, made["folder"])
    assert saved_tokenizer(prefix).is_dir()
    for suffix in (".bin", ".idx", ".meta.json"):
        (tmp_path / f"d_text_document{suffix}").unlink()
    prefix = preprocess(tmp_path, "bytes")
    assert meta.kept_tokenizer(prefix) == "bytes" and not saved_tokenizer(prefix).exists()


def test_without_metadata_nothing_is_known(made, tmp_path):
    prefix = preprocess(tmp_path, made["folder"])
    (tmp_path / "d_text_document.meta.json").unlink()
    assert meta.kept_tokenizer(prefix) is None


@pytest.mark.parametrize("form", ["folder", "sentencepiece file"])
def test_merge_and_split_carry_it(made, tmp_path, form):
    a, b = preprocess(tmp_path, made[form], "a"), preprocess(tmp_path, made[form], "b", "the heaven\n")
    shutil.rmtree(saved_tokenizer(a))  # one copy is enough: the fingerprints agree
    indexed.merge_datasets([a, b], tmp_path / "m")
    wanted = tokenizer.load(made[form]).fingerprint
    assert tokenizer.load(meta.kept_tokenizer(tmp_path / "m")).fingerprint == wanted
    for part in split_merge.split_dataset(tmp_path / "m", str(tmp_path / "s"), [1, 1]):
        assert tokenizer.load(meta.kept_tokenizer(part["prefix"])).fingerprint == wanted
    bytewise = [preprocess(tmp_path, "bytes", name) for name in ("x", "y")]
    indexed.merge_datasets(bytewise, tmp_path / "n")
    assert meta.kept_tokenizer(tmp_path / "n") == "bytes" and not saved_tokenizer(tmp_path / "n").exists()


def test_a_killed_publication_is_finished_with_the_tokenizer(made, tmp_path, monkeypatch):
    replace, calls = indexed.os.replace, []

    def dying(source, target):
        calls.append(str(target))
        if str(target).endswith("document.bin"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(indexed.os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        preprocess(tmp_path, made["folder"])
    assert any(name.endswith(".tokenizer") for name in calls)
    monkeypatch.setattr(indexed.os, "replace", replace)
    spec = PreprocessConfig((str(tmp_path / "d.jsonl"),), str(tmp_path / "d"), made["folder"], append_eod=True)
    run(spec)
    prefix = str(tmp_path / "d_text_document")
    assert tokenizer.load(meta.kept_tokenizer(prefix)).fingerprint == tokenizer.load(made["folder"]).fingerprint
    assert not (tmp_path / "d.partial").exists()


def test_what_a_killed_merge_left_is_swept(tmp_path):
    """The folder too, once its process is gone and an hour has passed; other folders stay."""
    for name in ("d.tokenizer.tmp-999999999-ab", "d.bin.tmp-999999999-ab", "d.other.tmp-999999999-ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
        os.utime(tmp_path / name, (0, 0))
    assert remove_stale_outputs(str(tmp_path / "d")) == ["d.tokenizer.tmp-999999999-ab"]
    assert len(list(tmp_path.iterdir())) == 2


# vocab.json and merges.txt, sentencepiece: the ids that transformers gives.


@pytest.mark.parametrize("kind", ["", "GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast"])
def test_a_pair_of_files_gives_the_ids_of_transformers(made, tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "pair"
    shutil.copytree(made["pair"], folder)
    size = len(json.loads((folder / "vocab.json").read_text()))
    added = {str(size): {"content": "<|im_end|>", "special": True, "lstrip": False, "rstrip": False,
                         "normalized": False, "single_word": False}}  # fmt: skip
    config = {"tokenizer_class": kind, "added_tokens_decoder": added, "eos_token": "<|im_end|>"} if kind else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = tokenizer.load(str(folder))
    cls = getattr(transformers, kind.removesuffix("Fast") or "GPT2Tokenizer")
    theirs = cls.from_pretrained(str(folder))
    for text in (HARD.replace("<|endoftext|>", ""), TEXT, "\r\n a\r\n\r\n  b", "x12345y  ９９", ""):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ours.encode(text)) == (theirs.decode(ours.encode(text)))
    if kind:
        assert ours.eod == size == theirs.eos_token_id and ours.vocab_size == size + 1
        text = "the<|im_end|>\nbeginning"
        assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False)
        assert size not in ours.encode(text)  # written in a document it is text


def test_qwen_splits_otherwise_than_gpt2_and_the_type_of_the_model_tells(made, tmp_path):
    found = {}
    for model in ("llama", "qwen2", "qwen3_moe"):
        shutil.copytree(made["pair"], tmp_path / model)
        (tmp_path / model / "config.json").write_text(json.dumps({"model_type": model}))
        found[model] = tokenizer.load(str(tmp_path / model)).encode("e\u0301té 12345")
    assert found["qwen2"] == found["qwen3_moe"] != found["llama"]  # NFC, for one


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda f: (f / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}'), "CLIPTokenizer"),
        (lambda f: (f / "vocab.json").write_text('{"a": 0}'), "of the 256 bytes"),
        (lambda f: (f / "vocab.json").write_text('{"a": "x"}'), "must map tokens to ids"),
        (lambda f: (f / "merges.txt").write_text("a b c\n"), "merges.txt:1: want two pieces"),
        (lambda f: (f / "merges.txt").write_text("q zzz\n"), "do not belong together"),
        (lambda f: (f / "added_tokens.json").write_text('{"<x>": 7000}'), "the id 7000"),
    ],
)
def test_a_pair_that_cannot_be_read_is_a_sentence(made, tmp_path, spoil, sentence):
    shutil.copytree(made["pair"], tmp_path / "pair")
    spoil(tmp_path / "pair")
    with pytest.raises(DataError, match=sentence):
        tokenizer.load(str(tmp_path / "pair"))


def test_sentencepiece_in_a_folder_knows_its_settings(made, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "sp"
    shutil.copytree(made["sentencepiece folder"], folder)
    bare = tokenizer.load(str(folder))
    size = bare.vocab_size
    assert (bare.eod, bare.template) == (2, ([], []))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>", "legacy": True,
              "unk_token": "<unk>", "add_bos_token": True}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size, "<|im_start|>": size + 1}))
    ours, theirs = tokenizer.load(str(folder)), transformers.AutoTokenizer.from_pretrained(str(folder))
    assert (ours.eod, ours.vocab_size, ours.template) == (size, size + 2, ([1], []))
    assert ours.fingerprint != bare.fingerprint and theirs.eos_token_id == size
    for text in ("In the beginning été 中文 😀", "the heaven", "a  b"):
        assert [1, *ours.encode(text)] == theirs.encode(text)
    talk = ours.encode("<s><|im_start|>the heaven<|im_end|>", special=True)
    assert (
        talk[:2] == [1, size + 1] and talk[-1] == size and ours.decode(talk[1:]) == "<|im_start|>the heaven<|im_end|>"
    )
    assert size not in ours.encode("a<|im_end|>")
    del config["add_bos_token"]  # then as the class documents it: a Llama's text begins with <s>
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizer.load(str(folder)).template == ([1], [])
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False, "add_eos_token": True}))
    assert tokenizer.load(str(folder)).template == ([], [size])


def test_ids_stay_apart(made):
    """The control of this file: the forms are different tokenizers where they should be."""
    ids = {form: tuple(tokenizer.load(made[form]).encode(HARD)) for form in FORMS}
    assert ids["folder"] == ids["file"] and ids["folder"] != ids["sentencepiece file"] != ids["tiktoken"]
    assert np.array_equal(ids["pair"], tokenizer.load(made["folder"]).encode(HARD))
