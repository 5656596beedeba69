"""Issue R, A.1: a run takes its tokenizer from its data, keeps it, and generation never falls back to bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megallm.base.config import load
from megallm.base.errors import DataError, UsageError
from megallm.cli.config import load_and_check
from megallm.convert.convert import ConvertRequest
from megallm.convert.convert import run as convert
from megallm.convert.megatron.translate import translate, translation_yaml
from megallm.convert.tokenizer_files import write_byte_tokenizer
from megallm.data.chat.template import find_template
from megallm.data.indexed import dataset as indexed
from megallm.data.text import tokenizer
from megallm.data.text.preprocess import PreprocessConfig
from megallm.data.text.preprocess import run as preprocess
from megallm.inference import generate
from megallm.inference.request import GenerateRequest
from megallm.parallel.mesh import Mesh
from megallm.training import pretrain, reading
from megallm.training.config import PretrainConfig
from tests.convert.tiny import case, make
from tests.data.test_data_kept_tokenizer import sentencepiece
from tests.system.commands import write_config

TEXT = "In the beginning God created the heaven and the earth. "
MEGATRON = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 1 --global-batch-size 2 --train-iters 2 --lr 1e-3 --data-path d_text_document --split 100,0,0 "
    "--tokenizer-type GPT2BPETokenizer --vocab-file v.json --merge-file m.txt --attention-dropout 0 --hidden-dropout 0 "
    "--save run --eval-iters 0 --eval-interval 0"
)


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """A corpus made with a BPE of 300 tokens; the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(f"{json.dumps({'text': TEXT * 5})}\n" * 30)
    tokenizer.train_bpe(["a.jsonl"], 300, "bpe")
    preprocess(PreprocessConfig(("a.jsonl",), "d", "bpe", append_eod=True))
    shutil.move("bpe", "elsewhere")  # the data's own copy is what counts
    return tmp_path


def trained(path: str, *overrides: str) -> PretrainConfig:
    config = load_and_check(path, list(overrides), 1)
    pretrain.run(config, Mesh.single(), "auto")
    return config


def continued(model: str, prompt: str = "In the beginning", **more) -> list[int]:
    """The ids that the model is given for a prompt."""
    loaded = generate.load(GenerateRequest(model, (prompt,), max_new_tokens=2, **more), Mesh.single())
    return loaded.words.encode(prompt)


def test_a_megatron_script_without_a_tokenizer_gets_that_of_its_data(data):
    found = translate(MEGATRON, "flags")
    Path("c.yaml").write_text(translation_yaml(found, "flags"))
    assert load(PretrainConfig, "c.yaml", []).data.tokenizer is None
    trained("c.yaml", "train.precision=fp32", "log.plot=false", "checkpoint.every=1")
    own = tokenizer.load("elsewhere")
    assert tokenizer.load("run/tokenizer").fingerprint == own.fingerprint
    assert continued("run") == own.encode("In the beginning") != tokenizer.load("bytes").encode("In the beginning")
    convert(ConvertRequest("hf", "run", "hf"))
    assert continued("hf") == own.encode("In the beginning")
    for place in ("run/tokenizer", "d_text_document.tokenizer"):  # the name leads to another one now
        shutil.move(place, "away")
        tokenizer.train_bpe(["a.jsonl"], 280, place)
        with pytest.raises(DataError, match=f"{place} is the tokenizer hf-.* trained with hf-"):
            continued("run")
        with pytest.raises(DataError, match=f"{place} is the tokenizer hf-.* trained with hf-"):
            convert(ConvertRequest("hf", "run", "hf2"))
        shutil.rmtree(place)
        if place != "run/tokenizer":
            shutil.move("away", place)
        shutil.rmtree("away", ignore_errors=True)
    shutil.rmtree("run/tokenizer", ignore_errors=True)  # what stays is the path of the data's copy
    assert continued("run") == own.encode("In the beginning")
    shutil.rmtree("d_text_document.tokenizer")
    with pytest.raises(DataError, match=r"data.tokenizer was d_text_document.tokenizer, which is not there any more"):
        continued("run")
    assert continued("run", tokenizer="elsewhere") == own.encode("In the beginning")
    text = "".join(chr(0x4E00 + i) for i in range(900))
    Path("b.jsonl").write_text(json.dumps({"text": text}) + "\n")
    tokenizer.train_bpe(["b.jsonl"], 900, "long")
    with pytest.raises(DataError, match="Prompt 1 has the token id .* the model has 292 rows"):
        generate.run(GenerateRequest("run", (text,), tokenizer="long"), Mesh.single())


