"""Folders with experts at any layout, in both forms of stored experts, with modules of further tokens; and refusals."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from megallm.base.errors import CheckpointError, UsageError
from megallm.convert import convert, families
from megallm.convert.convert import ConvertRequest, NotEqual
from megallm.convert.hf_config import agree, family_of, parse_config, write_config
from megallm.convert.verify import loaded_stage
from megallm.convert.weights import HfReader
from megallm.models.config import ModelConfig
from megallm.models.presets import PRESETS
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from tests.convert.test_convert_moe import drawn
from tests.convert.test_convert_parity import assert_same_bits, loaded, save_at_layout
from tests.convert.tiny import Case, make
from tests.ranks import run_ranks

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
ROPE = {"rope_theta": 1e4, "rope_type": "default"}
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "num_key_value_heads": 1}
CASES = {
    "mixtral": Case("mixtral", "MixtralConfig", SIZES | {
        "intermediate_size": 20, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 4,
    }),
    "qwen2_moe": Case("qwen2_moe", "Qwen2MoeConfig", SIZES | QWEN | {
        "intermediate_size": 20, "num_hidden_layers": 3, "mlp_only_layers": [0],
        "shared_expert_intermediate_size": 12, "rope_parameters": ROPE,
    }),
    "qwen3_moe": Case("qwen3_moe", "Qwen3MoeConfig", SIZES | QWEN | {
        "intermediate_size": 20, "num_hidden_layers": 2, "head_dim": 8, "rope_parameters": ROPE,
    }),
    "olmoe": Case("olmoe", "OlmoeConfig", SIZES | {
        "intermediate_size": 12, "num_hidden_layers": 2, "num_key_value_heads": 1, "num_experts": 4,
        "num_experts_per_tok": 2,
    }),
    "deepseek_v3": Case("deepseek_v3", "DeepseekV3Config", SIZES | {
        "intermediate_size": 20, "num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 12, "kv_lora_rank": 12,
        "q_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5, "rope_parameters": ROPE,
        "num_key_value_heads": 4,
    }),
}  # fmt: skip
LAYOUTS = {
    "tp2 pp2": Layout(tp=2, pp=2),
    "ep2 over dp": Layout(dp=2, ep=2),
    "ep2 over tp, pp2": Layout(tp=2, pp=2, ep=2),
    "ep4 over tp and dp": Layout(dp=2, tp=2, ep=4),
}


def back_again(original: Path, tmp_path: Path, layout: Layout) -> None:
    """HF -> ranks of a layout -> checkpoint -> HF: every tensor has its name, dtype and bits again."""
    world = layout.pp * layout.dp * layout.cp * layout.tp
    run_ranks(world, save_at_layout, str(original), str(tmp_path / "run/checkpoints"), layout, "fp32")
    convert.run(ConvertRequest("hf", str(tmp_path / "run"), str(tmp_path / "back")))
    assert_same_bits(original, tmp_path / "back")


@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, "tp2 pp2") for family in CASES]
    + [("mixtral", "ep4 over tp and dp"), ("qwen2_moe", "ep2 over dp"), ("olmoe", "ep2 over tp, pp2")],
)
def test_through_ranks_bit_for_bit(family, layout, tmp_path):
    back_again(make(tmp_path / "hf", CASES[family], shard="12KB"), tmp_path, LAYOUTS[layout])


# Further tokens


def with_further_tokens(folder: Path) -> Path:
    """The last layer of a saved DeepSeek becomes the block of a module of further tokens, laid out as published."""
    config = json.loads((folder / "config.json").read_text())
    layers = config["num_hidden_layers"] - 1
    config |= {"num_hidden_layers": layers, "num_nextn_predict_layers": 1}
    config.pop("num_mtp_layers", None)
    (folder / "config.json").write_text(json.dumps(config))
    tensors, at, d = load_file(folder / "model.safetensors"), f"model.layers.{layers}.", config["hidden_size"]
    torch.manual_seed(9)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{at}{name}.weight"] = 1 + 0.1 * torch.randn(d)
    tensors[at + "eh_proj.weight"] = torch.randn(d, 2 * d) / d**0.5
    tensors[at + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[at + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("layout", ["tp2 pp2", "ep2 over tp, pp2"])
def test_further_tokens_through_ranks_bit_for_bit(layout, tmp_path):
    original = with_further_tokens(make(tmp_path / "hf", CASES["deepseek_v3"]))
    with HfReader(original) as reader:
        assert reader.model.mtp.depth == 1 and not reader.notes
        assert "mtp.0.block.moe.router.bias" in reader.names()
    back_again(original, tmp_path, LAYOUTS[layout])


def our_outputs(folder: Path, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per-token log-probabilities of the next and the further tokens, with the weights of the folder."""
    with HfReader(folder) as reader, torch.no_grad():
        return loaded_stage(reader.model, reader, Mesh.single())(None, batch)


