"""Latent attention equals that of transformers, and its cache of latents gives what whole sequences give."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.inference.answer import Answer, Ending
from megallm.inference.generator import Generator
from megallm.inference.samples import Request
from megallm.inference.sampling import Sampling
from megallm.models import mla
from megallm.models.build import initial_values, place_parameters
from megallm.models.config import ModelConfig
from megallm.models.decoder import Stage
from megallm.models.stages import StageSpan
from megallm.oracle import reference
from megallm.parallel import context
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import named_shards
from tests.engine.tiny import engine_of, state_of
from tests.ranks import run_ranks

SIZES = {"kv_lora_dim": 12, "q_lora_dim": 10, "nope_head_size": 6, "rope_head_size": 8, "value_head_size": 10}
YARN = {
    "rope_scaling": "yarn",
    "rope_factor": 4.0,
    "rope_positions": 16,
    "rope_mscale": 1.0,
    "rope_mscale_all_dim": 1.0,
}
TINY = ModelConfig(
    num_layers=3, hidden_size=24, ffn_hidden_size=40, num_heads=4, vocab_size=61, norm_eps=1e-6, init_std=0.3, mla=SIZES
)
MODELS = {
    "latent queries": TINY,
    "direct queries, sinks": dataclasses.replace(TINY, mla=SIZES | {"q_lora_dim": 0}, attention_sinks=True),
    "yarn, window": dataclasses.replace(TINY, **YARN, sliding_window=7),
}
PROMPTS = [[5], list(range(20, 29)), [7, 7, 3, 60, 0], list(range(30, 43))]


# Against transformers


def neighbours_to_halves(rows: Tensor) -> Tensor:
    """Rows `[R, ...]` of rotated features that are paired as neighbours -> paired in halves."""
    return torch.cat((rows[0::2], rows[1::2]))


def latent_weights(theirs: dict[str, Tensor], sizes: dict[str, int], heads: int) -> dict[str, Tensor]:
    """What a conversion has to do to one layer's attention: split what is fused, reorder rotated rows."""
    n, r, e, c = (sizes[k] for k in ("nope_head_size", "rope_head_size", "value_head_size", "kv_lora_dim"))
    state = {name.removesuffix(".weight"): value for name, value in theirs.items()}
    q = state["q_b_proj" if sizes["q_lora_dim"] else "q_proj"].unflatten(0, (heads, n + r))
    q = torch.cat((q[:, :n], torch.stack([neighbours_to_halves(head) for head in q[:, n:]])), 1).flatten(0, 1)
    up = state["kv_b_proj"].unflatten(0, (heads, n + e))
    down = state["kv_a_proj_with_mqa"]
    ours = {
        "q.weight": q, "kv_down.weight": down[:c], "k_rope.weight": neighbours_to_halves(down[c:]),
        "kv_latent_norm.weight": state["kv_a_layernorm"], "k_up.weight": up[:, :n].flatten(0, 1),
        "v_up.weight": up[:, n:].flatten(0, 1), "o.weight": state["o_proj"],
    }  # fmt: skip
    if sizes["q_lora_dim"]:
        ours |= {"q_down.weight": state["q_a_proj"], "q_latent_norm.weight": state["q_a_layernorm"]}
    return ours


@pytest.mark.parametrize("queries", [10, 0])
@pytest.mark.parametrize("stretch", [{}, YARN])
def test_attention_equals_that_of_transformers(queries: int, stretch: dict) -> None:
    module = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    sizes = SIZES | {"q_lora_dim": queries}
    config = dataclasses.replace(TINY, mla=sizes, **stretch).resolve()
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if stretch:
        rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0,
                 "mscale_all_dim": 1.0}  # fmt: skip
    made = module.DeepseekV3Config(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=queries or None, kv_lora_rank=12,
        qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=10, rope_parameters=rope, max_position_embeddings=64,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(3)
    theirs, rotary = module.DeepseekV3Attention(made, 0), module.DeepseekV3RotaryEmbedding(made)
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, mean=0.1, std=0.4)
    stage = Stage(config, Mesh.single(), StageSpan(0, 1, True, True))
    ours = stage.layers["0"].attention
    place_parameters(ours, latent_weights(theirs.state_dict(), sizes, 4))
    x, places = torch.randn(2, 11, 24), torch.arange(11).expand(2, 11)
    mask = torch.full((11, 11), -torch.inf).triu(1)[None, None]
    want = theirs(x, rotary(x, places), mask)[0]
    got = ours(x, stage.attention_inputs(places, torch.float32))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert (ours(x, stage.attention_inputs(2 * places, torch.float32)) - want).abs().max() > 1e-2 * want.abs().max()


