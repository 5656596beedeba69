"""config.json: what transformers means by it, and everything that megallm cannot compute refused by name."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from megallm.base.errors import CheckpointError, UsageError
from megallm.convert.families import FAMILIES
from megallm.convert.folder import read_json
from megallm.convert.hf_config import agree, parse_config, write_config
from megallm.models.config import ModelConfig
from megallm.models.presets import PRESETS
from tests.convert.tiny import CASES

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 32,
    "vocab_size": 61,
}
CLASSES = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config",
           "phi3": "Phi3Config"}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_absent_keys_mean_what_transformers_means(name):
    import transformers

    theirs = getattr(transformers, CLASSES[name])(**SIZES)
    ours = parse_config({"model_type": name} | SIZES, "config.json").model
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_size == (theirs.head_dim if name == "qwen3" else 1)
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.sliding_window == (4096 if name == "mistral" else None)


def test_absent_keys_of_gpt2():
    ours = parse_config({"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 61}, "c").model
    assert (ours.ffn_hidden_size, ours.max_positions, ours.activation, ours.tie_embeddings) == (
        128,
        1024,
        "gelu_tanh",
        True,
    )
    assert (ours.norm_eps, ours.bias, ours.qkv_bias, ours.positions) == (1e-5, True, True, "learned")


@pytest.mark.parametrize("wanted", CASES, ids=lambda one: one.name)
def test_what_transformers_writes_is_read_and_written_again(wanted):
    import transformers

    raw = json.loads(getattr(transformers, wanted.config)(**wanted.arguments).to_json_string())
    found = parse_config(raw, "config.json")
    assert not found.notes
    again = parse_config(write_config(found.model, "float32", {"eos_token_id": 2}), "again")
    assert again.model == found.model and not again.notes


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive(preset):
    model = ModelConfig(preset=preset).resolve()
    written = write_config(model, "bfloat16", {})
    assert parse_config(written, "x").model == dataclasses.replace(model, preset=None)
    if model.positions == "rope":  # one key for transformers 4, the other for 5
        table = written["rope_parameters"]
        table = table.get("full_attention", table)
        assert written[FAMILIES[model.family].layers.theta] == table["rope_theta"] == model.rope_theta


REFUSED = [
    ("llama", {"attention_bias": "yes"}, "attention_bias is 'yes'; it must be true or false"),
    ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope lacks original_max_position_embeddings"),
    ("llama", {"rope_scaling": {"type": "wobble", "factor": 2.0}}, "rope_scaling asks for rope type 'wobble'"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3 lacks low_freq_factor"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": -2}}, "rope_scaling.factor is '-2'"),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters of type yarn lacks factor"),
    ("llama", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta is .*they must agree"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("phi3", {"auto_map": {"AutoConfig": "configuration_phi4.Phi3Config"}}, "auto_map is .* never run"),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope lacks short_factor"),
    (
        "phi3",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        "of type longrope lacks short_factor",  # as transformers reads the word in this family
    ),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved is True"),
    ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'; megallm computes silu"),
    ("llama", {"sliding_window": 64}, "sliding_window is 64; it must be absent"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config is of 'gptq'"),
    ("llama", {"auto_map": {"AutoModelForCausalLM": "x.Y"}}, "auto_map .* code of the folder, which is never run"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ("llama", {"logits_scaling": 8.0}, "logits_scaling is 8.0"),
    ("llama", {"num_hidden_layers": True}, "num_hidden_layers is 'True'"),
    ("llama", {"num_hidden_layers": 2**40}, "num_hidden_layers is .* a whole number"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it must be a positive number"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ("llama", {"num_key_value_heads": 5}, "is not a multiple of model.num_kv_heads 5"),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "mixes full and sliding"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit is 5.0"),
    ("olmo2", {"sliding_window": 8}, "sliding_window is 8"),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers is .* must be a list of 0 and 1"),
    ("gemma2", {"layer_types": ["sliding_attention", "chunked_attention"]}, "'chunked_attention' somewhere"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "weight_block_size None"),
    ("qwen3", {"layer_types": ["linear_attention"] * 2}, "layer_types is 'linear_attention'"),
    ("qwen3", {"layer_types": {"a": 1}}, "layer_types is .* must be a list"),
    ("qwen3", {"attention_bias": True}, "attention_bias is True; it must be absent or False"),
    ("mistral", {"sliding_window": -3}, "sliding_window is '-3'"),
    ("mistral", {"architectures": ["MixtralForCausalLM"]}, "has architectures .*MixtralForCausalLM"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    ("mamba", {}, "model_type 'mamba', which megallm does not convert. The nearest that it does is"),
]


@pytest.mark.parametrize(("name", "change", "sentence"), REFUSED)
def test_refused_by_name(name, change, sentence):
    sizes = SIZES | {"num_key_value_heads": 2}
    if name == "gpt2":
        sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 61}
    if name in FAMILIES:
        parse_config({"model_type": name} | sizes, "config.json")  # fine without the change
    with pytest.raises(UsageError, match=sentence):
        parse_config({"model_type": name} | sizes | change, "config.json")


def test_all_at_once_and_unknown_keys_are_told():
    raw = {"model_type": "llama", "num_key_value_heads": 2} | SIZES
    with pytest.raises(UsageError) as caught:
        parse_config(raw | {"alibi": True, "hidden_act": "relu", "mlp_bias": 3}, "config.json")
    assert all(word in str(caught.value) for word in ("alibi", "relu", "mlp_bias"))
    noted = parse_config(raw | {"wobble_factor": 3, "_name_or_path": "x", "off": False}, "config.json").notes
    assert len(noted) == 1 and "wobble_factor" in noted[0] and "off" not in noted[0].split("know")[1]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{" * 3, "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"a": 1, "a": 2}', "given twice"),
        ("[]", "must hold a JSON object"),
        ('{"a": "' + "x" * (5 * 2**20) + '"}', "is larger than"),
    ],
)
def test_broken_json(tmp_path, text, sentence):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=sentence):
        read_json(tmp_path / "config.json")


def test_configuration_beside_a_folder():
    found = parse_config({"model_type": "llama", "num_key_value_heads": 2} | SIZES, "c").model
    assert agree(ModelConfig(hf="d"), found, "d") == dataclasses.replace(found, hf="d")
    assert agree(ModelConfig(hf="d", rope_theta=5e5, max_positions=9999, num_layers=2), found, "d").rope_theta == 5e5
    with pytest.raises(UsageError, match="model.num_layers is 3, d has 2"):
        agree(ModelConfig(hf="d", num_layers=3), found, "d")
    with pytest.raises(UsageError, match="model.hf and model.preset are both given"):
        agree(ModelConfig(hf="d", preset="gpt2"), found, "d")


def test_the_reader_of_configurations_needs_neither_torch_nor_transformers():
    block = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
    body = "from megallm.convert.hf_config import parse_config as p; "
    body += f"print(p({ ({'model_type': 'llama', 'num_key_value_heads': 2} | SIZES)!r}, 'c').model.head_size)"
    done = subprocess.run([sys.executable, "-c", block + body], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "1"
