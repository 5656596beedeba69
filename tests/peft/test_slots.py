"""Adapters in the slots beside linears: any layout trains and generates like one process."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.engine.engine import Engine
from megallm.inference.answer import Answer, Ending
from megallm.inference.generator import Generator
from megallm.inference.samples import Request
from megallm.inference.sampling import Sampling
from megallm.losses.language import NextToken
from megallm.models.config import ModelConfig
from megallm.models.parallel_model import ParallelModel
from megallm.ops.attention import Partial
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.parallel.tensor import without_adapters
from megallm.peft.config import PeftConfig
from megallm.peft.inject import prepare_adapters
from tests.engine.tiny import batches, config_of, share
from tests.ranks import run_ranks

COUNT, LONG = 3, 20  # virtual tokens; the long ones reach from one rank's tokens into another's
TINY: dict[str, Any] = {
    "family": "llama", "num_layers": 4, "hidden_size": 24, "ffn_hidden_size": 28, "num_heads": 4,
    "num_kv_heads": 2, "vocab_size": 61, "max_positions": 64, "init_std": 0.2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "ffn_hidden_size": 14, "shared_ffn_hidden_size": 12, "aux_coef": 0.5}
LATENTS = {
    "kv_lora_dim": 7, "q_lora_dim": 9, "nope_head_size": 3, "rope_head_size": 4, "value_head_size": 5
}  # fmt: skip
MODELS = {
    "dense": TINY,
    "window": TINY | {"sliding_window": 5},
    "gpt2": TINY | {"family": "gpt2", "num_kv_heads": 4, "ffn_hidden_size": 32, "bias": False},
    "moe": TINY | {"moe": EXPERTS},
    "mla": TINY | {"num_kv_heads": None, "mla": LATENTS},
}
METHODS: dict[str, PeftConfig] = {
    method: PeftConfig(method, virtual_tokens=COUNT, hidden=5)
    for method in ("prefix", "prompt", "houlsby", "parallel")
}
METHODS["ia3"] = PeftConfig("ia3", targets=("attention.kv", "attention.o", "down"))
METHODS["p-tuning"] = PeftConfig("p-tuning", virtual_tokens=LONG, hidden=5)


def packed(everything: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The rows of each microbatch as documents of one row, the last one cut in two."""
    made = []
    for number, batch in enumerate(everything):
        rows, tokens = batch["tokens"].shape
        ends = [*range(0, rows * tokens, tokens), rows * tokens - 3 - number, rows * tokens]
        lengths = torch.tensor(ends).diff()
        positions = torch.cat([torch.arange(int(n)) for n in lengths])
        row = {name: x.reshape(1, -1) for name, x in batch.items()}
        made.append(
            row
            | {"positions": positions[None], "cu_seqlens": torch.tensor(ends, dtype=torch.int32)}
        )
    return made


Case = tuple[Layout, str, dict[str, Any]]
SP, FULL, ZB = {"sp": True}, {"recompute": "full"}, {"recompute": "selective"}
CASES: dict[str, tuple[list[str], Case]] = {
    "tp4": (["ia3", "prefix", "houlsby"], (Layout(tp=4), "dense", {})),
    "tp2-sp-recompute": (["ia3", "prefix", "p-tuning", "parallel"], (Layout(tp=2), "gpt2", SP | FULL)),
    "cp2-tp2": (["prefix", "prompt"], (Layout(cp=2, tp=2), "dense", SP | ZB)),
    "ulysses-packed": (["prefix"], (Layout(cp=2), "dense", {"cp_kind": "ulysses", "packed": 1})),
    "ulysses-tp2": (["prefix"], (Layout(cp=2, tp=2), "dense", {"cp_kind": "ulysses"})),
    "gather-packed": (["prefix", "p-tuning"], (Layout(cp=2), "dense", {"cp_kind": "allgather", "packed": 1})),
    "ring-packed": (["prefix", "prompt"], (Layout(cp=2), "window", {"packed": 1})),
    "zero3-recompute": (["prefix", "p-tuning", "houlsby"], (Layout(dp=2), "dense", FULL | {"zero": 3})),
    "zb-v": (["ia3", "prefix", "p-tuning", "parallel"], (Layout(pp=2), "dense", {"schedule": "zb-v", "chunks": 2})),
    "interleaved-packed": (
        ["prefix", "prompt"],
        (Layout(pp=2), "dense", {"schedule": "interleaved", "chunks": 2, "packed": 1}),
    ),
    "experts": (["ia3", "prefix", "parallel"], (Layout(dp=2, tp=2, ep=4), "moe", SP | FULL)),
    "latents": (["prefix", "prompt"], (Layout(cp=2, tp=2), "mla", SP)),
}  # fmt: skip


