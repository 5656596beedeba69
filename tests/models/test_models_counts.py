"""The closed forms of the configuration equal what is counted on the built model."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megallm.models.build import initial_values, place_parameters
from megallm.models.config import ModelConfig
from megallm.models.decoder import Stage
from megallm.models.presets import PRESETS
from megallm.models.stages import StageSpan, plan_stages
from megallm.ops import attention, native
from megallm.parallel.config import LayoutConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import named_shards

TINY = ModelConfig(
    family="llama", num_layers=2, hidden_size=24, ffn_hidden_size=40, num_heads=4, num_kv_heads=2, vocab_size=57,
    max_positions=32,
)  # fmt: skip

LATENT = {"kv_lora_dim": 10, "q_lora_dim": 9, "nope_head_size": 5, "rope_head_size": 4, "value_head_size": 7}

# What the authors' own model cards and papers say, in millions.
PUBLISHED = {
    "gpt2": 124.4, "gpt2-xl": 1557.6, "llama2-7b": 6738.4, "llama2-70b": 68976.6, "llama3-8b": 8030.3,
    "qwen2-0.5b": 494.0, "qwen2.5-7b": 7615.6, "qwen3-0.6b": 596.0, "qwen3-8b": 8190.7, "mistral-7b": 7241.7,
    "phi-4": 14659.5, "mixtral-8x7b": 46702.8, "qwen1.5-moe-a2.7b": 14315.8, "qwen3-30b-a3b": 30532.1,
    "olmoe-1b-7b": 6919.2, "gemma2-2b": 2614.3, "gemma2-9b": 9241.7, "gemma2-27b": 27227.1, "gemma3-270m": 268.1,
    "gemma3-1b": 999.9, "gpt-oss-20b": 20914.8, "gpt-oss-120b": 116829.2, "smollm3-3b": 3075.1, "olmo2-1b": 1484.9,
    "olmo2-7b": 7298.6, "olmo2-13b": 13716.2, "olmo2-32b": 32234.3, "granite3-2b": 2533.5, "granite3-8b": 8170.8,
    "seed-oss-36b": 36151.1, "ernie-4.5-0.3b": 360.7, "starcoder2-3b": 3030.4, "starcoder2-7b": 7173.9,
    "starcoder2-15b": 15957.9, "pythia-70m": 70.4, "pythia-160m": 162.3, "pythia-410m": 405.3, "pythia-1b": 1011.8,
    "pythia-1.4b": 1414.6, "pythia-2.8b": 2775.2, "pythia-6.9b": 6857.3, "pythia-12b": 11846.1,
    "gpt-neox-20b": 20554.6, "deepseek-v2-lite": 15706.5, "modernbert-base": 149.7, "roberta-base": 124.7,
    "roberta-large": 355.4,
}  # fmt: skip


def whole_model(config: ModelConfig) -> Stage:
    """One stage that is first and last, on the meta device."""
    return Stage(config, Mesh.single(), StageSpan(0, config.num_layers, True, True))


def built(config: ModelConfig) -> Stage:
    """The whole model with its initial weights in float64."""
    stage = whole_model(config)
    shards = {name: shard for name, _, shard in named_shards(stage)}
    place_parameters(stage, {k: initial_values(k, s, (0,) * len(s.full), s.full, 0) for k, s in shards.items()})
    return stage


def batch_of(rows: int, tokens: int, vocab: int = 57) -> dict[str, torch.Tensor]:
    """Tokens, with labels that two classes have too."""
    draw = torch.Generator().manual_seed(4)
    return {
        "tokens": torch.randint(vocab, (rows, tokens), generator=draw),
        "labels": torch.randint(2, (rows, tokens), generator=draw),
        "positions": torch.arange(tokens).expand(rows, tokens),
    }


def counted_flops(config: ModelConfig, tokens: int, rows: int = 2) -> float:
    """A token's, forward and backward of one batch, with attention as plain matrix products so that each is seen."""
    stage, batch = built(config).float(), batch_of(rows, tokens)
    kernels = native.use_kernels("reference")  # the counter sees torch's operations only
    assert kernels == "reference"
    try:
        return _counted(stage, batch) / (rows * tokens)
    finally:
        native.use_kernels("auto")


def _counted(stage: Stage, batch: dict[str, torch.Tensor]) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sum(found.sum() for found in stage(None, batch).values()).backward()
    return counter.get_total_flops()


