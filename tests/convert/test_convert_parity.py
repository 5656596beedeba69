"""Every family: logits equal to transformers, and Hugging Face -> megallm -> Hugging Face bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megallm.base.errors import UsageError
from megallm.checkpoint import store
from megallm.checkpoint.reader import CheckpointReader
from megallm.checkpoint.tools import resolve_step
from megallm.convert import convert, families, verify
from megallm.convert.convert import ConvertRequest, NotEqual
from megallm.convert.rules import rule
from megallm.convert.weights import Cast, HfReader
from megallm.engine.config import EngineConfig
from megallm.models.compute import ComputeConfig
from megallm.models.config import ModelConfig, RopeScaling
from megallm.ops.rope import stretched
from megallm.oracle import reference_mla
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.training.weights import read_weights
from tests.convert.tiny import CASES, case, make
from tests.ranks import run_ranks

LLAMA, GPT2 = case("llama", "LlamaConfig"), case("gpt2", "GPT2Config")


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_bits(one: Path, other: Path) -> None:
    """Two folders hold the same tensors: names, dtypes and every bit."""
    before, after = loaded(one), loaded(other)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


@pytest.mark.parametrize("wanted", CASES, ids=lambda one: one.name)
def test_logits_and_round_trip(wanted, tmp_path):
    original = make(tmp_path / "hf", wanted)
    done = convert.run(ConvertRequest("megallm", str(original), str(tmp_path / "ours"), verify=True))
    assert done["max_rel_error"] == done["max_rel_error_everywhere"] <= 1e-5 and done["left_out"] == 0
    back = tmp_path / "back"
    done = convert.run(ConvertRequest("hf", str(tmp_path / "ours"), str(back), verify=True))
    assert done["max_rel_error"] <= 1e-5
    assert_same_bits(original, back)


def save_at_layout(folder: str, root: str, layout: Layout, precision: str) -> int:
    """One rank: build the model from the folder, its own pieces only, and save what it owns; bytes that it holds."""
    mesh = Mesh.start(layout)
    with HfReader(folder) as reader:
        engine = read_weights(EngineConfig(reader.model, compute=ComputeConfig(precision)), mesh, reader)
        meta = convert.imported_meta(reader.model, reader.dtype) | {"engine": engine.counters()}
    store.save(root, 7, list(engine.parts()), meta, mesh)
    return engine.num_local_params()


@pytest.mark.parametrize("wanted", CASES[::2], ids=lambda one: one.name)
def test_through_ranks_bit_for_bit(wanted, tmp_path):
    original = make(tmp_path / "hf", wanted, shard="12KB")
    assert (original / "model.safetensors.index.json").exists()
    held = run_ranks(4, save_at_layout, str(original), str(tmp_path / "run/checkpoints"), Layout(tp=2, pp=2), "fp32")
    with HfReader(original) as reader:
        assert max(held) < 0.62 * reader.model.num_params()
    convert.run(ConvertRequest("hf", str(tmp_path / "run"), str(tmp_path / "back")))
    assert_same_bits(original, tmp_path / "back")


def test_bf16_keeps_its_bits_and_fp32_masters_are_preferred(tmp_path):
    """bf16 folder -> bf16 training with fp32 masters -> bf16 folder; --dtype fp32 writes the masters."""
    original = make(tmp_path / "hf", LLAMA)  # float32 values that bf16 cannot hold
    run_ranks(2, save_at_layout, str(original), str(tmp_path / "run/checkpoints"), Layout(tp=2), "bf16")
    convert.run(ConvertRequest("hf", str(tmp_path / "run"), str(tmp_path / "bf16"), verify=True))
    done = convert.run(ConvertRequest("hf", str(tmp_path / "run"), str(tmp_path / "fp32"), dtype="fp32", verify=True))
    assert done["max_rel_error"] <= 1e-5
    before, narrow, wide = loaded(original), loaded(tmp_path / "bf16"), loaded(tmp_path / "fp32")
    assert all(torch.equal(before[name].to(torch.bfloat16), narrow[name]) for name in before)
    assert all(torch.equal(before[name], wide[name]) for name in before)


def test_narrower_dtypes_are_compared_after_rounding(tmp_path):
    original = make(tmp_path / "hf", LLAMA)
    done = convert.run(ConvertRequest("megallm", str(original), str(tmp_path / "a"), dtype="bf16", verify=True))
    assert done["dtype"] == "bfloat16" and done["max_rel_error"] <= 1e-5
    done = convert.run(ConvertRequest("hf", str(tmp_path / "a"), str(tmp_path / "b"), dtype="fp16", verify=True))
    assert json.loads((tmp_path / "b/config.json").read_text())["torch_dtype"] == "float16"
    half = convert.run(ConvertRequest("megallm", str(tmp_path / "b"), str(tmp_path / "c")))
    assert half["dtype"] == "float32"  # the narrowest of ours that holds float16 exactly


def test_shards_and_index(tmp_path):
    original = make(tmp_path / "hf", LLAMA)
    convert.run(ConvertRequest("megallm", str(original), str(tmp_path / "a")))
    limit = 10_000
    done = convert.run(
        ConvertRequest("hf", str(tmp_path / "a"), str(tmp_path / "b"), max_shard_bytes=limit, verify=True)
    )
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    index = json.loads((tmp_path / "b/model.safetensors.index.json").read_text())
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == done["bytes"]
    assert {file.name for file in files} == set(index["weight_map"].values())
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit


@pytest.mark.parametrize(
    ("wrong", "shaky", "left_out"),
    [([], [], 0), ([7], [7, 8], 2), ([7], [8], None), ([7], list(range(30)), None)],
    ids=["all agree", "float32 cannot judge it", "another position is shaky", "too many are shaky"],
)
def test_positions_are_left_out_only_where_float32_cannot_judge(wrong, shaky, left_out, tmp_path, monkeypatch):
    """`wrong` positions differ by 3e-5; transformers' own logits move by 1e-5 at the `shaky` ones."""
    original, real, ours = make(tmp_path / "hf", LLAMA), verify.transformers_logits, verify.our_logits

    def nudged(model, tokens, nudge=0.0):
        logits = real(model, tokens)
        logits[0, shaky] += nudge / verify.NUDGE * 1e-5 * logits.abs().max()
        return logits

    def off(model, source, tokens):
        logits = ours(model, source, tokens)
        logits[0, wrong] += 3e-5 * logits.abs().max()
        return logits

    monkeypatch.setattr(verify, "transformers_logits", nudged)
    monkeypatch.setattr(verify, "our_logits", off)
    request = ConvertRequest("megallm", str(original), str(tmp_path / "out"), verify=True)
    if left_out is None:
        with pytest.raises(NotEqual, match="differ from those of transformers by 3"):
            convert.run(request)
        return
    done = convert.run(request)
    assert (done["left_out"], done["positions"]) == (left_out, 96) and done["max_rel_error"] <= 1e-6
    assert any("2 of 96 positions differ by up to 3.0e-05" in note for note in done["notes"]) == (left_out > 0)
    assert (done["max_rel_error_everywhere"] > 2e-5) == (left_out > 0)