# Decoding


def continue_all(name: str, layout: Layout, batch: int = 4, count: int = 6) -> list[list[int]]:
    """On a rank: greedy continuations in float64."""
    model = engine_of(Mesh.start(layout), model=MODELS[name].resolve(), seed=1).model
    requests = [Request(i, list(prompt), Answer(Ending(count, frozenset()))) for i, prompt in enumerate(PROMPTS)]
    Generator(model, batch).generate(requests, Sampling(max_new_tokens=count, temperature=0.0))
    return [request.answer.tokens for request in requests]


def by_the_referee(name: str, count: int = 6) -> list[list[int]]:
    """The same by whole sequences in ordinary torch, without a cache."""
    config = MODELS[name].resolve()
    weights = state_of(engine_of(model=config, seed=1))
    found = []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(count):
            tokens = torch.tensor([text])
            logits = reference.forward(dataclasses.asdict(config), weights, tokens, torch.arange(len(text))[None])
            text.append(int(logits[0, -1].argmax()))
        found.append(text[len(prompt) :])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_decoding_from_latents_equals_whole_sequences(name: str) -> None:
    want = by_the_referee(name)
    assert continue_all(name, Layout()) == want
    assert len({token for tokens in want for token in tokens}) > 8
    for layout in (Layout(tp=2), Layout(tp=2, pp=2)):
        assert all(found == want for found in run_ranks(layout.world, continue_all, name, layout, 3))


def test_the_cache_keeps_latents_only() -> None:
    stage = Stage(TINY.resolve(), Mesh.single(), StageSpan(0, 3, True, True))
    assert [math.prod(k) + math.prod(v) for k, v in (b.attention.cache_shape for b in stage.layers.values())] == [
        20
    ] * 3


def test_the_scale_of_absorbed_scores_is_that_of_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: scores scaled by the size of the latent change the text."""
    real = mla.LatentAttention.absorbed

    def scaled_by_latent(self, plain, rotated, seen, cache):
        wrong = ((self.plain + self.rotated) / (self.latent_size + self.rotated)) ** 0.5
        return real(self, plain * wrong, rotated * wrong, seen, cache)

    want = by_the_referee("latent queries")
    monkeypatch.setattr(mla.LatentAttention, "absorbed", scaled_by_latent)
    assert continue_all("latent queries", Layout()) != want


# Over context-parallel ranks


def numbers_sent(kind: str) -> list[int]:
    """On a rank: the sizes of the messages of one row's attention, forward and backward, in numbers."""
    sent, real = [], context.pass_on

    def counting(x, axis, tag):
        sent.append(x.numel())
        return real(x, axis, tag)

    mesh = Mesh.start(Layout(cp=2))
    config = dataclasses.replace(TINY, mla=SIZES if kind == "latent" else {}).resolve()
    stage = Stage(config, mesh, StageSpan(0, 1, True, True))
    shards = {name: shard for name, _, shard in named_shards(stage)}
    place_parameters(stage, {n: initial_values(n, s, (0,) * len(s.full), s.full, 1) for n, s in shards.items()})
    tokens = torch.arange(12)[None]
    batch = {"tokens": tokens, "labels": tokens, "positions": tokens}
    context.pass_on = counting
    try:
        stage(None, batch)["log_prob"].sum().backward()
    finally:
        context.pass_on = real
    return sent


def test_latents_travel_in_place_of_keys_and_values() -> None:
    per_token = SIZES["kv_lora_dim"] + SIZES["rope_head_size"]
    # keys forward; keys again, and gradients of both ranks' keys, backward
    assert run_ranks(2, numbers_sent, "latent") == [[6 * per_token] * 4] * 2
    assert run_ranks(2, numbers_sent, "ordinary") == [[6 * 2 * 4 * 6] * 4] * 2


# Refusals


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"head_size": 8}, "model.head_size is 8, but latent attention .* makes it 14"),
        ({"num_kv_heads": 2}, "model.num_kv_heads is 2, but latent attention .* makes it 4"),
        ({"mla": SIZES | {"rope_head_size": 5}}, "rope_head_size 5 must be even"),
        ({"positions": "learned"}, "model.positions must be rope"),
        ({"qk_norm": True}, "has no model.qk_norm"),
        ({"qkv_bias": True}, "has no model.qkv_bias"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        dataclasses.replace(TINY, **change).resolve()