def small(path: Path, **data) -> str:
    write_config(
        path, "d_text_document", data=data, train={"steps": 1, "global_batch": 1}, checkpoint={"every": 1},
        optim={"warmup_steps": 0}, model={"vocab_size": 300, "num_layers": 1},
    )  # fmt: skip
    return str(path)


def test_metadata_that_name_a_tokenizer_which_is_not_there_are_refused(data):
    config = small(data / "c.yaml")
    shutil.rmtree("d_text_document.tokenizer")
    with pytest.raises(DataError, match=r"made with tokenizer hf-.* set data\.tokenizer to its folder"):
        trained(config)
    trained(config, "data.tokenizer=elsewhere")
    assert continued("run") == tokenizer.load("elsewhere").encode("In the beginning")


def test_the_copy_of_the_run_itself_can_be_the_tokenizer_and_stays(data):
    """As where the folder that the run was begun with is gone: it was removed before it was to be copied."""
    config = small(data / "c.yaml", tokenizer="elsewhere")
    trained(config, "train.steps=3", "train.stop_at=1")
    kept = {path.name: path.read_bytes() for path in Path("run/tokenizer").iterdir()}
    shutil.rmtree("elsewhere")
    for step, spec in ((2, "run/tokenizer"), (3, str(data / "run/../run/tokenizer/tokenizer.json"))):
        trained(config, f"data.tokenizer={spec}", "train.steps=3", f"train.stop_at={step}")
        assert {path.name: path.read_bytes() for path in Path("run/tokenizer").iterdir()} == kept


def test_what_is_no_longer_named_stays_in_the_run(data):
    """Without a side-car nothing else says what made the data."""
    Path("d_text_document.meta.json").unlink()
    config = small(data / "c.yaml")
    trained(config, "data.tokenizer=elsewhere", "train.steps=3", "train.stop_at=1")
    trained(config, "train.steps=3", "train.stop_at=2")
    assert tokenizer.load("run/tokenizer").fingerprint == tokenizer.load("elsewhere").fingerprint


def test_another_tokenizer_in_the_place_of_the_kept_one_is_refused(data):
    tokenizer.train_bpe(["a.jsonl"], 280, "other")
    shutil.rmtree("d_text_document.tokenizer")
    shutil.copytree("other", "d_text_document.tokenizer")
    with pytest.raises(DataError, match="set data.tokenizer to that one"):
        trained(small(data / "c.yaml"))


def test_data_of_megatron_itself_train_with_a_warning_and_are_never_bytes(data, capsys):
    """Without a side-car nobody knows: the run says so, and generation wants to be told."""
    Path("d_text_document.meta.json").unlink()
    trained(small(data / "c.yaml"))
    assert "generate and chat will need --tokenizer" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"no tokenizer is known .*data\.tokenizer"):
        continued("run")
    assert not Path("run/tokenizer").exists()


def test_a_source_without_metadata_beside_one_with_is_refused(data):
    indexed.merge_datasets(["d_text_document"], "e")
    Path("e.meta.json").unlink()
    config = load_and_check(small(data / "c.yaml", sources={"d_text_document": 1, "e": 1}), [], 1)
    with pytest.raises(DataError, match="no metadata say what made e: set data.tokenizer"):
        reading.tokenizer_warning(config)


@pytest.mark.parametrize("form", ["tokenizer.json", "mine.json"])
def test_a_tokenizer_given_as_a_file_is_kept_whole(data, form):
    shutil.copy("elsewhere/tokenizer.json", form)
    Path("tokenizer_config.json").write_text('{"eos_token": "t"}')
    config = load_and_check(small(data / "c.yaml", tokenizer=form), [], 1)
    Path("run").mkdir()
    pretrain.keep_tokenizer(config)
    kept = tokenizer.load("run/tokenizer")
    assert kept.fingerprint == tokenizer.load(form).fingerprint and kept.eod == tokenizer.load(form).eod
    pretrain.keep_tokenizer(config)  # again: the same one lies there