def trained(case: Case, method: str, broken: str = "") -> tuple[list, list]:
    """Losses and norms of three steps, and this rank's pieces of the weights and moments."""
    layout, model, changes = case
    changes = dict(changes)
    make = packed if changes.pop("packed", 0) else list
    off = frozenset({broken} if broken else ())
    mesh = Mesh.start(layout, broken=off) if layout.world > 1 else Mesh.single()
    config = config_of(ModelConfig(**MODELS[model]).resolve(), **changes)
    engine = Engine.build(config, mesh, prepare_adapters(METHODS[method], config.model))
    numbers = []
    for step in range(3):
        given = share(make(batches(4, tokens=16, seed=step)), mesh)
        stats = engine.train_step(given, NextToken(), 0.02)
        numbers.append((stats.loss, stats.grad_norm))
    return numbers, [(p.name, p.offset, p.tensor.clone()) for p in engine.parts()]


def alone(case: Case) -> Case:
    """The same on one rank, without anything but the rows themselves."""
    _, model, changes = case
    return Layout(), model, {"packed": changes["packed"]} if "packed" in changes else {}


@cache
def reference(layout: Layout, model: str, changes: tuple, method: str) -> tuple[list, list]:
    """What one process trains, once for all layouts."""
    return trained((layout, model, dict(changes)), method)


PAIRS = [(name, method) for name, (methods, _) in CASES.items() for method in methods]


def assert_same(case: Case, method: str, results: list[tuple[list, list]]) -> None:
    """What ranks trained is what one process trains."""
    layout, model, changes = alone(case)
    numbers, parts = reference(layout, model, tuple(changes.items()), method)
    whole = {name: tensor for name, _, tensor in parts}
    assert all(".adapter." in name for name in whole if name.startswith("optim."))
    assert any(float(x.abs().max()) > 0 for name, x in whole.items() if "exp_avg." in name)
    for ours, pieces in results:
        for step, expected in zip(ours, numbers, strict=True):
            assert step == pytest.approx(expected, rel=1e-9)
        for name, offset, tensor in pieces:
            box = tuple(slice(a, a + n) for a, n in zip(offset, tensor.shape, strict=True))
            torch.testing.assert_close(tensor, whole[name][box], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_trains_as_in_one_process(name, method):
    case = CASES[name][1]
    assert_same(case, method, run_ranks(case[0].world, trained, case, method))


@pytest.mark.parametrize(
    ("layout", "changes", "method"),
    [
        (Layout(tp=4), {}, "prefix"),  # kv is replicated: each rank uses some of the heads
        (Layout(tp=4), {}, "ia3"),
        (Layout(tp=2), SP, "p-tuning"),  # each rank has some of the tokens
        (Layout(tp=2), SP, "houlsby"),
    ],
)
def test_without_a_sum_over_tp_it_is_wrong(layout, changes, method):
    """Negative control of every `partial`."""
    case = (layout, "dense", changes)
    with pytest.raises(AssertionError):
        assert_same(case, method, run_ranks(layout.world, trained, case, method, "grads.partial"))


def test_a_prefix_counted_by_every_rank_is_wrong(monkeypatch):
    """Negative control of context parallelism: twice the prefix is another model."""
    case = (Layout(), "dense", {})
    numbers = trained(case, "prefix")[0]
    real = Partial.add_prefix

    def twice(self: Partial, *args: Any, **named: Any) -> None:
        real(self, *args, **named)
        real(self, *args, **named)

    monkeypatch.setattr(Partial, "add_prefix", twice)
    assert trained(case, "prefix")[0][0] != pytest.approx(numbers[0], rel=1e-6)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_documents_of_a_row_each_see_the_virtual_tokens(method):
    """Packed rows give the loss and gradients of the documents one by one."""
    rows = packed(batches(1, tokens=16))
    ends = rows[0]["cu_seqlens"].tolist()
    apart = [
        {name: x[:, a:b] for name, x in rows[0].items() if name != "cu_seqlens"}
        for a, b in zip(ends, ends[1:], strict=False)
    ]
    norms = []
    for given in (rows, apart):
        config = config_of(ModelConfig(**TINY).resolve())
        engine = Engine.build(config, Mesh.single(), prepare_adapters(METHODS[method], config.model))
        stats = engine.train_step(given, NextToken(), 0.0)
        norms.append((stats.loss, stats.grad_norm))
    assert norms[0] == pytest.approx(norms[1], rel=1e-11)


def generated(layout: Layout, model: str, method: str) -> tuple[float, float]:
    """The largest difference between log-probabilities of generation and of `log_probs`, and of
    those to the reference model's."""
    mesh = Mesh.start(layout)
    config = config_of(ModelConfig(**MODELS[model]).resolve(), zero=3)
    engine = Engine.build(config, mesh, prepare_adapters(METHODS[method], config.model))
    requests = [Request(number, [1 + number, 7, 3, 9, 2], Answer(Ending(8))) for number in range(3)]
    with engine.parameters.gathered():
        Generator(engine.model).generate(requests, Sampling())
    gaps, beside = [], []
    for request in requests:
        text = torch.tensor([[*request.prompt, *request.answer.tokens]])
        batch = {"tokens": text[:, :-1], "labels": text[:, 1:]}
        batch |= {"positions": torch.arange(12)[None], "mask": torch.ones(1, 12, dtype=torch.bool)}
        made = torch.tensor(request.answer.log_probs, dtype=torch.float64)
        ours = engine.log_probs([batch])[0]
        gaps.append(ours[0, 4:] - made)
        with ExitStack() as off:
            for stage in engine.model.stages.values():
                off.enter_context(without_adapters(stage))
            beside.append(engine.log_probs([batch])[0] - ours)
    return float(torch.stack(gaps).abs().max()), float(torch.stack(beside).abs().max())


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("window", "prefix"), ("mla", "prefix"), ("dense", "houlsby"), ("window", "prompt"), ("gpt2", "p-tuning"),
    ],
)
def test_generation_uses_the_slots(model, method):
    found = run_ranks(4, generated, Layout(pp=2, tp=2), model, method)
    assert max(gap for gap, _ in found) < 1e-12
    assert min(beside for _, beside in found) > 1e-4


