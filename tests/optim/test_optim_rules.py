"""Every update rule against torch.optim on the weights of a real model, and what a skipped update leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from megallm.engine.engine import Engine, StepStats
from megallm.losses.language import NextToken
from megallm.ops.newton_schulz import orthogonalized
from megallm.ops.updates import Flat, SgdRule, sgd_
from megallm.optim.config import SETTINGS, OptimConfig
from megallm.optim.groups import rule_of
from megallm.optim.muon import iteration_dtype, update_scale
from megallm.optim.rules import RULES
from megallm.oracle import reference
from megallm.parallel.shard import Shard
from tests.engine.tiny import MODEL, batches, engine_of, state_of, worst

RATES = (0.02, 0.01, 0.03, 0.005)
BETAS, EPS, DECAY = (0.8, 0.9), 1e-6, 0.3
Make = Callable[[list, float], torch.optim.Optimizer]

# What torch calls the same rule: settings of ours, and its optimizer from parameters and decay.
CASES: dict[str, tuple[OptimConfig, Make]] = {
    "sgd": (OptimConfig("sgd", weight_decay=DECAY), lambda p, d: torch.optim.SGD(p, 1.0, weight_decay=d)),
    "momentum": (
        OptimConfig("sgd", momentum=0.7, weight_decay=DECAY),
        lambda p, d: torch.optim.SGD(p, 1.0, momentum=0.7, weight_decay=d),
    ),
    "nesterov": (
        OptimConfig("sgd", momentum=0.7, nesterov=True, weight_decay=DECAY),
        lambda p, d: torch.optim.SGD(p, 1.0, momentum=0.7, nesterov=True, weight_decay=d),
    ),
    "adagrad": (
        OptimConfig("adagrad", eps=EPS, weight_decay=DECAY),
        lambda p, d: torch.optim.Adagrad(p, 1.0, eps=EPS, weight_decay=d),
    ),
    "rmsprop": (
        OptimConfig("rmsprop", smoothing=0.8, eps=EPS, weight_decay=DECAY),
        lambda p, d: torch.optim.RMSprop(p, 1.0, alpha=0.8, eps=EPS, weight_decay=d),
    ),
    "rmsprop-momentum": (
        OptimConfig("rmsprop", smoothing=0.8, eps=EPS, momentum=0.6, weight_decay=DECAY),
        lambda p, d: torch.optim.RMSprop(p, 1.0, alpha=0.8, eps=EPS, momentum=0.6, weight_decay=d),
    ),
    "adam": (
        OptimConfig("adam", betas=BETAS, eps=EPS, weight_decay=DECAY),
        lambda p, d: torch.optim.Adam(p, 1.0, betas=BETAS, eps=EPS, weight_decay=d),
    ),
    "adamw": (
        OptimConfig("adamw", betas=BETAS, eps=EPS, weight_decay=DECAY),
        lambda p, d: torch.optim.AdamW(p, 1.0, betas=BETAS, eps=EPS, weight_decay=d),
    ),
    "adafactor": (
        OptimConfig("adafactor", update_clip=1.0, decay_power=0.7, min_scale=0.2, weight_decay=DECAY),
        lambda p, d: torch.optim.Adafactor(p, 1.0, beta2_decay=-0.7, eps=(1e-30, 0.2), d=1.0, weight_decay=d),
    ),
}


def ours(optim: OptimConfig, steps: int = 4, precision: str = "fp64") -> dict[str, Tensor]:
    """The weights after `steps` of the engine."""
    engine = engine_of(optim=optim, precision=precision)
    for step in range(steps):
        engine.train_step(batches(2, seed=step), NextToken(), RATES[step])
    return {name: x for name, x in state_of(engine).items() if not name.startswith("optim.")}


def theirs(updates: Callable[[dict[str, Tensor]], Callable[[float], None]], steps: int = 4) -> dict[str, Tensor]:
    """The oracle's independent decoder from the engine's start; `updates` makes the function that applies gradients."""
    start = state_of(engine_of(optim=OptimConfig("sgd", clip=0.0)))
    weights = {name: x.clone().requires_grad_() for name, x in start.items()}
    update = updates(weights)
    for step in range(steps):
        whole = {key: torch.cat([b[key] for b in batches(2, seed=step)]) for key in batches(1)[0]}
        reference.masked_loss(asdict(MODEL), weights, whole).backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 0.05)
        update(RATES[step])
        for weight in weights.values():
            weight.grad = None
    return {name: x.detach() for name, x in weights.items()}


def torch_updates(make: Make) -> Callable[[dict[str, Tensor]], Callable[[float], None]]:
    """One torch optimizer over the matrices and vectors of all stacks, each a parameter of its own."""

    def updates(weights: dict[str, Tensor]) -> Callable[[float], None]:
        parts = {name: torch.nn.ParameterList(split(name, weight.detach())) for name, weight in weights.items()}
        kept = [p for name, ps in parts.items() if reference.decays(name) for p in ps]
        bare = [p for name, ps in parts.items() if not reference.decays(name) for p in ps]
        optimizers = [make(kept, DECAY), make(bare, 0.0)]

        def update(lr: float) -> None:
            for name, ps in parts.items():
                for part, grad in zip(ps, split(name, weights[name].grad), strict=True):
                    part.grad = grad.clone()
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
            with torch.no_grad():
                for name, ps in parts.items():
                    weights[name].copy_(torch.stack(list(ps)).view_as(weights[name]))

        return update

    return updates


def split(name: str, x: Tensor) -> Iterable[Tensor]:
    """The matrices of a stack of matrices, the vectors of a stack of vectors."""
    dims = 2 if x.dim() > 1 and reference.decays(name) else 1
    return x.reshape(-1, *x.shape[-dims:]).unbind()


@pytest.mark.parametrize("case", CASES)
def test_training_equals_torch(case):
    optim, make = CASES[case]
    clipped = replace(optim, clip=0.05)
    assert worst(ours(clipped), theirs(torch_updates(make))) <= 1e-12


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("sgd", {"weight_decay": 0.29}), ("momentum", {"momentum": 0.71}), ("nesterov", {"nesterov": False}),
        ("adagrad", {"eps": 2e-6}), ("rmsprop", {"smoothing": 0.81}), ("rmsprop-momentum", {"momentum": 0.61}),
        ("adam", {"rule": "adamw"}), ("adafactor", {"decay_power": 0.71}), ("adafactor", {"update_clip": 1.1}),
        ("adafactor", {"min_scale": 0.21}), ("adafactor", {"weight_decay": 0.29}),
    ],
)  # fmt: skip
def test_another_setting_is_noticed(case, change):
    optim, make = CASES[case]
    changed = replace(optim, clip=0.05, **change)
    assert worst(ours(changed, 3), theirs(torch_updates(make), 3)) > 1e-8


def lion_updates(weights: dict[str, Tensor]) -> Callable[[float], None]:
    """Algorithm 2 of arXiv 2302.06675 line by line; torch has no Lion."""
    memory = {name: torch.zeros_like(x) for name, x in weights.items()}

    @torch.no_grad()
    def update(lr: float) -> None:
        for name, weight in weights.items():
            c = 0.8 * memory[name] + (1 - 0.8) * weight.grad
            weight -= lr * (torch.sign(c) + (DECAY if reference.decays(name) else 0.0) * weight)
            memory[name] = 0.9 * memory[name] + (1 - 0.9) * weight.grad

    return update


def test_lion_equals_its_paper():
    assert worst(ours(OptimConfig("lion", betas=BETAS, weight_decay=DECAY, clip=0.05)), theirs(lion_updates)) <= 1e-12


@pytest.mark.parametrize("scale", ["rms", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_torch_for_its_matrices_and_adamw_for_the_rest(scale, nesterov, monkeypatch):
    """torch.optim.Muon iterates in bf16 whatever the weights are; here both iterate in bf16."""
    monkeypatch.setattr(
        "megallm.optim.muon.orthogonalized", lambda x, steps, dtype: orthogonalized(x, steps, torch.bfloat16)
    )
    kind = {"rms": "match_rms_adamw", "original": "original"}[scale]

    def updates(weights: dict[str, Tensor]) -> Callable[[float], None]:
        hidden = [name for name, x in weights.items() if name.startswith("layers.") and x.dim() > 1]
        muon = torch_updates(
            lambda ps, d: torch.optim.Muon(
                ps or [torch.nn.Parameter(torch.zeros(1, 1))], 1.0, weight_decay=d, momentum=0.7, nesterov=nesterov,
                adjust_lr_fn=kind,
            )
        )({name: weights[name] for name in hidden})  # fmt: skip
        rest = torch_updates(CASES["adamw"][1])({name: x for name, x in weights.items() if name not in hidden})
        return lambda lr: (muon(lr), rest(lr))

    mine = OptimConfig(
        "muon", betas=BETAS, eps=EPS, weight_decay=DECAY, momentum=0.7, nesterov=nesterov, update_scale=scale, clip=0.05
    )
    assert worst(ours(mine), theirs(updates)) <= 1e-12


def test_newton_schulz_brings_singular_values_near_one():
    x = torch.randn(3, 17, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for y in (orthogonalized(x, 5, torch.float64), orthogonalized(x.mT, 5, torch.float64).mT):
        values = torch.linalg.svdvals(y)
        assert values.min() > 0.6 and values.max() < 1.3
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        assert torch.allclose(y @ (u @ v).mT, (y @ (u @ v).mT).mT, atol=1e-9), "the singular vectors stay"
    one = orthogonalized(x[0], 5, torch.float64)
    assert torch.allclose(one, orthogonalized(x, 5, torch.float64)[0], atol=1e-12)
    near = orthogonalized(x, 5, torch.bfloat16).double()
    assert float((near - orthogonalized(x, 5, torch.float64)).abs().max()) < 0.05


@pytest.mark.parametrize("shape", [(20, 40), (40, 20), (30, 30)])
def test_the_rms_scale_gives_an_update_the_size_of_adamws(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    update = orthogonalized(x, 5, torch.float64) * update_scale("rms", *shape)
    assert 0.14 < float(update.square().mean().sqrt()) < 0.24


# --- what all rules share --------------------------------------------------------------------------------------------


def overflowing(engine: Engine, step: int) -> StepStats:
    """A step in which two elements of the gradient are infinite."""
    finish = engine.parameters.finish
    engine.parameters.finish = lambda: (finish(), engine.parameters.flat[0].grads[3:5].fill_(torch.inf))
    stats = engine.train_step(batches(1, seed=step), NextToken(), 0.01)
    engine.parameters.finish = finish
    return stats


@pytest.mark.parametrize("rule", SETTINGS)
def test_a_skipped_update_changes_nothing(rule):
    """An infinite gradient in the second of three steps: the run goes on as if that step had not been."""
    extra = {"momentum": 0.5} if rule in ("sgd", "rmsprop") else {}

    def run(overflow: bool) -> dict[str, Tensor]:
        engine = engine_of(optim=OptimConfig(rule, **extra))
        for step in (0, 1, 2):
            if step == 1 and not overflow:
                continue
            if step == 1:
                assert overflowing(engine, step).skipped
            else:
                assert not engine.train_step(batches(1, seed=step), NextToken(), 0.01).skipped
        return state_of(engine)

    with_skip, without = run(True), run(False)
    assert with_skip.keys() == without.keys()
    assert all(torch.equal(with_skip[name], x) for name, x in without.items())


def test_a_first_step_that_is_skipped_leaves_finite_weights():
    for rule in SETTINGS:
        engine = engine_of(optim=OptimConfig(rule))
        start = state_of(engine)
        assert overflowing(engine, 0).skipped
        assert all(torch.equal(x, start[name]) for name, x in state_of(engine).items()), rule


@pytest.mark.parametrize("rule", SETTINGS)
def test_gradients_are_left_as_they_are(rule):
    engine = engine_of(optim=OptimConfig(rule, clip=0.0))
    seen = {}

    def keep(lr, skip, step=engine.optimizer.step):
        seen.update({bucket.index: bucket.shard_grads.clone() for bucket in engine.parameters.flat})
        step(lr, skip)

    engine.optimizer.step = keep
    engine.train_step(batches(1), NextToken(), 0.01)
    assert all(torch.equal(bucket.shard_grads, seen[bucket.index]) for bucket in engine.parameters.flat)


@pytest.mark.parametrize("rule", SETTINGS)
def test_the_state_is_what_the_rule_declares(rule):
    optim = OptimConfig(rule).resolve()
    engine = engine_of(optim=optim)
    found: dict[str, set[str]] = {}
    for part in engine.parts():
        if part.name.startswith("optim."):
            _, state, name = part.name.split(".", 2)
            found.setdefault(name, set()).add(state)
            declared = {s.name: s for s in RULES[rule_of(rule, name, engine.parameters.shards[name])].states}
            made = declared[state].shard
            shard = engine.parameters.shards[name]
            assert part.full == (shard if made is None else made(shard)).full
    for name, shard in engine.parameters.shards.items():
        states = RULES[rule_of(rule, name, shard)].states
        assert found.get(name, set()) == {state.name for state in states if state.kept(optim)}


def test_sgd_without_a_buffer_needs_none():
    p, g = torch.ones(4, dtype=torch.float64), torch.full((4,), 2.0, dtype=torch.float64)
    sgd_(Flat(p, g), None, SgdRule(0.1, 0.5), torch.tensor(0.0))
    assert torch.allclose(p, torch.full_like(p, 1 - 0.1 * 2.5)) and bool((g == 2).all())


def test_which_rule_a_parameter_gets():
    matrix, vector, stacked = Shard((4, 6)), Shard((6,), decay=False), Shard((2, 6), decay=False)
    assert rule_of("muon", "layers.0.mlp.up.weight", matrix) == "muon"
    assert rule_of("muon", "mtp.0.block.mlp.up.weight", matrix) == "muon"
    for name, shard in (("embedding.weight", matrix), ("head.weight", matrix), ("layers.0.mlp.up.bias", stacked)):
        assert rule_of("muon", name, shard) == "adamw"
    assert rule_of("adafactor", "embedding.weight", matrix) == "adafactor"
    assert rule_of("adafactor", "final_norm.weight", vector) == "adafactor.vector"


def test_newton_schulz_is_as_precise_as_the_run_or_as_it_is_told():
    for model, chosen in (
        (torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ):  # fmt: skip
        assert iteration_dtype(None, model) == chosen
        assert iteration_dtype("bf16", model) == torch.bfloat16
        assert iteration_dtype("fp32", model) == torch.float32
