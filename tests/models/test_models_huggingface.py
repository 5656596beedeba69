"""Our single-process stage computes what `transformers` computes, family by family, with the weights mapped by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers
from torch import Tensor

from megallm.models.build import place_parameters
from megallm.models.config import ModelConfig
from megallm.models.decoder import Stage
from megallm.models.stages import StageSpan
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import named_shards

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}
LAYERS, D, F, H, K, V, T = 3, 48, 80, 6, 2, 101, 13

SIZES = {
    "num_hidden_layers": LAYERS, "hidden_size": D, "intermediate_size": F, "num_attention_heads": H,
    "num_key_value_heads": K, "vocab_size": V, "max_position_embeddings": 64, "attn_implementation": "eager",
}  # fmt: skip
OURS = {
    "num_layers": LAYERS, "hidden_size": D, "ffn_hidden_size": F, "num_heads": H, "num_kv_heads": K, "vocab_size": V,
    "max_positions": 64,
}  # fmt: skip
Peer = Callable[[], transformers.PreTrainedModel]

FAMILIES: dict[str, tuple[dict, Peer]] = {
    "llama": (
        {"family": "llama", "norm_eps": 1e-6},
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    ),
    "llama-tied-bias": (
        {"family": "llama", "norm_eps": 1e-6, "tie_embeddings": True, "bias": True},
        lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
        ),
    ),
    "mistral-window": (
        {"family": "mistral", "norm_eps": 1e-6, "sliding_window": 5},
        lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=5)),
    ),
    "qwen2": (
        {"family": "qwen2", "rope_theta": 10000.0},
        lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    ),
    "qwen3-head-size": (
        {"family": "qwen3", "head_size": 12, "rope_theta": 10000.0},
        lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=12)),
    ),
    "gpt2": (
        {"family": "gpt2", "num_kv_heads": H},
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_layer=LAYERS,
                n_embd=D,
                n_inner=F,
                n_head=H,
                vocab_size=V,
                n_positions=64,
                attn_implementation="eager",
            )  # fmt: skip
        ),
    ),
}


def from_llama(theirs: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Llama, Mistral, Qwen2, Qwen3: names of `transformers` -> our logical names and shapes."""
    ours = {"embedding.weight": theirs["model.embed_tokens.weight"], "final_norm.weight": theirs["model.norm.weight"]}
    if not config.tie_embeddings:
        ours["head.weight"] = theirs["lm_head.weight"]
    for layer in range(config.num_layers):
        hf, at = f"model.layers.{layer}.", f"layers.{layer}."
        ours[at + "attention_norm.weight"] = theirs[hf + "input_layernorm.weight"]
        ours[at + "mlp_norm.weight"] = theirs[hf + "post_attention_layernorm.weight"]
        for leaf in ("weight", "bias"):
            attention = {name: theirs.get(f"{hf}self_attn.{name}_proj.{leaf}") for name in "qkvo"}
            mlp = {name: theirs.get(f"{hf}mlp.{name}_proj.{leaf}") for name in ("gate", "up", "down")}
            if attention["q"] is not None:
                ours[f"{at}attention.q.{leaf}"] = attention["q"]
                ours[f"{at}attention.kv.{leaf}"] = torch.stack((attention["k"], attention["v"]))
            if attention["o"] is not None:
                ours[f"{at}attention.o.{leaf}"] = attention["o"]
            if mlp["up"] is not None:
                ours[f"{at}mlp.gate_up.{leaf}"] = torch.stack((mlp["gate"], mlp["up"]))
                ours[f"{at}mlp.down.{leaf}"] = mlp["down"]
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                ours[f"{at}attention.{name}.weight"] = theirs[f"{hf}self_attn.{name}.weight"]
    return ours