def built_count(config: ModelConfig) -> int:
    """Parameters of the model on the meta device; a tied matrix is there once."""
    stage = whole_model(config)
    assert all(parameter.device.type == "meta" for parameter in stage.parameters())
    return sum(parameter.numel() for parameter in stage.parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    config = ModelConfig(preset=preset).resolve()
    assert config.num_params() == built_count(config)
    if preset in PUBLISHED:
        assert config.num_params() / 1e6 == pytest.approx(PUBLISHED[preset], abs=0.06)


def test_every_combination_of_switches():
    switches = {
        "tie_embeddings": (False, True),
        "norm": ("rmsnorm", "layernorm"),
        "activation": ("swiglu", "gelu"),
        "positions": ("rope", "learned"),
        "qkv_bias": (None, True),
        "bias": (False, True),
        "qk_norm": (False, True),
        "head_size": (None, 10),
        "num_kv_heads": (1, 4),
    }
    seen = set()
    for values in product(*switches.values()):
        config = replace(TINY, **dict(zip(switches, values, strict=True))).resolve()
        assert config.num_params() == built_count(config), values
        seen.add(config.num_params())
    assert len(seen) > 100, "the switches change the number of parameters"


def test_values_beside_the_head():
    plain = replace(TINY, critic=None).resolve()
    for critic, outputs in (("value", 1), ("q", 1 + 2 * plain.vocab_size)):
        config = replace(plain, critic=critic).resolve()
        assert config.num_params() == built_count(config) == plain.num_params() + outputs * plain.hidden_size


def test_every_combination_of_latents_further_tokens_and_sinks():
    seen = set()
    for mla, kind, depth, sinks, tie in product(
        (0, 9, None), ("deepseek", "heads"), (0, 1, 2), (False, True), (False, True)
    ):
        sizes = {} if mla is None else {"mla": LATENT | {"q_lora_dim": mla}, "num_kv_heads": None}
        further = {"mtp": {"depth": depth, "kind": kind}, "attention_sinks": sinks, "tie_embeddings": tie}
        config = replace(TINY, **(sizes | further), norm="layernorm" if sinks else "rmsnorm").resolve()
        assert config.num_params() == built_count(config), (mla, further)
        seen.add(config.num_params())
    assert len(seen) == 3 * 5 * 2 * 2, "each switch changes the number of parameters"


PARTS = {
    "replicated and tied parts": {"num_kv_heads": 1, "tie_embeddings": True, "qk_norm": True, "bias": True},
    "latents, an embedding at both ends": {
        "mla": LATENT, "num_kv_heads": None, "mtp": {"depth": 2}, "attention_sinks": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("parts", PARTS)
def test_the_pieces_of_a_layout_add_up_to_the_model(parts):
    """Owned elements over all ranks = the closed form."""
    config = replace(TINY, **PARTS[parts]).resolve()
    layout = Layout(pp=2, dp=2, tp=4)
    total = 0
    for rank in range(layout.world):
        mesh = mesh_on_paper(layout, rank)
        span = plan_stages(config.num_layers, layout.pp)[mesh.pp.rank]
        for name, parameter, shard in named_shards(Stage(config, mesh, span, LayoutConfig(sp=True))):
            first = name != "embedding.weight" or mesh.coords["pp"] == 0
            total += parameter.numel() * shard.owned(mesh.coords, first)
    assert total == config.num_params()


def mesh_on_paper(layout: Layout, rank: int) -> Mesh:
    """A mesh without processes, to build stages on the meta device."""
    from megallm.parallel.layout import PURPOSES
    from megallm.parallel.mesh import Axis

    axes = {}
    for purpose in PURPOSES:
        ranks = layout.ranks(purpose, of=rank)
        axes[purpose] = Axis(purpose, ranks.index(rank), len(ranks), ranks)
    return Mesh(layout, rank, torch.device("cpu"), axes)


FLOP_CONFIGS = {
    "llama": {},
    "gpt2": {"family": "gpt2", "num_kv_heads": 4},
    "one kv head, another head size": {"num_kv_heads": 1, "head_size": 10},
    "tied": {"tie_embeddings": True, "qk_norm": True},
    "latent": {"mla": LATENT, "num_kv_heads": None},
    "latent, direct queries": {"mla": LATENT | {"q_lora_dim": 0}, "num_kv_heads": None},
    "further tokens": {"mtp": {"depth": 2}},
    "further tokens by heads": {"mtp": {"depth": 3, "kind": "heads"}, "tie_embeddings": True},
    "norms of the output, geglu": {"norm_place": "both", "activation": "geglu_tanh", "norm": "rmsnorm_unit"},
    "parallel, partly rotated": {"parallel_residual": True, "rope_fraction": 0.5, "norm": "layernorm", "bias": True},
    "a soft cap of logits": {"logit_cap": 5.0, "qkv_bias": True, "o_bias": True},
    "latent, further": {"mtp": {"depth": 1}, "mla": LATENT, "num_kv_heads": None},
}


@pytest.mark.parametrize("name", FLOP_CONFIGS)
def test_flops_equal_counted_ones(name, monkeypatch):
    monkeypatch.setattr(attention, "_widened", lambda x, q: x)  # zeros that a fast kernel wants are no work of ours
    config = replace(TINY, **FLOP_CONFIGS[name]).resolve()
    assert counted_flops(config, 16) == config.num_flops(16)


def test_layers_with_and_without_a_window_are_counted_each():
    whole, window, mixed = (
        replace(TINY, num_layers=4, sliding_window=window, layer_pattern=pattern).resolve()
        for window, pattern in ((None, None), (8, None), (8, "wffw"))
    )
    for causal in (False, True):
        counts = [config.num_flops(64, causal) for config in (whole, window, mixed)]
        assert counts[1] < counts[2] < counts[0] and 2 * counts[2] == counts[0] + counts[1]
    experts = {"num_experts": 4, "bias": True, "router_bias": True, "ffn_hidden_size": 9}
    for norm, place, bias in product(("rmsnorm_unit", "layernorm_unbiased"), ("pre", "output", "both"), (False, True)):
        moe = {"moe": experts} if bias else {}
        more = {"norm": norm, "norm_place": place, "o_bias": bias, "first_norm": place != "pre", "qk_norm": bias}
        config = replace(TINY, **more, **moe).resolve()
        assert config.num_params() == built_count(config), more


def test_causal_flops_count_the_triangle():
    config = TINY.resolve()
    for tokens in (8, 32):
        whole, half = config.num_flops(tokens), config.num_flops(tokens, causal=True)
        matrices = config.num_flops(0)
        assert half - matrices == (whole - matrices) // 2
    window = replace(TINY, sliding_window=8).resolve()
    pairs = sum(min(i + 1, 8) for i in range(4096))  # what query i sees
    exact = pairs / 4096 * 12 * window.num_heads * window.head_size * window.num_layers
    assert window.num_flops(4096, causal=True) - window.num_flops(0) == pytest.approx(exact, rel=2e-3)