def written_out(folder: Path, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the next token `[B, T - 1]` and of the one after it `[B, T - 2]`.

    By transformers' own layers and the formulas of DeepSeek-V3's section 2.2, from tensors by their published names.
    """
    import transformers
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tensors, config = load_file(folder / "model.safetensors"), model.config
    at = f"model.layers.{config.num_hidden_layers}."
    layer = theirs.DeepseekV3DecoderLayer(config, config.num_hidden_layers).eval()
    own = {name.removeprefix(at): value for name, value in tensors.items() if name.startswith(at)}
    experts = [[own.pop(f"mlp.experts.{x}.{part}_proj.weight") for part in ("gate", "up", "down")]
               for x in range(config.n_routed_experts)]  # fmt: skip
    own["mlp.experts.gate_up_proj"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in experts])
    own["mlp.experts.down_proj"] = torch.stack([down for _, _, down in experts])
    other = {name: own.pop(name) for name in list(own) if name.split(".")[0] in
             ("enorm", "hnorm", "eh_proj", "shared_head", "embed_tokens")}  # fmt: skip
    layer.load_state_dict(own)

    def rms(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * other[f"{name}.weight"]

    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state
        first = model.lm_head(hidden).log_softmax(-1)
        embedded = F.embedding(tokens[:, 1:], other["embed_tokens.weight"])
        joined = torch.cat((rms(embedded, "enorm"), rms(hidden[:, :-1], "hnorm")), -1) @ other["eh_proj.weight"].T
        length = joined.shape[1]
        positions = torch.arange(length).expand(joined.shape[:2])
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        out = layer(joined, attention_mask=mask, position_ids=positions,
                    position_embeddings=model.model.rotary_emb(joined, positions))  # fmt: skip
        second = (rms(out, "shared_head.norm") @ other["shared_head.head.weight"].T).log_softmax(-1)
    picked = first[:, :-1].gather(-1, tokens[:, 1:, None]), second[:, :-1].gather(-1, tokens[:, 2:, None])
    return picked[0][..., 0], picked[1][..., 0]


def test_the_loss_of_further_tokens_is_that_of_a_written_out_reference(tmp_path):
    folder = with_further_tokens(make(tmp_path / "hf", CASES["deepseek_v3"]))
    tokens = torch.randint(0, 61, (2, 25), generator=torch.Generator().manual_seed(4))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "positions": torch.arange(24).expand(2, 24),
             "mask": torch.ones(2, 24, dtype=torch.bool)}  # fmt: skip
    found = our_outputs(folder, batch)
    first, second = written_out(folder, tokens)
    assert (found["log_prob"] - first).abs().max() < 2e-5
    assert (found["mtp_1"][:, :-1] - second).abs().max() < 2e-5  # the last label is one place further than the row
    assert -found["mtp_1"][:, :-1].mean().item() == pytest.approx(-second.mean().item(), rel=1e-5)
    assert (found["mtp_1"][:, :-1] - first[:, :-1]).abs().max() > 0.1  # and it is another prediction


def test_transformers_reads_the_module_of_further_tokens_that_we_write(tmp_path):
    """Its own drafting model, loaded from an exported folder, says what we say."""
    import transformers
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    folder = with_further_tokens(make(tmp_path / "hf", CASES["deepseek_v3"]))
    convert.run(ConvertRequest("megallm", str(folder), str(tmp_path / "ours")))
    convert.run(ConvertRequest("hf", str(tmp_path / "ours"), str(tmp_path / "back")))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2.*"]  # it looks for the published number of layers
    drafting = MtpModel.from_pretrained(model).eval()
    tokens = torch.randint(0, 61, (2, 25), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        hidden, positions = model.model(tokens).last_hidden_state[:, :-1], torch.arange(1, 25).expand(2, 24)
        cache = MtpCache(config=model.config.get_mtp_config())
        out = drafting.forward_layer(0, hidden, positions, cache, input_ids=tokens[:, 1:])
        second = drafting._project_to_logits(out).log_softmax(-1)[:, :-1].gather(-1, tokens[:, 2:, None])[..., 0]
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "positions": torch.arange(24).expand(2, 24),
             "mask": torch.ones(2, 24, dtype=torch.bool)}  # fmt: skip
    assert (our_outputs(tmp_path / "back", batch)["mtp_1"][:, :-1] - second).abs().max() < 2e-5


def test_config_json_may_speak_of_modules_that_the_folder_lacks(tmp_path):
    folder = make(tmp_path / "hf", CASES["deepseek_v3"])
    with HfReader(folder) as reader:
        assert reader.model.mtp.depth == 0 and "has none of them" in " ".join(reader.notes)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t | {"model.layers.2.embed_tokens.weight": t["model.layers.2.embed_tokens.weight"] + 1},
         "must repeat the model's own embedding.weight"),
        (lambda t: t | {"model.layers.2.shared_head.head.weight": t["lm_head.weight"][:, :-1].contiguous()}, "shape"),
        (lambda t: {n: x for n, x in t.items() if n != "model.layers.2.enorm.weight"}, "enorm.weight is missing"),
    ],
    ids=["another embedding", "another shape", "a norm is missing"],
)  # fmt: skip
def test_modules_of_further_tokens_that_are_not_whole(change, sentence, tmp_path):
    folder = with_further_tokens(make(tmp_path / "hf", CASES["deepseek_v3"]))
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=sentence):
        HfReader(folder)


def test_a_copy_is_compared_in_every_row(tmp_path):
    folder = with_further_tokens(make(tmp_path / "hf", CASES["deepseek_v3"]))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.embed_tokens.weight"][30, 5] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="differs from row"):
        convert.run(ConvertRequest("megallm", str(folder), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_copies_may_be_absent(tmp_path):
    folder = with_further_tokens(make(tmp_path / "hf", CASES["deepseek_v3"]))
    tensors = load_file(folder / "model.safetensors")
    for name in ("embed_tokens", "shared_head.head"):
        del tensors[f"model.layers.2.{name}.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    convert.run(ConvertRequest("megallm", str(folder), str(tmp_path / "ours"), verify=True))


# Forms of stored experts


@pytest.mark.parametrize("family", CASES)
def test_stacked_experts_are_the_same_model(family, tmp_path):
    """What transformers 5 writes when it is not to keep the published form."""
    import transformers

    original = make(tmp_path / "hf", CASES[family])
    model = transformers.AutoModelForCausalLM.from_pretrained(original)
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    stacked = loaded(tmp_path / "stacked")
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in stacked)
    convert.run(ConvertRequest("megallm", str(tmp_path / "stacked"), str(tmp_path / "ours"), verify=True))
    convert.run(ConvertRequest("hf", str(tmp_path / "ours"), str(tmp_path / "back")))
    assert_same_bits(original, tmp_path / "back")


def test_a_bf16_folder_keeps_float32_selection_biases(tmp_path):
    folder = make(tmp_path / "hf", CASES["deepseek_v3"], torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[name] = torch.tensor([0.1, -0.2, 1e-5, 3.0])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = convert.run(ConvertRequest("megallm", str(folder), str(tmp_path / "ours"), verify=True))
    assert done["dtype"] == "bfloat16"
    convert.run(ConvertRequest("hf", str(tmp_path / "ours"), str(tmp_path / "back"), verify=True))
    after = loaded(tmp_path / "back")
    assert torch.equal(after[name], tensors[name]) and after[name].dtype == torch.float32
    assert all(torch.equal(after[key], tensors[key].to(after[key].dtype)) for key in tensors)


# Wrong rules


def change_of(name: str):
    """A row of the tables that says something wrong but plausible."""

    def changed(each):
        if name == "pairs":
            return dataclasses.replace(each, pairs=False)
        swap = {"gate and up": ("gate_proj", "up_proj"), "w1 and w3": ("w1", "w3")}
        one, two = swap.get(name, ("", ""))
        if one and "experts" in each.theirs and one in each.theirs:
            return dataclasses.replace(each, theirs=each.theirs.replace(one, two))
        if one and "experts" in each.theirs and two in each.theirs:
            return dataclasses.replace(each, theirs=each.theirs.replace(two, one))
        return each

    return changed


@pytest.mark.parametrize(
    ("family", "change"), [("mixtral", "w1 and w3"), ("qwen2_moe", "gate and up"), ("deepseek_v3", "pairs")]
)
def test_wrong_rules_are_found(family, change, tmp_path, monkeypatch):
    folder = make(tmp_path / "hf", CASES[family])
    rules = tuple(map(change_of(change), families.FAMILIES[family].rules))
    assert rules != families.FAMILIES[family].rules
    monkeypatch.setitem(families.FAMILIES, family, dataclasses.replace(families.FAMILIES[family], rules=rules))
    convert.run(ConvertRequest("megallm", str(folder), str(tmp_path / "unnoticed")))
    with pytest.raises(NotEqual):
        convert.run(ConvertRequest("megallm", str(folder), str(tmp_path / "out"), verify=True))
    assert not (tmp_path / "out").exists()


# Configurations


def config_of(family: str) -> dict:
    import transformers

    wanted = CASES[family]
    raw = json.loads(getattr(transformers, wanted.config)(**wanted.arguments).to_json_string())
    return {key: value for key, value in raw.items() if key != "num_mtp_layers"}


@pytest.mark.parametrize(
    ("family", "change", "sentence"),
    [
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is softmax; it must be absent or 'sigmoid'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is greedy"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave is False"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias is True"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_kv_heads is 2, but latent attention"),
        ("deepseek_v3", {"n_shared_experts": 0}, "n_shared_experts is '0'; it must be a whole number of at least 1"),
        ("deepseek_v3", {"n_group": 3}, "num_groups is 3; it must be a divisor"),
        ("deepseek_v3", {"num_nextn_predict_layers": "many"}, "num_nextn_predict_layers is 'many'"),
        ("deepseek_v3", {"num_nextn_predict_layers": 1, "num_mtp_layers": 2}, "num_mtp_layers 2: they must agree"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config has"),
        ("deepseek_v3", {"auto_map": {"AutoConfig": "evil.Config"}}, "auto_map is .* never run"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is '0'"),
        ("mixtral", {"num_experts_per_tok": 9}, "top_k is 9; it must be from 1 to num_experts 4"),
        ("mixtral", {"n_routed_experts": 8}, "n_routed_experts is 8; it must be absent or 0"),
        ("qwen2_moe", {"qkv_bias": False}, "qkv_bias is False"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is '0'"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, "put experts into the layers .0, 2, 3") ,
        ("qwen2_moe", {"mlp_only_layers": "none"}, "mlp_only_layers is none; it must be a list"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "leave no layer with experts"),
        ("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'; it must be true or false"),
        ("qwen3_moe", {"num_experts": 4, "num_local_experts": 8}, "num_experts is 4 and num_local_experts 8"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("olmoe", {"num_experts": 2.5}, "num_experts is '2.5'"),
    ],
)  # fmt: skip
def test_what_another_model_asks_for_is_refused(family, change, sentence):
    parse_config(config_of(family), "c")
    if family == "qwen2_moe" and "mlp_only_layers" in change:
        change = change | {"num_hidden_layers": 4, "layer_types": None}
    with pytest.raises(UsageError, match=sentence):
        parse_config(config_of(family) | change, "c")


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("mixtral", {"num_local_experts": 2**31 - 1}),
        ("mixtral", {"num_local_experts": 5}),
        ("mixtral", {"num_hidden_layers": 2**31 - 1}),
        ("qwen3_moe", {"num_hidden_layers": 9999}),
        ("deepseek_v3", {"num_attention_heads": 2**31 - 1, "num_key_value_heads": 2**31 - 1}),
        ("deepseek_v3", {"num_nextn_predict_layers": 2**31 - 1, "num_mtp_layers": None, "n_routed_experts": 3}),
        ("deepseek_v3", {"kv_lora_rank": 2**31 - 1, "v_head_dim": 2**31 - 1}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", [True, False], ids=["one by one", "stacked"])
def test_absurd_counts_are_refused_at_once(family, change, form, tmp_path):
    import transformers

    original = make(tmp_path / "hf", CASES[family])
    if family == "deepseek_v3":
        with_further_tokens(original)
    if not form:
        transformers.AutoModelForCausalLM.from_pretrained(original).save_pretrained(
            tmp_path / "hf2", save_original_format=False
        )
        original = tmp_path / "hf2"
    config = json.loads((original / "config.json").read_text()) | change
    (original / "config.json").write_text(json.dumps(config))
    begin = time.process_time()
    with pytest.raises((CheckpointError, UsageError)):
        HfReader(original)
    assert time.process_time() - begin < 5


def test_the_published_deepseek_names_its_code_which_is_not_run():
    published = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    }
    assert parse_config(config_of("deepseek_v3") | {"auto_map": published}, "c").model.mla.on


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("family", ["Qwen2Moe", "Qwen3Moe", "DeepseekV3"])
def test_which_layers_have_experts_survives(family, seed):
    import transformers

    wanted = drawn(family, seed + 100)
    theirs = getattr(transformers, wanted.config)(**wanted.arguments)
    raw = json.loads(theirs.to_json_string()) | {"num_nextn_predict_layers": 0}
    model = parse_config(raw, "c").model
    if family != "DeepseekV3":
        expected = [n not in theirs.mlp_only_layers and (n + 1) % theirs.decoder_sparse_step == 0
                    for n in range(theirs.num_hidden_layers)]  # fmt: skip
    else:
        expected = [n >= theirs.first_k_dense_replace for n in range(theirs.num_hidden_layers)]
    assert [model.moe.has_experts(n) for n in range(model.num_layers)] == expected
    again = parse_config(write_config(model, "float32", {}), "again")
    assert [again.model.moe.has_experts(n) for n in range(model.num_layers)] == expected and not again.notes


def test_models_that_no_family_holds():
    model = parse_config(config_of("qwen3_moe"), "c").model
    for change, words in (
        ({"qk_norm_span": "all"}, "qk_norm_span is all, qwen3_moe needs head"),
        ({"moe": dataclasses.replace(model.moe, score="sigmoid")}, "moe.score is sigmoid"),
        ({"moe": dataclasses.replace(model.moe, shared_ffn_hidden_size=8)}, "shared_ffn_hidden_size is 8"),
    ):
        with pytest.raises(UsageError, match=words):
            family_of(dataclasses.replace(model, **change))
    latent = parse_config(config_of("deepseek_v3"), "c").model
    for change, words in (
        ({"mla": dataclasses.replace(latent.mla, norm_eps=1e-5)}, "another epsilon than 1e-06"),
        ({"moe": dataclasses.replace(latent.moe, selection_bias=False)}, "selection_bias is False"),
        ({"mtp": dataclasses.replace(latent.mtp, depth=1, kind="heads")}, "model.mtp.kind is not deepseek"),
    ):
        with pytest.raises(UsageError, match=words):
            family_of(dataclasses.replace(latent, **change))
    dense = ModelConfig(preset="llama3-8b").resolve()
    experts = dataclasses.replace(dense.moe, num_experts=4, ffn_hidden_size=dense.ffn_hidden_size)
    assert family_of(dataclasses.replace(dense, moe=experts)).name == "mixtral"  # what upcycling makes of it


def test_choices_of_training_may_be_given_beside_a_folder():
    found = parse_config(config_of("deepseek_v3"), "c").model
    wanted = ModelConfig(moe={"aux_coef": 0.5, "capacity": 1.25})
    assert agree(wanted, found, "c").moe == dataclasses.replace(found.moe, aux_coef=0.5, capacity=1.25)
    with pytest.raises(UsageError, match="model.moe.top_k is 1"):
        agree(ModelConfig(moe={"top_k": 1}), found, "c")


# Published sizes: parameters as the folders of the authors hold them, the selection biases of DeepSeek not counted

PUBLISHED = {
    "mixtral-8x7b": (46_702_792_704, 12.9),
    "qwen1.5-moe-a2.7b": (14_315_784_192, 2.7),
    "qwen3-30b-a3b": (30_532_122_624, 3.3),
    "olmoe-1b-7b": (6_919_161_856, 1.3),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_sizes(preset):
    model = ModelConfig(preset=preset).resolve()
    total, active = PUBLISHED[preset]
    assert model.num_params() == total
    assert model.num_params(active=True) / 1e9 == pytest.approx(active, abs=0.06)


def test_deepseek_v3_has_the_published_size():
    model = ModelConfig(preset="deepseek-v3").resolve()
    alone = ModelConfig(preset="deepseek-v3", mtp={"depth": 0}).resolve()
    assert alone.num_params() == 671_026_419_200 - 58 * 256
    assert (model.num_params() - alone.num_params() - 2 * 7168**2) / 1e9 == pytest.approx(11.5, abs=0.01)


@pytest.mark.parametrize("preset", [name for name in PRESETS if ModelConfig(preset=name).resolve().moe.num_experts])
def test_presets_count_what_transformers_counts(preset):
    import transformers

    model = ModelConfig(preset=preset, mtp={"depth": 0}).resolve()
    config = transformers.AutoConfig.for_model(**write_config(model, "bfloat16", {}))
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    counted = (p.numel() for name, p in theirs.named_parameters() if "correction_bias" not in name)  # state
    assert sum(counted) == model.num_params()
