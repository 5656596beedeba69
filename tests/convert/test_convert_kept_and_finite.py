"""Issue R, A.3: what is left aside equals what is kept, or is refused; what is written is finite."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megallm.base.errors import CheckpointError, UsageError
from megallm.checkpoint import store
from megallm.checkpoint.io import Part
from megallm.checkpoint.reader import CheckpointReader
from megallm.convert import weights
from megallm.convert.convert import ConvertRequest, imported_meta, run
from megallm.convert.weights import HfReader
from megallm.parallel.mesh import Mesh
from tests.convert.tiny import case, make

TIED = {
    "llama": ("LlamaConfig", "AutoModelForCausalLM", "lm_head.weight", "model.embed_tokens.weight"),
    "gpt2": ("GPT2Config", "AutoModelForCausalLM", "lm_head.weight", "transformer.wte.weight"),
    "qwen3": ("Qwen3Config", "AutoModelForCausalLM", "lm_head.weight", "model.embed_tokens.weight"),
    "bert": ("BertConfig", "AutoModelForMaskedLM", "cls.predictions.decoder.weight",
             "bert.embeddings.word_embeddings.weight"),
    "bert's bias": ("BertConfig", "AutoModelForMaskedLM", "cls.predictions.decoder.bias", "cls.predictions.bias"),
}  # fmt: skip


@pytest.fixture(scope="module", params=TIED)
def tied(request, tmp_path_factory):
    """(folder of a tied model, name of the tensor that is left aside, name of the one that is kept)."""
    config, auto, aside, kept = TIED[request.param]
    ties = {} if config == "BertConfig" else {"tie_word_embeddings": True}
    return make(tmp_path_factory.mktemp("tied") / "m", case("x", config, auto, **ties)), aside, kept


def changed(source, target, edit):
    """A copy of a folder with its tensors edited."""
    shutil.copytree(source, target)
    tensors = {name: tensor.clone() for name, tensor in load_file(target / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def convert_in(folder, output, **more):
    return run(ConvertRequest("megallm", str(folder), str(output), **more))


@pytest.mark.parametrize("row", [0, 30, -1])
def test_a_tied_tensor_that_differs_is_refused_wherever(tied, tmp_path, row, monkeypatch):
    """One number in any row; blocks of a few rows, so that the difference is not in the first."""
    source, aside, kept = tied
    monkeypatch.setattr(weights, "BLOCK_BYTES", 4 * 32 * 8)

    def edit(tensors):
        tensors[aside] = tensors[kept].clone()
        tensors[aside][row] += 0.5

    folder = changed(source, tmp_path / "other", edit)
    for attempt in (lambda: convert_in(folder, tmp_path / "ours"), lambda: HfReader(folder)):
        with pytest.raises(CheckpointError, match=f"{aside} differs from {kept} in row {row % 61}, though"):
            attempt()
    assert not (tmp_path / "ours").exists()


def test_a_tied_tensor_that_is_equal_is_left_aside(tied, tmp_path):
    """In another dtype too, and with a NaN in both (which the pass over the numbers then refuses)."""
    source, aside, kept = tied

    def edit(tensors):
        tensors[kept] = tensors[kept].to(torch.bfloat16).float()
        tensors[aside] = tensors[kept].to(torch.bfloat16)

    folder = changed(source, tmp_path / "equal", edit)
    convert_in(folder, tmp_path / "ours")
    with CheckpointReader(store.latest(tmp_path / "ours/checkpoints")[0]) as reader:
        assert "head.weight" not in reader.names()


def test_what_the_sentence_advises_mends_it(tmp_path):
    """Untied, the head is kept, and the logits are those of transformers."""
    source = make(tmp_path / "tied", case("x", "LlamaConfig", tie_word_embeddings=True))
    folder = changed(
        source, tmp_path / "other", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0.3})
    )
    with pytest.raises(CheckpointError, match='set "tie_word_embeddings": false in config.json to keep both'):
        convert_in(folder, tmp_path / "ours")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert convert_in(folder, tmp_path / "ours", verify=True)["max_rel_error"] <= 1e-5


def test_bert_with_both_spellings_of_a_norm_is_refused(tmp_path):
    source = make(tmp_path / "m", case("x", "BertConfig", "AutoModelForMaskedLM"))
    name = "bert.embeddings.LayerNorm.weight"
    folder = changed(source, tmp_path / "two", lambda t: t.update({name.replace("weight", "gamma"): t[name] + 1}))
    with pytest.raises(CheckpointError, match="LayerNorm.weight and .*LayerNorm.gamma|gamma and .*weight"):
        convert_in(folder, tmp_path / "ours")


# Finite.

LAST = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make(tmp_path_factory.mktemp("plain") / "m", case("x", "LlamaConfig"))


def with_number(source, target, name, number, place=(3, 5), dtype=None):
    def edit(tensors):
        tensors[name] = tensors[name] if dtype is None else tensors[name].to(dtype)
        tensors[name][place] = number

    return changed(source, target, edit)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [LAST, "model.embed_tokens.weight", "lm_head.weight"])
def test_an_import_that_is_not_finite_is_refused(plain, tmp_path, name, number):
    folder = with_number(plain, tmp_path / "bad", name, number)
    with pytest.raises(CheckpointError, match=rf" at \[3, 5\] is {number}"):
        convert_in(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_an_import_that_overflows_is_refused(plain, tmp_path):
    folder = with_number(plain, tmp_path / "large", "model.embed_tokens.weight", 1e300, dtype=torch.float64)
    with pytest.raises(UsageError, match=r"is 1e\+300, which float32 cannot hold .* --dtype"):
        convert_in(folder, tmp_path / "ours", dtype="fp32")
    convert_in(folder, tmp_path / "ours")  # stored as float64


def ours_with(tmp_path, plain, number, dtype=torch.float32):
    """A checkpoint of ours with one number in it, as a run that went wrong would save it."""
    with HfReader(plain) as reader:
        parts = []
        for name in reader.names():
            tensor = torch.empty(reader.info(name)[0], dtype=dtype)
            reader.read_into(name, (0,) * tensor.dim(), tensor)
            if name == "layers.1.mlp.down.weight":
                tensor[2, 7] = number
            parts.append(Part(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor))
        store.save(tmp_path / "ours/checkpoints", 0, parts, imported_meta(reader.model, dtype), Mesh.single())
    return tmp_path / "ours"


@pytest.mark.parametrize("number", [1e5, -7e4, 65520.0])
def test_an_export_to_fp16_that_overflows_is_refused(plain, tmp_path, number):
    ours = ours_with(tmp_path, plain, number)
    request = ConvertRequest("hf", str(ours), str(tmp_path / "hf"), "fp16")
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.down_proj\.weight at \[2, 7\] is .* float16 cannot hold"):
        run(request)
    assert not (tmp_path / "hf").exists()
    run(ConvertRequest("hf", str(ours), str(tmp_path / "hf"), "bf16"))


def test_the_largest_number_of_fp16_passes(plain, tmp_path):
    ours = ours_with(tmp_path, plain, 65504.0)
    run(ConvertRequest("hf", str(ours), str(tmp_path / "hf"), "fp16"))
    assert load_file(tmp_path / "hf/model.safetensors")["model.layers.1.mlp.down_proj.weight"].max() == 65504


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", None])
def test_an_export_that_is_not_finite_is_refused(plain, tmp_path, number, dtype):
    ours = ours_with(tmp_path, plain, number)
    with pytest.raises(CheckpointError, match=rf"down_proj\.weight at \[2, 7\] is {number}"):
        run(ConvertRequest("hf", str(ours), str(tmp_path / "hf"), dtype))


def test_large_numbers_whose_sum_overflows_are_finite(plain, tmp_path):
    folder = changed(plain, tmp_path / "large", lambda t: t["model.embed_tokens.weight"].fill_(3e38))
    convert_in(folder, tmp_path / "ours")