def from_gpt2(theirs: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """GPT-2 keeps `x W` matrices and q, k, v in one."""
    ours = {"embedding.weight": theirs["transformer.wte.weight"], "positions.weight": theirs["transformer.wpe.weight"]}
    for leaf in ("weight", "bias"):
        ours[f"final_norm.{leaf}"] = theirs[f"transformer.ln_f.{leaf}"]
    for layer in range(config.num_layers):
        hf, at = f"transformer.h.{layer}.", f"layers.{layer}."
        for leaf in ("weight", "bias"):
            parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
            pick = {name: theirs[f"{hf}{name}.{leaf}"].t() for name in parts}
            q, k, v = pick["attn.c_attn"].chunk(3, dim=0)
            ours[f"{at}attention.q.{leaf}"], ours[f"{at}attention.kv.{leaf}"] = q, torch.stack((k, v))
            ours[f"{at}attention.o.{leaf}"] = pick["attn.c_proj"]
            ours[f"{at}mlp.up.{leaf}"], ours[f"{at}mlp.down.{leaf}"] = pick["mlp.c_fc"], pick["mlp.c_proj"]
            ours[f"{at}attention_norm.{leaf}"] = theirs[f"{hf}ln_1.{leaf}"]
            ours[f"{at}mlp_norm.{leaf}"] = theirs[f"{hf}ln_2.{leaf}"]
    return ours


@contextmanager
def wide(dtype: torch.dtype) -> Iterator[None]:
    """transformers computes norms and rotary angles in float32 whatever the model's dtype: in here, in float64."""
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            patch.setattr(torch, "float32", torch.float64)
            patch.setattr(torch, "float", torch.float64)
        yield


def pair_of(name: str, dtype: torch.dtype, **changes: object) -> tuple[Stage, transformers.PreTrainedModel]:
    """A random tiny model of `transformers` and ours with the same weights; `changes` spoil our configuration."""
    switches, peer = FAMILIES[name]
    torch.manual_seed(1)
    with wide(dtype):
        theirs = peer().to(dtype).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms too: their defaults would hide a mistake
            parameter.add_(torch.randn_like(parameter) * 0.1)
    config = ModelConfig(**(OURS | switches | changes)).resolve()
    stage = Stage(config, Mesh.single(), StageSpan(0, LAYERS, True, True))
    convert = from_gpt2 if config.family == "gpt2" else from_llama
    weights = {key: x.detach().clone().contiguous() for key, x in convert(theirs.state_dict(), config).items()}
    wanted = {key: shard.full for key, _, shard in named_shards(stage)}
    assert {key: tuple(x.shape) for key, x in weights.items()} == wanted
    place_parameters(stage, weights)
    return stage, theirs


def log_probs_of(stage: Stage, tokens: Tensor) -> Tensor:
    """`[B, T, V]`: `forward` gives that of one label, so each row comes V times, with every label."""
    rows = tokens.repeat_interleave(V, dim=0)
    labels = torch.arange(V).repeat(len(tokens))[:, None].expand_as(rows)
    positions = torch.arange(T).expand_as(rows)
    found = stage(None, {"tokens": rows, "labels": labels, "positions": positions})["log_prob"]
    return found.unflatten(0, (len(tokens), V)).movedim(1, 2)


def error_of(stage: Stage, theirs: transformers.PreTrainedModel) -> float:
    """max|a - b| / max|b| of the log-probabilities of every token at every place."""
    tokens = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        with wide(theirs.dtype):
            expected = theirs(tokens).logits.log_softmax(-1)
        ours = log_probs_of(stage, tokens)
    return float((ours - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", FAMILIES)
def test_log_probabilities_equal_those_of_transformers(name, dtype):
    assert error_of(*pair_of(name, dtype)) <= TOLERANCES[dtype]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"norm_eps": 1e-3}),
        ("llama", {"rope_theta": 9000.0}),
        ("mistral-window", {"sliding_window": 6}),
        ("mistral-window", {"sliding_window": None}),
        ("qwen2", {"num_heads": 12, "num_kv_heads": 4}),
        ("gpt2", {"activation": "gelu"}),
    ],
)
def test_a_wrong_switch_is_noticed(name, changes):
    """Negative controls: each switch that the comparison rests on, turned, fails it."""
    assert error_of(*pair_of(name, torch.float64, **changes)) > 100 * TOLERANCES[torch.float64]