def broken(family: str, change) -> families.Family:
    rules = tuple(change(each) for each in families.FAMILIES[family].rules)
    return dataclasses.replace(families.FAMILIES[family], rules=rules)


def swap_gate_and_up(each):
    names = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    for old, new in names.items():
        if old in each.theirs:
            return dataclasses.replace(each, theirs=each.theirs.replace(old, new))
    return each


def swap_keys_and_values(each):
    if "c_attn" not in each.theirs:
        return each
    q, k, v = each.ours
    return rule(each.theirs, q, v, k, transpose=each.transpose)


def forget_transpose(each):
    return dataclasses.replace(each, transpose=each.transpose and not each.theirs.endswith("attn.c_proj.weight"))


def swap_norms(each):
    swapped = {"ln_1": "ln_2", "ln_2": "ln_1"}
    for old, new in swapped.items():
        if old in each.theirs:
            return dataclasses.replace(each, theirs=each.theirs.replace(old, new))
    return each


@pytest.mark.parametrize(
    ("wanted", "change"),
    [(LLAMA, swap_gate_and_up), (GPT2, swap_keys_and_values), (GPT2, forget_transpose), (GPT2, swap_norms)],
    ids=lambda one: getattr(one, "name", getattr(one, "__name__", "")),
)
@pytest.mark.parametrize("target", ["megallm", "hf"])
def test_wrong_rules_are_found(wanted, change, target, tmp_path, monkeypatch):
    """Negative control: a wrong rule converts without complaint, and --verify finds it; nothing is left."""
    source = make(tmp_path / "hf", wanted)
    if target == "hf":
        convert.run(ConvertRequest("megallm", str(source), str(tmp_path / "ours")))
        source = tmp_path / "ours"
    monkeypatch.setitem(families.FAMILIES, wanted.name, broken(wanted.name, change))
    convert.run(ConvertRequest(target, str(source), str(tmp_path / "unnoticed")))
    with pytest.raises(NotEqual) as caught:
        convert.run(ConvertRequest(target, str(source), str(tmp_path / "out"), verify=True))
    assert caught.value.max_rel_error > 1e-3 and caught.value.exit_code == 70
    assert not list(tmp_path.glob("out*"))


