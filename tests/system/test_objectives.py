"""`megallm pretrain` on hidden tokens: an encoder and a diffusion model, on layouts that change, with a resume."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml

from tests.system.commands import losses_of, make_corpus, megallm, rows_of, write_config

SIZES = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_heads": 4, "vocab_size": 258}
MODELS = {
    "mlm": SIZES | {"family": "bert", "max_positions": 32},
    "diffusion": SIZES | {"family": "llama", "causal": False, "num_kv_heads": 2},
}
STEPS = 8


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return make_corpus(tmp_path_factory.mktemp("objectives"), documents=60)


def config_of(objective: str, prefix: str, folder: Path) -> Path:
    path = write_config(
        folder / "c.yaml", prefix, data={"objective": objective, "masking": {"token": "257"}, "tokenizer": "bytes"},
        train={"steps": STEPS, "global_batch": 8, "micro_batch": 2}, eval={"batches": 2}, checkpoint={"every": 4},
    )  # fmt: skip
    config = yaml.safe_load(path.read_text()) | {"model": MODELS[objective]}
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("objective", MODELS)
def test_layouts_and_a_resume_change_nothing(objective, prefix, tmp_path):
    config = config_of(objective, prefix, tmp_path)
    done = megallm("pretrain", config, "run.dir=plain", cwd=tmp_path)
    assert done.code == 0, done.err
    for layout, stop in ((("layout.dp=2",), "train.stop_at=4"), (("layout.cp=2",), None)):
        words = [*layout, *([stop] if stop else ["--resume", "must"])]
        done = megallm("pretrain", config, "run.dir=cut", *words, cwd=tmp_path)
        assert done.code == 0, done.err
    plain, cut = losses_of(tmp_path / "plain"), losses_of(tmp_path / "cut")
    assert [step for step, _ in cut] == list(range(1, STEPS + 1))
    assert [loss for _, loss in cut] == pytest.approx([loss for _, loss in plain], rel=1e-4)
    first, last = (rows_of(tmp_path / name)[-1] for name in ("plain", "cut"))
    assert first["val/loss"] == pytest.approx(last["val/loss"], rel=1e-4) and first["val/loss"] > 0
    counted = first["train/tokens"] / (8 * 32)
    assert 0.08 < counted < 0.25 if objective == "mlm" else counted > 0.9
    if objective == "mlm":  # the weights 1 / t make eight steps of diffusion too noisy for this
        assert plain[-1][1] < plain[0][1]


def test_what_an_objective_needs_is_said_before_the_run(prefix, tmp_path):
    config = config_of("mlm", prefix, tmp_path)
    for override, words in {
        "model.causal=true": "model.causal is true: the model looks back only",
        "data.objective=next_token": "model.causal is false: the model sees the next token",
        "data.masking.token=null": "data.masking.token=257 and model.vocab_size=258",
        "data.masking.token=300": "data.masking.token is the id 300, but model.vocab_size is 258",
    }.items():
        done = megallm("pretrain", config, override, cwd=tmp_path)
        assert done.code == 2 and words in done.err, (override, done.err)
        assert not list(tmp_path.glob("run/checkpoints/*"))


def word_pieces(folder: Path, text: str) -> Path:
    """A tokenizer folder as BERT's are: pieces of words, five special tokens, none that ends a document."""
    import tokenizers

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=60, special_tokens=specials, show_progress=False)
    made.train_from_iterator([text], trainer)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    named = {f"{token[1:-1].lower()}_token": token for token in specials}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def test_a_bert_from_text_to_transformers(tmp_path):
    """Whole words of a WordPiece tokenizer are hidden, at tp=2; transformers computes the same from the export."""
    transformers = pytest.importorskip("transformers")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(60)]
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=60))}) for _ in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    pieces = word_pieces(tmp_path / "pieces", " ".join(words))
    done = megallm("preprocess", "--input", "text.jsonl", "--output", "d", "--tokenizer", pieces, cwd=tmp_path)
    assert done.code == 0, done.err
    data = {"objective": "mlm", "masking": {"whole_word": True}, "tokenizer": str(pieces)}
    config = write_config(
        tmp_path / "c.yaml", "d_text_document", data=data, train={"steps": 6, "global_batch": 8, "micro_batch": 4},
        checkpoint={"every": 0},
    )  # fmt: skip
    config.write_text(
        yaml.safe_dump(yaml.safe_load(config.read_text()) | {"model": MODELS["mlm"] | {"vocab_size": 60}})
    )
    done = megallm("pretrain", config, "layout.tp=2", cwd=tmp_path)
    assert done.code == 0, done.err
    done = megallm("convert", "--to", "hf", "--input", "run", "--output", "hf", "--verify", cwd=tmp_path)
    assert done.code == 0, done.err
    assert json.loads(done.out)["max_rel_error"] <= 1e-5
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == "BertForMaskedLM"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").mask_token_id == 4
