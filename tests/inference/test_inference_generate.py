"""Cached decoding at any layout chooses what whole forward passes of the oracle's reference choose, token for token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.checkpoint import store
from megallm.checkpoint.reader import Reader
from megallm.engine.config import EngineConfig
from megallm.engine.engine import Engine
from megallm.engine.model import ParallelModel
from megallm.inference.generator import Completion, Generator
from megallm.inference.sampling import Sampling, choose
from megallm.models import attention
from megallm.models.config import ModelConfig
from megallm.oracle import reference
from megallm.oracle.table import MODELS, TINY
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from tests.ranks import run_ranks

LAYOUTS = (Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2))
PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [17], [53, 58, 9, 7, 9, 3])
NEW = 12


def model_of(name: str) -> ModelConfig:
    """A tiny model whose logits are far enough apart for a greedy choice that rounding cannot turn."""
    return ModelConfig(**(TINY | MODELS[name])).resolve()


def checkpoint_of(name: str, folder: Path) -> str:
    engine = Engine.build(EngineConfig(model=model_of(name), precision="fp64", seed=9), Mesh.single())
    meta = {"engine": engine.counters()}
    return str(store.save(folder, 1, list(engine.parts()), meta, Mesh.single()))


def generate_at(name: str, step: str, layout: Layout, sampling: Sampling, sp: bool = False) -> list[Completion]:
    """The completions of all prompts on this rank."""
    mesh = Mesh.single() if layout.world == 1 else Mesh.start(layout)
    with Reader(step) as reader:
        model = ParallelModel.load(EngineConfig(model=model_of(name), precision="fp64", sp=sp), mesh, reader)
    generator = Generator(model)
    return [generator.generate(prompt, sampling, request=number) for number, prompt in enumerate(PROMPTS)]


def naive(name: str, step: str, sampling: Sampling) -> list[Completion]:
    """The whole text through the reference for every new token."""
    with Reader(step) as reader:
        weights: dict[str, Tensor] = {
            name: reader.read(name) for name in reader.names() if not name.startswith("optim.")
        }
    found = []
    for number, prompt in enumerate(PROMPTS):
        text, completion = list(prompt), Completion()
        for _ in range(sampling.max_new_tokens):
            tokens = torch.tensor([text])
            logits = reference.forward(vars(model_of(name)), weights, tokens, torch.arange(len(text))[None])[0, -1]
            token, log_prob = choose(logits, sampling, number, len(text))
            completion.tokens.append(token)
            completion.log_probs.append(log_prob)
            text.append(token)
        found.append(completion)
    return found


def same(ours: list[Completion], theirs: list[Completion]) -> bool:
    return [c.tokens for c in ours] == [c.tokens for c in theirs] and all(
        torch.allclose(torch.tensor(a.log_probs), torch.tensor(b.log_probs), rtol=1e-9, atol=1e-9)
        for a, b in zip(ours, theirs, strict=True)
    )


SAMPLINGS = {
    "greedy": Sampling(NEW, temperature=0.0),
    "sampled": Sampling(NEW, temperature=1.3, top_k=20, top_p=0.9, seed=4),
}


@pytest.mark.parametrize("name", ["llama", "mistral", "three-groups", "gpt2", "qwen3", "one-kv"])
def test_decoding_equals_whole_forward_passes_at_every_layout(name, tmp_path):
    step = checkpoint_of(name, tmp_path)
    for sampling in SAMPLINGS.values():
        wanted = naive(name, step, sampling)
        assert len({token for completion in wanted for token in completion.tokens}) > 3, "not one token for ever"
        for layout in LAYOUTS if name in ("llama", "three-groups") else (Layout(), Layout(tp=2, pp=2)):
            for completions in ranks_at(name, step, layout, sampling):
                assert same(completions, wanted), layout


def ranks_at(name: str, step: str, layout: Layout, sampling: Sampling) -> list[list[Completion]]:
    if layout.world == 1:
        return [generate_at(name, step, layout, sampling)]
    return run_ranks(layout.world, generate_at, name, step, layout, sampling, layout.tp > 1)


def forgetful(self: attention.LayerCache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A cache that loses the first position."""
    keys, values = remember(self, k, v)
    return (keys[:, 1:], values[:, 1:]) if keys.shape[1] > 3 else (keys, values)


remember = attention.LayerCache.append


def test_a_cache_that_loses_a_position_is_noticed(tmp_path, monkeypatch):
    step = checkpoint_of("llama", tmp_path)
    wanted = naive("llama", step, SAMPLINGS["greedy"])
    monkeypatch.setattr(attention.LayerCache, "append", forgetful)
    assert not same(generate_at("llama", step, Layout(), SAMPLINGS["greedy"]), wanted)


def test_samples_depend_on_seed_and_request_and_on_nothing_else(tmp_path):
    step = checkpoint_of("llama", tmp_path)
    sampled = SAMPLINGS["sampled"]
    first = generate_at("llama", step, Layout(), sampled)
    assert same(generate_at("llama", step, Layout(), sampled), first)
    assert not same(generate_at("llama", step, Layout(), replace(sampled, seed=5)), first)
    with Reader(step) as reader:
        model = ParallelModel.load(EngineConfig(model=model_of("llama"), precision="fp64"), Mesh.single(), reader)
    alone = Generator(model).generate(PROMPTS[1], sampled, request=1)
    assert alone.tokens == first[1].tokens, "whatever was generated before"
    assert Generator(model).generate(PROMPTS[1], sampled, request=2).tokens != first[1].tokens


def test_stop_tokens_and_limits(tmp_path):
    step = checkpoint_of("gpt2", tmp_path)
    greedy = generate_at("gpt2", step, Layout(), SAMPLINGS["greedy"])[0]
    with Reader(step) as reader:
        model = ParallelModel.load(EngineConfig(model=model_of("gpt2"), precision="fp64"), Mesh.single(), reader)
    stop = greedy.tokens[3]
    stopped = Generator(model).generate(PROMPTS[0], SAMPLINGS["greedy"], stop=stop)
    assert stopped.tokens == greedy.tokens[: greedy.tokens.index(stop) + 1]
    with pytest.raises(UsageError, match="need 41 positions; this model learned 40"):
        Generator(model).generate(PROMPTS[0], Sampling(33, temperature=0.0))
    with pytest.raises(UsageError, match="no tokens"):
        Generator(model).generate([], SAMPLINGS["greedy"])
