"""BERT's old spellings and spare tensors, heads that a family lacks, and fine-tuning of a body with a new head."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megallm.base.errors import CheckpointError, UsageError
from megallm.convert import convert
from megallm.convert.convert import ConvertRequest
from megallm.convert.hf_config import agree, family_of, parse_config, read_config, write_config
from megallm.convert.weights import HfReader
from megallm.engine.config import EngineConfig
from megallm.engine.engine import Engine
from megallm.losses.language import NextToken
from megallm.losses.scores import Regression
from megallm.models.config import ModelConfig
from megallm.parallel.mesh import Mesh
from megallm.training.weights import build_engine
from tests.convert.tiny import CLASSES, SIZES, case, make

BERT = case("bert", "BertConfig", "AutoModelForMaskedLM")
BERT_SIZES = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a folder in place."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    save_file(change(tensors), file, {"format": "pt"})


def tensors_of(reader: HfReader) -> dict[str, torch.Tensor]:
    """Every logical tensor of a folder, float32."""
    found = {name: torch.empty(reader.info(name)[0]) for name in reader.names()}
    for name, tensor in found.items():
        reader.read_into(name, (0,) * tensor.dim(), tensor)
    return found


def old_spelling(tensors: dict) -> dict:
    """As the first published folders are: gamma and beta, a pooler, a head for the next sentence, a tied matrix."""
    named = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
             for n, x in tensors.items()}  # fmt: skip
    named["bert.pooler.dense.weight"], named["bert.pooler.dense.bias"] = torch.randn(32, 32), torch.randn(32)
    named["cls.seq_relationship.weight"], named["cls.seq_relationship.bias"] = torch.randn(2, 32), torch.randn(2)
    named["bert.embeddings.position_ids"] = torch.arange(64)[None]
    tied = named["bert.embeddings.word_embeddings.weight"].clone()
    return named | {"cls.predictions.decoder.weight": tied}


def test_an_old_folder_is_the_same_model(tmp_path):
    folder = make(tmp_path / "hf", BERT)
    with HfReader(folder) as reader:
        plain = tensors_of(reader)
    rewrite(folder, old_spelling)
    for architecture in ("BertForPreTraining", "BertForMaskedLM"):
        config = json.loads((folder / "config.json").read_text()) | {"architectures": [architecture]}
        (folder / "config.json").write_text(json.dumps(config))
        with HfReader(folder) as reader:
            notes = " ".join(reader.notes)
            assert "cls.seq_relationship.bias" in notes and "bert.pooler.dense.weight" in notes
            assert "cls.predictions.decoder.weight is left aside" in notes
            found = tensors_of(reader)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], want) for name, want in plain.items())


def test_a_body_without_a_pooler(tmp_path):
    folder = make(tmp_path / "hf", case("bert-body", "BertConfig", "AutoModel"))
    rewrite(folder, lambda tensors: {n: x for n, x in tensors.items() if not n.startswith("pooler.")})
    with HfReader(folder) as reader:
        assert reader.model.head == "none" and reader.model.pooler is False


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is relative_key"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"architectures": ["BertForTokenClassification"]}, "known is BertForMaskedLM or BertForSequence"),
        ({"architectures": ["BertForSequenceClassification"], "num_labels": 0}, "num_labels is '0'"),
    ],
)
def test_what_is_no_bert_of_ours_is_refused_by_name(change, words):
    raw = {"model_type": "bert"} | BERT_SIZES
    assert parse_config(raw, "c").model.head == "mlm"
    with pytest.raises(UsageError, match=words):
        parse_config(raw | change, "c")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"causal": False, "head": "mlm"}, "model.causal is False, llama needs True"),
        ({"norm_place": "post"}, "model.norm_place is post"),
        ({"embedding_norm": True}, "model.embedding_norm is True"),
        ({"head": "none"}, "model.head is none, llama has no class of that"),
        ({"head": "value", "pooler": True}, "model.pooler is True, llama has none"),
        ({"head_bias": True}, "model.head_bias is True"),
        ({"family": "bert", "tie_embeddings": False}, "bert ties them"),
        ({"family": "bert", "head": "classification", "num_labels": 3}, "model.pooler is False, bert has one"),
    ],
)
def test_a_model_that_no_family_holds_is_not_written_as_another(fields, words):
    sizes = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "vocab_size": 11}
    with pytest.raises(UsageError, match=words):
        family_of(ModelConfig(**({"family": "llama"} | sizes | fields)).resolve())


def test_configurations_of_heads_round_trip():
    for family, head in (("bert", "classification"), ("bert", "value"), ("bert", "none"), ("llama", "classification")):
        model = ModelConfig(
            family=family, num_layers=2, hidden_size=16, num_heads=2, vocab_size=11, head=head,
            num_labels=7 if head == "classification" else None, pooler=family == "bert",
        ).resolve()  # fmt: skip
        written = write_config(model, "float32", {})
        assert parse_config(written, "c").model == dataclasses.replace(model, preset=None)


def test_rules_that_swap_two_parts_are_found(tmp_path, monkeypatch):
    """Negative control: keys and values exchanged, and an encoder that looks back only and is read at its end."""
    from megallm.convert import families, verify

    folder = make(tmp_path / "hf", case("bert-classes", "BertConfig", CLASSES, num_labels=5))
    request = ConvertRequest("megallm", str(folder), str(tmp_path / "a"), verify=True)
    assert convert.run(request)["max_rel_error"] <= 1e-5
    family = families.FAMILIES["bert"]

    def exchanged(name: str) -> str:
        return name.replace("[0]", "[x]").replace("[1]", "[0]").replace("[x]", "[1]")

    swapped = tuple(dataclasses.replace(each, ours=tuple(map(exchanged, each.ours))) for each in family.rules)
    monkeypatch.setitem(families.FAMILIES, "bert", dataclasses.replace(family, rules=swapped))
    with pytest.raises(convert.NotEqual):
        convert.run(dataclasses.replace(request, output=str(tmp_path / "b")))
    monkeypatch.undo()
    real = verify.our_logits
    monkeypatch.setattr(verify, "our_logits", lambda model, *rest: real(dataclasses.replace(model, causal=True), *rest))
    with pytest.raises(convert.NotEqual):
        convert.run(dataclasses.replace(request, output=str(tmp_path / "c")))


# A folder's body with a new head


NEW_HEADS = {
    "bert to classes": (BERT, {"head": "classification", "num_labels": 3, "pooler": True}),
    "bare bert to classes": (case("b", "BertConfig", "AutoModel"), {"head": "classification", "num_labels": 3}),
    "bert from five classes to a value": (case("b", "BertConfig", CLASSES, num_labels=5), {"head": "value"}),
    "llama to a reward": (case("l", "LlamaConfig"), {"head": "value"}),
    "tied llama to classes": (
        case("l", "LlamaConfig", tie_word_embeddings=True), {"head": "classification", "num_labels": 4},
    ),
    "a reward to a language model": (case("l", "LlamaConfig", CLASSES, num_labels=1), {"head": "lm"}),
    "a decoder to diffusion": (case("l", "LlamaConfig"), {"causal": False}),
    "a decoder to a masked head": (case("l", "LlamaConfig"), {"causal": False, "head": "mlm"}),
}  # fmt: skip


@pytest.mark.parametrize("name", NEW_HEADS)
def test_a_body_is_trained_on_with_a_new_head(name, tmp_path):
    """The body's weights are the folder's, the head's those of a fresh model of this seed; one step runs."""
    wanted, changes = NEW_HEADS[name]
    folder = make(tmp_path / "hf", wanted)
    model = agree(ModelConfig(hf=str(folder), **changes), read_config(folder).model, "the folder")
    config = EngineConfig(model=model, seed=7)
    engine, told = build_engine(config, Mesh.single(), None)
    fresh = {piece.name: piece.tensor.clone() for piece in Engine.build(config, Mesh.single()).masters()}
    with HfReader(folder) as reader:
        stored = tensors_of(reader)
    made = {piece.name: piece.tensor.clone() for piece in engine.masters()}
    assert made.keys() == fresh.keys()
    new = set(changes) != {"causal"}
    for key, tensor in made.items():
        want = fresh[key] if new and key.startswith("head.") else stored[key]
        assert torch.equal(tensor, want), key
    assert not new or any(key.startswith("head.") for key in made)
    tokens = torch.randint(0, 3, (2, 8))
    batch = {"tokens": tokens, "labels": tokens, "positions": torch.arange(8).expand(2, 8),
             "mask": torch.ones(2, 8, dtype=torch.bool), "targets": torch.zeros(2, 8)}  # fmt: skip
    loss = Regression() if model.head == "value" else NextToken()
    assert engine.train_step([batch], loss, 1e-3).loss > 0
    assert told.startswith("starting from the weights of")


def test_a_head_must_fit_and_nothing_else_may_change(tmp_path):
    folder = make(tmp_path / "hf", BERT)
    found = read_config(folder).model
    with pytest.raises(UsageError, match=r"model.head classification needs model.num_labels"):
        agree(ModelConfig(head="classification"), found, "the folder")
    with pytest.raises(UsageError, match=r"model.norm_place is pre, the folder has post"):
        agree(ModelConfig(head="value", norm_place="pre"), found, "the folder")
    rewrite(folder, lambda tensors: tensors | {"stranger.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"stranger\.weight"):
        HfReader(folder, agree(ModelConfig(head="value"), found, "the folder"))