@pytest.mark.parametrize("method", ["prefix", "prompt", "p-tuning"])
def test_the_reference_has_no_virtual_tokens(method):
    given = batches(1, tokens=10)
    config = config_of(ModelConfig(**TINY).resolve())
    plain = Engine.build(config, Mesh.single()).log_probs(given)[0]
    engine = Engine.build(config, Mesh.single(), prepare_adapters(METHODS[method], config.model))
    assert (engine.log_probs(given)[0] - plain).abs().max() > 1e-3
    with without_adapters(engine.model.stages[0]):
        assert torch.equal(engine.log_probs(given)[0], plain)


def test_virtual_tokens_that_cannot_be():
    encoder = ModelConfig(**TINY | {"family": "bert", "num_kv_heads": 4}).resolve()
    with pytest.raises(UsageError, match="causal"):
        Engine.build(config_of(encoder), Mesh.single(), prepare_adapters(METHODS["prompt"], encoder))


@pytest.mark.parametrize("method", ["prompt", "p-tuning"])
def test_answers_do_not_depend_on_how_virtual_tokens_are_fed(method):
    """Prefilled a token at a time, prompts shared, blocks so few that sequences are preempted; and with the adapter
    off the base's answers."""
    config = config_of(ModelConfig(**TINY).resolve())
    engine = Engine.build(config, Mesh.single(), prepare_adapters(METHODS[method], config.model))
    plain = Engine.build(config, Mesh.single())

    def answers(model: ParallelModel, **options: int) -> list[list[int]]:
        prompts = [[5, 9, 2], [5, 9, 2], [7], [11, 3, 1, 8]]
        requests = [Request(n, prompt, Answer(Ending(20))) for n, prompt in enumerate(prompts)]
        made = Generator(model, **options).generate(requests, Sampling(temperature=1.0, seed=3))
        assert [sample.prompt for sample in made] == prompts
        return [sample.tokens for sample in made]

    whole = answers(engine.model)
    assert whole == answers(engine.model, chunk=1) == answers(engine.model, blocks=4, batch=4)
    assert whole == answers(engine.model, batch=1)
    with without_adapters(engine.model.stages[0]):
        assert answers(engine.model) == answers(plain.model) != whole


def test_values_that_cannot_be_used():
    for config, key in (
        (PeftConfig("prefix", virtual_tokens=0), "virtual_tokens"),
        (PeftConfig("houlsby", hidden=0), "hidden"),
        (PeftConfig("adalora", dim=8, init_dim=4), "init_dim"),
        (PeftConfig("adalora", betas=(0.85, 1.0)), "betas"),
        (PeftConfig(quantize="nf4"), "quantize"),
    ):
        assert any(f"peft.{key}" in problem for problem in config.problems())
    assert not list(PeftConfig("adalora").problems()) and PeftConfig("adalora").first_dim == 24


def test_norms_are_trained_beside_adapters():
    config = config_of(ModelConfig(**TINY).resolve())
    wanted = PeftConfig("houlsby", hidden=5, modules_to_save=("*norm",))
    engine = Engine.build(config, Mesh.single(), prepare_adapters(wanted, config.model))
    trained_names = {name for name in engine.parameters.params if engine.parameters.params[name].requires_grad}
    assert "layers.0.mlp_norm.weight" in trained_names and "final_norm.weight" in trained_names
    assert "layers.0.mlp.down.weight" not in trained_names
