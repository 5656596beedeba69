"""Families whose layers differ, with caps, scales and other norms, beside transformers: logits at lengths past every
window and old context, every bit through tp=2 x pp=2, two training steps at every kind of layout, greedy generation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megallm.convert import convert, families, listing, verify
from megallm.convert.convert import ConvertRequest
from megallm.convert.hf_config import parse_config, write_config
from megallm.convert.weights import HfReader
from megallm.engine.config import EngineConfig
from megallm.inference.answer import Answer, Ending
from megallm.inference.samples import Request
from megallm.inference.sampling import Sampling
from megallm.losses.language import NextToken
from megallm.models.compute import ComputeConfig
from megallm.models.config import ModelConfig
from megallm.models.presets import PRESETS
from megallm.optim.config import OptimConfig
from megallm.parallel.config import LayoutConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.training.weights import read_weights
from tests.convert.families import LAYERED
from tests.convert.published import PUBLISHED
from tests.convert.test_convert_parity import assert_same_bits, save_at_layout
from tests.convert.tiny import Case, make
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
TOKENS, NEW, RATE = 24, 6, 0.01
OWN_HEAD = [one for one in LAYERED if "Classification" not in one.auto and one.auto != "AutoModel"]
# One of each family: the first.
FAMILIES = list({one.config: one for one in reversed(OWN_HEAD)}.values())[::-1]
DECODERS = [one for one in FAMILIES if one.auto == "AutoModelForCausalLM"]
GREEDY = Sampling(max_new_tokens=NEW, temperature=0.0)


@pytest.mark.parametrize("wanted", LAYERED, ids=lambda one: one.name)
def test_logits_and_round_trip(wanted, tmp_path):
    original = make(tmp_path / "hf", wanted)
    done = convert.run(ConvertRequest("megallm", str(original), str(tmp_path / "ours"), verify=True))
    assert done["max_rel_error"] == done["max_rel_error_everywhere"] <= 1e-5
    assert done["left_out"] == 0 and not done["notes"][1:]
    done = convert.run(ConvertRequest("hf", str(tmp_path / "ours"), str(tmp_path / "back"), verify=True))
    assert done["max_rel_error"] <= 1e-5
    assert_same_bits(original, tmp_path / "back")


@pytest.mark.parametrize("wanted", FAMILIES, ids=lambda one: one.name)
def test_through_ranks_bit_for_bit(wanted, tmp_path):
    original = make(tmp_path / "hf", wanted, shard="12KB")
    run_ranks(4, save_at_layout, str(original), str(tmp_path / "run/checkpoints"), Layout(tp=2, pp=2), "fp32")
    convert.run(ConvertRequest("hf", str(tmp_path / "run"), str(tmp_path / "back")))
    assert_same_bits(original, tmp_path / "back")


def batch_of(vocab: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(6)
    text = torch.randint(2, vocab, (2, TOKENS + 1), generator=draw)
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "positions": torch.arange(TOKENS).expand(2, TOKENS).contiguous(),
        "mask": torch.ones(2, TOKENS, dtype=torch.bool),
    }


def train_on_ranks(folder: str, layouts: list[LayoutConfig], prompts: list[list[int]]) -> list:
    """On a rank: losses and gradient norms of two steps at each layout of two ranks, and what is generated at the first
    one before them."""
    found = []
    for place, layout in enumerate(layouts):
        sizes = Layout(**{name: getattr(layout, name) or 1 for name in ("dp", "tp", "pp", "cp", "ep")})
        mesh = Mesh.start(sizes)
        with HfReader(folder) as reader:
            moe = dataclasses.replace(reader.model.moe, aux_coef=0.0, bias_rate=0.0)
            model = dataclasses.replace(reader.model, moe=moe)
            optim = OptimConfig(lr=RATE, weight_decay=0.0, clip=1.0, betas=(0.9, 0.95), eps=1e-8)
            config = EngineConfig(model, layout, optim=optim, compute=ComputeConfig("fp32"))
            engine = read_weights(config, mesh, reader)
        if place == 0 and prompts:
            requests = [Request(n, list(p), Answer(Ending(NEW, frozenset()))) for n, p in enumerate(prompts)]
            with engine.generator(4) as generator:
                generator.generate(requests, GREEDY)
            found.append([request.answer.tokens for request in requests])
        batch = batch_of(model.vocab_size)
        if layout.dp == 2:
            batch = {name: x[mesh.coords["dp"] :][:1].contiguous() for name, x in batch.items()}
        steps = [engine.train_step([batch], NextToken(), RATE) for _ in range(2)]
        found.append([(next(iter(s.losses.values())), s.grad_norm) for s in steps])
    return found


def trained(folder: Path, wanted: Case) -> list[tuple[float, float]]:
    """The same two steps of transformers and torch."""
    theirs = theirs_of(folder, wanted)
    theirs.requires_grad_(True)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("e_score_correction_bias" not in name)
    mine = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(mine, lr=RATE, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)
    batch, found = batch_of(theirs.config.vocab_size), []
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(theirs(input_ids=batch["tokens"]).logits.flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(mine, 1.0)
        optimizer.step()
        found.append((loss.item(), norm.item()))
    return found


def theirs_of(folder: Path, wanted: Case):
    head = "lm" if wanted.auto == "AutoModelForCausalLM" else "mlm"
    padding = 1 if "Roberta" in wanted.config else None
    return verify.load_transformers(folder, head, padding=padding)


@torch.no_grad()
def continued(folder: Path, wanted: Case, prompts: list[list[int]]) -> list[list[int]]:
    """Greedily, each token from a whole pass without a cache."""
    theirs, found = theirs_of(folder, wanted), []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(NEW):
            text.append(int(theirs(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
        found.append(text[len(prompt) :])
    return found


@pytest.mark.parametrize("wanted", FAMILIES, ids=lambda one: one.name)
def test_training_and_greedy_generation_beside_transformers(wanted, tmp_path):
    """tp=2, pp=2, a ring, Ulysses, and experts over ep=2; generation with the cache over tp=2."""
    original = make(tmp_path / "hf", wanted)
    with HfReader(original) as reader:
        experts, heads = reader.model.moe.num_experts, reader.model.num_heads
    assert heads % 2 == 0
    layouts = [LayoutConfig(tp=2, sp=True), LayoutConfig(pp=2), LayoutConfig(cp=2)]
    layouts += [LayoutConfig(dp=2, ep=2)] if experts else [LayoutConfig(cp=2, cp_kind="ulysses")]
    draw = torch.Generator().manual_seed(9)
    lengths = (17, 21, 19) if "longrope" in wanted.name else (3, 20, 9)
    prompts = [torch.randint(2, 61, (n,), generator=draw).tolist() for n in lengths] if wanted in DECODERS else []
    found, *others = run_ranks(2, train_on_ranks, str(original), layouts, prompts)
    assert all(other == found for other in others)
    if prompts:
        assert found.pop(0) == continued(original, wanted, prompts)
    for layout, steps in zip(layouts, found, strict=True):
        for (loss, norm), (their_loss, their_norm) in zip(steps, trained(original, wanted), strict=True):
            assert loss == pytest.approx(their_loss, rel=1e-4), layout
            assert norm == pytest.approx(their_norm, rel=1e-4), layout


# What each mechanism is good for: without it the logits are others, so none of the tests above passes by chance.
WITHOUT = {
    "gemma2": ("attention_cap", "logit_cap", "embedding_scale", "attention_scale", "layer_pattern"),
    "gemma3": ("window_rope_theta", "layer_pattern", "rope_scaling"),
    "gpt-oss": ("layer_pattern", "rope_scaling"),
    "smollm3-window": ("layer_pattern",),
    "olmo3": ("window_rope_theta",),
    "phi3-longrope": ("rope_scaling",),
    "granite": ("embedding_scale", "residual_scale", "attention_scale", "logits_scaling"),
    "gpt-neox": ("parallel_residual",),
    "modernbert": ("layer_pattern", "window_rope_theta"),
    "roberta": ("position_offset",),
}
FURTHER = {"rope_scaling": ("rope_factor", "rope_positions", "rope_beta_fast", "rope_beta_slow", "rope_truncate",
                            "rope_short_factors", "rope_long_factors")}  # fmt: skip
OFF = {"parallel_residual": False, "layer_pattern": "w", "position_offset": 0}


@pytest.mark.parametrize("name", WITHOUT)
def test_without_a_mechanism_the_logits_are_others(name, tmp_path):
    wanted = next(one for one in LAYERED if one.name == name)
    with HfReader(make(tmp_path / "hf", wanted)) as reader:
        tokens = verify.sample_tokens(reader.model)
        logits = verify.our_logits(reader.model, reader, tokens)
        for field in WITHOUT[name]:
            off = {field: OFF.get(field)} | dict.fromkeys(FURTHER.get(field, ()))
            other = dataclasses.replace(reader.model, **off)
            difference = (verify.our_logits(other, reader, tokens) - logits).abs().max()
            assert difference > 1e-3 * logits.abs().max(), field


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_the_presets(name):
    """Keys and values as the published folders have them: all are understood, and the sizes are those of the preset."""
    found = parse_config(PUBLISHED[name], "config.json")
    preset = ModelConfig(preset=name).resolve()
    free = {"preset", "init_std", "mtp"}
    different = {
        field.name: (getattr(found.model, field.name), getattr(preset, field.name))
        for field in dataclasses.fields(preset)
        if field.name not in free and getattr(found.model, field.name) != getattr(preset, field.name)
    }
    assert not different and not found.notes
    assert parse_config(write_config(found.model, "bfloat16", {}), "again").model == found.model


def test_every_family_has_a_preset_and_the_page_is_up_to_date():
    described = {preset["family"] for preset in PRESETS.values()}
    assert set(families.FAMILIES) <= described | {"xlm-roberta"}
    assert (ROOT / "docs/models.md").read_text() == listing.page(), "megallm convert --list > docs/models.md"