def test_a_sentencepiece_file_is_not_kept_as_json(data):
    pytest.importorskip("sentencepiece")
    from tests.data.test_data_kept_tokenizer import sentencepiece

    sentencepiece(Path("pieces.model"))
    config = load_and_check(small(data / "c.yaml", tokenizer="pieces.model"), [], 1)
    Path("run").mkdir()
    pretrain.keep_tokenizer(config)
    assert tokenizer.load("run/tokenizer").fingerprint == tokenizer.load("pieces.model").fingerprint
    with pytest.raises(UsageError, match="another tokenizer"):
        pretrain.keep_tokenizer(load_and_check("c.yaml", ["data.tokenizer=elsewhere"], 1))


@pytest.mark.parametrize("form", [None, "bytes", "bpe"])
def test_what_a_folder_says_about_texts_survives_training_from_it(data, form):
    """A.2: eos ids of config.json and a chat template, whether the folder has a tokenizer or not."""
    make(Path("hf"), case("x", "LlamaConfig", vocab_size=300))
    Path("hf/generation_config.json").unlink()
    content = json.loads(Path("hf/config.json").read_text()) | {"eos_token_id": [2, 7]}
    Path("hf/config.json").write_text(json.dumps(content))
    Path("hf/chat_template.jinja").write_text("{{ messages }}")
    prefix, own = "d_text_document", tokenizer.load("elsewhere")
    if form == "bytes":
        write_byte_tokenizer(Path("hf"))
        preprocess(PreprocessConfig(("a.jsonl",), "b", "bytes"))
        prefix, own = "b_text_document", tokenizer.load("bytes")
    elif form is not None:
        shutil.copytree("elsewhere", "hf", dirs_exist_ok=True)
    config = {"model": {"hf": "hf"}, "data": {"sources": {prefix: 1}, "seq_len": 16, "split": "100,0,0"},
              "train": {"steps": 1, "global_batch": 1}, "eval": {"batches": 0, "every": 0}, "run": {"dir": "run"},
              "optim": {"warmup_steps": 0}, "log": {"plot": False}, "checkpoint": {"every": 1}}  # fmt: skip
    Path("c.yaml").write_text(json.dumps(config))
    trained("c.yaml")
    loaded = generate.load(GenerateRequest("run", ("x",)), Mesh.single())
    assert loaded.words.fingerprint == own.fingerprint and loaded.ends == {2, 7, own.eod}
    assert find_template(loaded.folder).source == "{{ messages }}"
    convert(ConvertRequest("hf", "run", "back"))
    assert json.loads(Path("back/config.json").read_text())["eos_token_id"] == [2, 7]


@pytest.mark.parametrize("form", ["sentencepiece", "template"])
def test_an_exported_model_begins_texts_as_it_was_trained_to(data, form):
    """A.2: a Llama's tokenizer puts <s> before a text, but the data were made without: so is what is exported."""
    Path("words").mkdir()
    if form == "sentencepiece":
        sentencepiece(Path("words/tokenizer.model"))
    else:
        definition = json.loads(Path("elsewhere/tokenizer.json").read_text())
        begin = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        parts = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        definition["post_processor"] = {
            "type": "TemplateProcessing", "single": parts, "pair": [*parts, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|endoftext|>": begin},
        }  # fmt: skip
        Path("words/tokenizer.json").write_text(json.dumps(definition))
    preprocess(PreprocessConfig(("a.jsonl",), "w", "words"))
    sizes = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "vocab_size": 400, "max_positions": 64}
    config = {"model": sizes, "data": {"sources": {"w_text_document": 1}, "seq_len": 16, "split": "100,0,0"},
              "train": {"steps": 1, "global_batch": 1}, "eval": {"batches": 0, "every": 0}, "run": {"dir": "run"},
              "optim": {"warmup_steps": 0}, "log": {"plot": False}, "checkpoint": {"every": 1}}  # fmt: skip
    Path("c.yaml").write_text(json.dumps(config))
    trained("c.yaml")
    notes = convert(ConvertRequest("hf", "run", "hf"))["notes"]
    convert(ConvertRequest("megallm", "hf", "back"))
    openings = [generate.load(GenerateRequest(name, ("x",)), Mesh.single()).opening for name in ("run", "hf", "back")]
    if form == "sentencepiece":
        assert openings == [(), (), ()] and notes == []
    else:  # its definition stays as it is, so a note says it
        assert "add_special_tokens=False" in notes[0] and len(notes) == 1
