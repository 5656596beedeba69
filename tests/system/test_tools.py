"""The thin commands for those who look in tools/: short, and equal to the verbs behind them."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megallm.cli.main import main
from megallm.data.text.megatron_tokenizers import PATTERNS
from tests.system.commands import ROOT, megallm

NAMES = ("preprocess_data", "merge_datasets", "convert_checkpoint")


def tool(name: str, *words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / f"tools/{name}.py"), *map(str, words)], cwd=cwd, capture_output=True, text=True,
        timeout=120, check=False, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_they_are_thin(name):
    lines = (ROOT / f"tools/{name}.py").read_text().splitlines()
    assert len([line for line in lines if line.strip() and not line.lstrip().startswith(("#", '"""'))]) <= 40


def test_data_from_raw_text_to_a_merged_dataset(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"document {name}"}) + "\n")
        done = tool("preprocess_data", "--input", f"{name}.jsonl", "--output-prefix", name,
                    "--tokenizer-model", "bytes", "--append-eod", "--workers", "1", "--log-interval", "10",
                    cwd=tmp_path)  # fmt: skip
        assert done.returncode == 0, done.stderr
    done = tool("merge_datasets", "--input", ".", "--output-prefix", "whole", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["documents"] == 2, done.stderr
    whole = b"".join((tmp_path / f"{name}_text_document.bin").read_bytes() for name in "ab")
    assert (tmp_path / "whole.bin").read_bytes() == whole
    assert megallm("data", "verify", "whole", cwd=tmp_path).code == 0
    again = megallm("preprocess", "--input", "a.jsonl", "--output", "v", "--tokenizer", "bytes", "--append-eod",
                    cwd=tmp_path)  # fmt: skip
    assert again.code == 0
    assert (tmp_path / "v_text_document.idx").read_bytes() == (tmp_path / "a_text_document.idx").read_bytes()


TEXTS = ["The first text, don't split it.", "  a second\n\nwith 12345 numbers", "<|endoftext|> is text", "é 日本"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder with text, and with a BPE in GPT-2's two files."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXTS * 3, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    trained.save_model(str(folder), "gpt2")
    return folder


def documents(prefix: Path) -> list[list[int]]:
    from megallm.data.indexed.dataset import IndexedDataset

    data = IndexedDataset(str(prefix))
    return [data.get(i, 0, int(n)).tolist() for i, n in enumerate(data.lengths)]


def test_gpt2_vocab_and_merges_as_megatron_names_them(gpt2):
    """Issue R item 21: the command of Megatron-LM's README, word for word."""
    from tokenizers import ByteLevelBPETokenizer

    command = "--input x.jsonl --output-prefix my-gpt2 --vocab-file gpt2-vocab.json --dataset-impl mmap "
    command += "--tokenizer-type GPT2BPETokenizer --merge-file gpt2-merges.txt --append-eod --workers 1"
    done = tool("preprocess_data", *command.split(), cwd=gpt2)
    assert done.returncode == 0, done.stderr
    want = ByteLevelBPETokenizer.from_file(str(gpt2 / "gpt2-vocab.json"), str(gpt2 / "gpt2-merges.txt"))
    eod = json.loads((gpt2 / "gpt2-vocab.json").read_text())["<|endoftext|>"]
    assert documents(gpt2 / "my-gpt2_text_document") == [[*want.encode(text).ids, eod] for text in TEXTS]
    assert json.loads((gpt2 / "my-gpt2_tokenizer/tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"


@pytest.fixture
def translated(monkeypatch):
    """tools/preprocess_data.py's translation of its arguments."""
    spec = importlib.util.spec_from_file_location("preprocess_data", ROOT / "tools/preprocess_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.translated


def test_other_tokenizers_that_megatron_users_have(translated, gpt2, monkeypatch, tmp_path):
    """Item 21: no type but two files, a type with a model, a pattern of files, partitions."""
    monkeypatch.chdir(tmp_path)
    for name in ("a1.jsonl", "a2.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}')
    base = "--input a*.jsonl --output-prefix o --workers 2 --partitions 2 --keep-sequential-samples "
    words = translated((base + "--tokenizer-type Llama2Tokenizer --tokenizer-model t.model").split())
    assert " ".join(words) == (
        "preprocess --input a1.jsonl a2.jsonl --output o --json-keys text --tokenizer t.model --workers 2"
    )
    for kind in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer"):
        assert "m.model" in translated((base + f"--tokenizer-type {kind} --tokenizer-model m.model").split())
    assert "r.tiktoken" in translated((base + "--tokenizer-type TikTokenizer --tokenizer-model r.tiktoken").split())
    two = f"--vocab-file {gpt2}/gpt2-vocab.json --merge-file {gpt2}/gpt2-merges.txt"
    assert "o_tokenizer" in translated((base + two).split())
    assert "o_tokenizer" in translated((base + two).split())  # the same again is no other tokenizer
    (tmp_path / "o_tokenizer/tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit) as caught:
        translated((base + two).split())
    assert caught.value.code == 2


def test_a_sentencepiece_model_gives_its_own_ids(translated, gpt2, tmp_path, monkeypatch):
    library = pytest.importorskip("sentencepiece")
    monkeypatch.chdir(tmp_path)
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5), model_prefix="tokenizer", vocab_size=60, minloglevel=2,
        hard_vocab_limit=False, character_coverage=1.0,
    )  # fmt: skip
    words = f"--input {gpt2}/x.jsonl --output-prefix o --tokenizer-type Llama2Tokenizer --append-eod --workers 1"
    assert main(translated([*words.split(), "--tokenizer-model", "tokenizer.model"])) == 0
    model = library.SentencePieceProcessor(model_file="tokenizer.model")
    assert documents(tmp_path / "o_text_document") == [[*model.encode(text), model.eos_id()] for text in TEXTS]


@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_a_tiktokenizer_gives_the_ids_that_it_has_there(pattern, translated, gpt2, tmp_path, monkeypatch):
    """Special tokens come first, then the ranks of the list up to --vocab-size; `</s>` ends a document."""
    library = pytest.importorskip("tiktoken")
    monkeypatch.chdir(tmp_path)
    pieces = [bytes([i]) for i in range(256)] + [b"th", b"te", b"xt", b"text", b" text", b"12", b"beyond"]
    rows = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
        for rank, piece in enumerate(pieces)
    ]
    (tmp_path / "vocab.json").write_text(json.dumps(rows))
    words = f"--input {gpt2}/x.jsonl --output-prefix o --tokenizer-type TikTokenizer --append-eod --workers 1 "
    words += "--tokenizer-model vocab.json --tiktoken-num-special-tokens 10 --vocab-size 272 "
    words += f"--tiktoken-pattern {pattern}"
    assert main(translated(words.split())) == 0
    there = library.Encoding(
        "x", pat_str=PATTERNS[pattern], special_tokens={},
        mergeable_ranks={piece: rank + 10 for rank, piece in enumerate(pieces[:262])},
    )  # fmt: skip
    found = documents(tmp_path / "o_text_document")
    assert found == [[*there.encode_ordinary(text), 2] for text in TEXTS] and 10 + 260 in found[2]


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ("--tokenizer-type GPT2BPETokenizer --vocab-file {0}/gpt2-vocab.json", 2, "--merge-file is absent"),
        ("--vocab-file {0}/gpt2-merges.txt --merge-file {0}/gpt2-merges.txt", 65, "merges.txt cannot be read as JSON"),
        ("--vocab-file {0}/gpt2-vocab.json --merge-file {0}/gpt2-vocab.json", 65, "gpt2-vocab.json:1: want two"),
        ("--vocab-file {0}/none --merge-file {0}/gpt2-merges.txt", 65, "none does not exist"),
        ("--tokenizer-type Llama2Tokenizer --tokenizer-model x.bin", 2, "call it NAME.model"),
        ("--tokenizer-type Llama2Tokenizer", 2, "--tokenizer-model is absent"),
        ("--tokenizer-type BertWordPieceLowerCase --vocab-file v.txt", 2, "megallm reads HuggingFaceTokenizer"),
        ("--tokenizer-type NullTokenizer", 2, "NullTokenizer reads no text"),
        ("--tokenizer-type TikTokenizer --tokenizer-model v.txt", 2, "a base64 token and its rank a line"),
        ("--tokenizer-type TikTokenizer --tokenizer-model {0}/gpt2-vocab.json", 65, "item 0: want an object"),
        ("--tokenizer-type TikTokenizer --tokenizer-model {0}/none.json", 65, "none.json cannot be read"),
        ("--tokenizer-type TikTokenizer --tokenizer-model x.json --tiktoken-pattern v3", 2, "has v1, v2"),
        ("--tokenizer-type TikTokenizer --tokenizer-model x.json --vocab-size 900", 2, "less than --vocab-"),
        ("", 2, "a Hugging Face tokenizer.json, or `bytes`"),
    ],
)
def test_tokenizers_that_cannot_be_read_have_a_sentence(words, code, sentence, translated, gpt2, capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        translated([*["--input", "x", "--output-prefix"], str(tmp_path / "o"), *words.format(gpt2).split()])
    assert caught.value.code == code and sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words", "code", "sentence"),
    [
        ("preprocess_data", ["--input", "x", "--output-prefix", "y", "--tokenizer-type", "GPT2BPETokenizer"], 2,
         "Hugging Face tokenizer.json"),
        ("preprocess_data", ["--input", "x", "--output-prefix", "y", "--split-sentences", "--keep-newlines"], 2,
         "a document is one sequence"),
        ("merge_datasets", ["--input", ".", "--output-prefix", "y"], 2, "no .idx file"),
        ("merge_datasets", ["--input", "missing", "--output-prefix", "y"], 65, "missing"),
        ("convert_checkpoint", ["--loader", "mcore", "--saver", "hf", "--load-dir", "x", "--save-dir", "y"], 2,
         "megallm converts between"),
        ("convert_checkpoint", ["--loader", "hf", "--saver", "hf", "--load-dir", "x", "--save-dir", "y"], 2,
         "megallm converts between"),
        ("convert_checkpoint", ["--loader", "hf", "--saver", "megallm", "--load-dir", "none", "--save-dir", "y"], 2,
         "none"),
    ],
)  # fmt: skip
def test_mistakes_have_a_sentence(name, words, code, sentence, tmp_path):
    done = tool(name, *words, cwd=tmp_path)
    assert done.returncode == code and sentence in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []
