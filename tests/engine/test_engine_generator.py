"""Generation from a live engine: at any layout the tokens of one process, and the log-probabilities of the trainer."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from megallm.base.errors import CheckpointError, InternalError
from megallm.engine.engine import Engine
from megallm.inference.generator import Rollout
from megallm.inference.samples import Request
from megallm.inference.sampling import Sampling
from megallm.losses.language import NextToken
from megallm.models.config import ModelConfig
from megallm.optim.flat import FlatBucket
from megallm.optim.zero import ShardedParameters
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from tests.engine.tiny import batches, config_of, share
from tests.ranks import run_ranks

TINY: dict[str, Any] = {
    "family": "llama", "num_layers": 4, "hidden_size": 24, "ffn_hidden_size": 28, "num_heads": 4,
    "num_kv_heads": 2, "vocab_size": 61, "max_positions": 64, "init_std": 0.2,
}  # fmt: skip
MODELS = {
    "dense": TINY,
    "moe": TINY | {"moe": {"num_experts": 4, "ffn_hidden_size": 14, "shared_ffn_hidden_size": 10}},
    "window": TINY | {"sliding_window": 5, "attention_sinks": True},
    "mla": TINY | {"num_kv_heads": None, "mla": {"kv_lora_dim": 7, "q_lora_dim": 9, "nope_head_size": 3,
                                                 "rope_head_size": 4, "value_head_size": 5}},
}  # fmt: skip
# Two groups of three with one prompt each, and one alone; one prompt is longer than a block and a chunk.
LONG = [(7 * i) % 61 for i in range(21)]
PROMPTS = [[3, 1, 4], LONG, LONG, LONG, [5, 9, 2, 6], [5, 9, 2, 6], [5, 9, 2, 6]]
SAMPLING = Sampling(seed=3)
Option = dict[str, Any]
CASES: dict[str, tuple[Layout, str, Option]] = {
    "zero3": (Layout(dp=2), "dense", {"zero": 3}),
    "interleaved": (Layout(pp=2), "dense", {"schedule": "interleaved", "chunks": 2}),
    "zb-v-zero2": (Layout(pp=2, dp=2), "dense", {"schedule": "zb-v", "chunks": 2, "zero": 2}),
    "tp-pp-sp-zero1": (Layout(tp=2, pp=2), "window", {"sp": True, "zero": 1}),
    "experts-over-dp": (Layout(dp=2, ep=2), "moe", {"zero": 3}),
    "experts-over-tp-dp": (Layout(tp=2, dp=2, ep=4), "moe", {}),
    "experts-pp": (Layout(pp=2, dp=2, ep=2), "moe", {"schedule": "interleaved", "chunks": 2}),
    "cp": (Layout(cp=2), "mla", {}),
    "cp-dp-tp": (Layout(cp=2, tp=2), "dense", {"zero": 3}),
}


def requests() -> list[Request]:
    """Answers of 3 to 9 tokens, so that rows leave at different times."""
    return [Request.of(40 + n, prompt, 3 + n) for n, prompt in enumerate(PROMPTS)]


def rolled_out(layout: Layout, model: str, options: Option, generator: Option, skew: int = 0) -> list[list]:
    """Samples before and after an update, with the largest gap to the trainer's log-probabilities."""
    mesh = Mesh.start(layout) if layout.world > 1 else Mesh.single()
    engine = Engine.build(config_of(ModelConfig(**MODELS[model]).resolve(), **options), mesh)
    found = []
    for step in range(2):
        if step:
            engine.train_step(share(batches(4, tokens=16), mesh), NextToken(), 0.05)
        asked = requests()
        mine = engine.mine(asked)
        if skew and mesh.dp.size > 1:  # one data rank has all but one of the requests
            mine = asked[:-1] if mesh.dp.rank == 0 else asked[-1:]
        with engine.generator(**generator) as live:
            samples = live.generate(mine, SAMPLING)
        gap = max(gap_of(engine, sample) for sample in padded(samples, mesh))
        found.append([engine.all([vars(sample) for sample in samples]), gap])
    return found


def padded(samples: list, mesh: Mesh) -> list:
    """Equally many on each data rank, since the trainer's passes are collective."""
    most = mesh.largest(len(samples))
    return samples + [samples[0]] * (most - len(samples))


def gap_of(engine: Engine, sample) -> float:
    """Between what the generator said of a sample's tokens at temperature 1 and what the trainer says."""
    text = torch.tensor([[*sample.prompt, *sample.tokens]])
    count, size = text.shape[1] - 1, len(sample.tokens)
    missing = -count % 4  # cp and tp divide the row
    fields = {"tokens": text[:, :-1], "labels": text[:, 1:], "positions": torch.arange(count)[None]}
    batch = {name: torch.nn.functional.pad(x, (0, missing)) for name, x in fields.items()}
    batch["positions"] = torch.arange(count + missing)[None]
    batch["mask"] = torch.ones_like(batch["tokens"], dtype=torch.bool)
    theirs = engine.log_probs([batch])[0][0, :count][-size:]
    said = torch.tensor(sample.log_probs, dtype=torch.float64)
    return float((said - theirs.cpu()).abs().max())


@pytest.fixture(scope="module")
def alone() -> dict[str, list]:
    """One process, one sequence after the other, every prompt computed whole."""
    return {model: rolled_out(Layout(), model, {}, {"batch": 1}) for model in MODELS}


def check(found: list, expected: list) -> None:
    for version, ((ours, gap), (theirs, _)) in enumerate(zip(found, expected, strict=True)):
        assert gap < 1e-9
        for mine, other in zip(sorted(ours, key=lambda s: s["id"]), theirs, strict=True):
            assert (mine["tokens"], mine["reason"]) == (other["tokens"], "length")
            assert mine["log_probs"] == pytest.approx(other["log_probs"], abs=1e-9)
            assert mine["version"] == version


@pytest.mark.parametrize("case", CASES)
def test_samples_are_those_of_one_process(case, alone):
    layout, model, options = CASES[case]
    first = [sample["tokens"] for sample in alone[model][0][0]]
    assert first != [sample["tokens"] for sample in alone[model][1][0]], "the update changes the samples"
    for found in run_ranks(layout.world, rolled_out, layout, model, options, {"batch": 4, "chunk": 8}, 1):
        check(found, alone[model])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("generator", [{}, {"batch": 3, "chunk": 5}, {"batch": 7, "blocks": 4}], ids=str)
def test_neither_rows_nor_blocks_nor_chunks_change_a_sample(model, generator, alone):
    check(rolled_out(Layout(), model, {}, generator), alone[model])


# Negative controls


@contextmanager
def nothing_gathered(self):
    yield


def broken(layout: Layout, model: str, options: Option, what: str) -> str:
    """What happens when a part is left out: the error, or how the samples differ."""
    with pytest.MonkeyPatch.context() as patch:
        if what == "gather":
            patch.setattr(ShardedParameters, "gathered", nothing_gathered)
            patch.setattr(FlatBucket, "unshard", lambda self: None)
        else:
            patch.setattr(FlatBucket, "publish", lambda self: None)
        try:
            return json.dumps([pair[0] for pair in rolled_out(layout, model, options, {}, 1)])
        except (RuntimeError, CheckpointError, InternalError) as error:
            return type(error).__name__


@pytest.mark.parametrize("what", ["gather", "publish"])
def test_stale_weights_are_noticed(what, alone):
    """Weights that are not there, or those of before the update."""
    expected = json.dumps([pair[0] for pair in alone["dense"]])
    assert all(told != expected for told in run_ranks(2, broken, Layout(dp=2), "dense", {"zero": 3}, what))


def passes_of_the_first_step() -> int:
    """One data rank has six requests, the other one."""
    mesh = Mesh.start(Layout(dp=2, ep=2))
    engine = Engine.build(config_of(ModelConfig(**MODELS["moe"]).resolve()), mesh)
    asked = requests()
    with engine.generator() as live:
        mine = asked[:-1] if mesh.dp.rank == 0 else asked[-1:]
        return len(Rollout(live, mine, SAMPLING, None, None).groups[0].step().passes)


def test_ranks_of_an_expert_group_make_different_numbers_of_passes():
    """Why there is a vote: left to themselves the two ranks would make 3 passes and 1, and one would wait for ever."""
    assert run_ranks(2, passes_of_the_first_step) == [3, 1]