def test_a_model_that_no_family_holds_is_refused(tmp_path):
    with HfReader(make(tmp_path / "hf", LLAMA)) as reader:
        odd = dataclasses.replace(reader.model, qk_norm=True, qkv_bias=True, bias=True)
        from megallm.convert.hf_config import family_of

        with pytest.raises(UsageError, match="No Hugging Face family .* model.qk_norm is True, llama needs False"):
            family_of(odd)
        assert family_of(dataclasses.replace(reader.model, sliding_window=9)).name == "mistral"


def test_stretched_rotary_embeddings_equal_the_reference():
    """Waves that are kept, blended and stretched all occur; the table equals the oracle's, which goes case by case."""
    config = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_low_factor": 1.0, "rope_high_factor": 4.0}
    config |= {"rope_positions": 48}
    speeds = 1e4 ** -(torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    found = stretched(speeds, RopeScaling("llama3", 8.0, 1.0, 4.0, 48))
    expected = torch.stack([reference_mla._slower(speed, config) for speed in speeds])
    assert torch.allclose(found, expected, rtol=1e-14, atol=0)
    ratio = (found / speeds).tolist()
    assert ratio[0] == 1.0 and ratio[-1] == pytest.approx(1 / 8) and any(0.2 < one < 0.9 for one in ratio)
    linear = stretched(speeds, RopeScaling("linear", 4.0, None, None, None))
    assert torch.equal(linear, speeds / 4)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rope_scaling": "wobble"}, "it must be one of linear, ntk"),
        ({"rope_scaling": "longrope", "rope_factor": 2.0, "rope_positions": 8}, "needs model.rope_short_factors"),
        ({"rope_scaling": "linear"}, "linear needs model.rope_factor"),
        ({"rope_factor": 2.0}, "null has no model.rope_factor"),
        ({"rope_scaling": "linear", "rope_factor": -2.0}, "rope_factor is -2.0"),
        ({"rope_scaling": "linear", "rope_factor": 2.0, "rope_positions": 5}, "linear has no model.rope_positions"),
        ({"rope_scaling": "llama3", "rope_factor": 2.0, "rope_low_factor": 4.0, "rope_high_factor": 1.0,
          "rope_positions": 9}, "must be less than model.rope_high_factor"),
    ],
)  # fmt: skip
def test_stretches_that_make_no_sense_are_refused(fields, sentence):
    with pytest.raises(UsageError, match=sentence):
        ModelConfig(preset="llama3-8b", **fields).resolve()


def test_a_checkpoint_reads_as_any_dtype(tmp_path):
    convert.run(ConvertRequest("megallm", str(make(tmp_path / "hf", LLAMA)), str(tmp_path / "a")))
    with CheckpointReader(resolve_step(tmp_path / "a")) as reader:
        whole = reader.read("layers.1.mlp.down.weight")
        part = torch.empty(5, 7, dtype=torch.float64).T.contiguous().T
        Cast(reader).read_into("layers.1.mlp.down.weight", (3, 2), part)
        assert torch.equal(part, whole[3:8, 2:9].double())
        Cast(reader, through=torch.bfloat16).read_into("layers.1.mlp.down.weight", (3, 2), part)
        assert torch.equal(part, whole[3:8, 2:9].bfloat16().double())
