"""Cached decoding at any layout chooses what whole forward passes of the oracle's reference choose, token for token."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from megallm.checkpoint import store
from megallm.checkpoint.reader import CheckpointReader
from megallm.engine.engine import Engine
from megallm.inference.answer import Answer, Ending
from megallm.inference.generator import Generator
from megallm.inference.samples import Request
from megallm.inference.sampling import Sampling, choose
from megallm.models.compute import ComputeConfig
from megallm.models.config import ModelConfig
from megallm.models.parallel_model import ParallelModel
from megallm.oracle import reference
from megallm.oracle.table import MODELS, TINY
from megallm.parallel.config import LayoutConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from tests.engine.tiny import config_of
from tests.ranks import run_ranks

LAYOUTS = (Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2))
PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [17], [53, 58, 9, 7, 9, 3])
NEW = 12


def model_of(name: str) -> ModelConfig:
    """A tiny model whose logits are far enough apart for a greedy choice that rounding cannot turn."""
    return ModelConfig(**(TINY | MODELS[name])).resolve()


def checkpoint_of(name: str, folder: Path) -> str:
    engine = Engine.build(config_of(model_of(name), seed=9), Mesh.single())
    meta = {"engine": engine.counters()}
    return str(store.save(folder, 1, list(engine.parts()), meta, Mesh.single()))


Completion = tuple[list[int], list[float]]  # tokens, log-probabilities


def generate_at(name: str, step: str, layout: Layout, sampling: Sampling, sp: bool = False) -> list[Completion]:
    """The completions of all prompts, two rows decoded together, on this rank."""
    mesh = Mesh.single() if layout.world == 1 else Mesh.start(layout)
    with CheckpointReader(step) as reader:
        model = ParallelModel(model_of(name), LayoutConfig(sp=sp), ComputeConfig("fp64"), mesh).load(reader)
    requests = [Request(number, list(prompt), Answer(Ending(NEW))) for number, prompt in enumerate(PROMPTS)]
    Generator(model, batch=2).generate(requests, sampling)
    return [(request.answer.tokens, request.answer.log_probs) for request in requests]


def naive(name: str, step: str, sampling: Sampling) -> list[Completion]:
    """The whole text through the reference for every new token."""
    with CheckpointReader(step) as reader:
        weights = {key: reader.read(key) for key in reader.names() if not key.startswith("optim.")}
    found = []
    for number, prompt in enumerate(PROMPTS):
        text, log_probs = list(prompt), []
        for _ in range(NEW):
            tokens = torch.tensor([text])
            logits = reference.forward(asdict(model_of(name)), weights, tokens, torch.arange(len(text))[None])[0, -1]
            token, log_prob = choose(logits, sampling, number, len(text))
            log_probs.append(log_prob)
            text.append(token)
        found.append((text[len(prompt) :], log_probs))
    return found


def same(ours: list[Completion], theirs: list[Completion]) -> bool:
    return all(
        tokens == their_tokens and log_probs == pytest.approx(their_log_probs, rel=1e-9, abs=1e-9)
        for (tokens, log_probs), (their_tokens, their_log_probs) in zip(ours, theirs, strict=True)
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
        assert len({token for tokens, _ in wanted for token in tokens}) > 3, "not one token for ever"
        for layout in LAYOUTS if name in ("llama", "three-groups") else (Layout(), Layout(tp=2, pp=2)):
            for completions in ranks_at(name, step, layout, sampling):
                assert same(completions, wanted), layout


def ranks_at(name: str, step: str, layout: Layout, sampling: Sampling) -> list[list[Completion]]:
    if layout.world == 1:
        return [generate_at(name, step, layout, sampling)]
    return run_ranks(layout.world, generate_at, name, step, layout, sampling, layout.tp > 1)


def test_another_text_is_noticed(tmp_path):
    """The control: with one token of a prompt changed the reference writes something else."""
    step = checkpoint_of("llama", tmp_path)
    greedy = SAMPLINGS["greedy"]
    wanted = naive("llama", step, greedy)
    PROMPTS[0][0] += 1
    try:
        assert not same(generate_at("llama", step, Layout(), greedy), wanted)
    finally:
        PROMPTS[0][0] -= 1
    assert same(generate_at("llama", step, Layout(), greedy), wanted)
