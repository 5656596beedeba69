"""The engine's optimizer against torch's: AdamW with a decay mask, clipping by the global norm, fp32 masters."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from megallm.losses.language import NextToken
from megallm.ops.adam import AdamRule, FlatState, adamw_
from megallm.optim.config import OptimConfig
from megallm.oracle import reference
from tests.engine.tiny import MODEL, batches, engine_of, state_of, worst

OPTIM = OptimConfig(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, clip=0.05)
RATES = (0.02, 0.01, 0.03, 0.005)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-7), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_rule_equals_torch(dtype, tolerance, decay):
    torch.manual_seed(0)
    ours = torch.randn(1000, dtype=dtype)
    theirs = ours.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1.0, betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=decay)
    first, second = torch.zeros_like(ours), torch.zeros_like(ours)
    for step, lr in enumerate(RATES, start=1):
        grad = torch.randn(1000, dtype=dtype) * 10.0 ** torch.randint(-6, 2, (1000,))
        state = FlatState(ours, grad.clone(), first, second)
        adamw_(state, AdamRule(lr, OPTIM.betas, OPTIM.eps, decay), torch.tensor(step - 1.0), torch.tensor(0.0))
        theirs.grad, optimizer.param_groups[0]["lr"] = grad, lr
        optimizer.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=tolerance, atol=tolerance)


def torch_training(optim: OptimConfig, steps: int, decay_all: bool = False) -> tuple[list[float], dict[str, Tensor]]:
    """The oracle's independent decoder under torch.optim.AdamW and clip_grad_norm_, from the engine's start."""
    start = state_of(engine_of(optim=optim))
    weights = {name: x.requires_grad_() for name, x in start.items() if not name.startswith("optim.")}
    groups = [
        {"params": [x for name, x in weights.items() if decay_all or reference.decays(name)]},
        {
            "params": [x for name, x in weights.items() if not (decay_all or reference.decays(name))],
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=1.0, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay,
    )  # fmt: skip
    norms = []
    for step in range(steps):
        whole = {key: torch.cat([b[key] for b in batches(2, seed=step)]) for key in batches(1)[0]}
        optimizer.zero_grad()
        reference.masked_loss(asdict(MODEL), weights, whole).backward()
        limit = optim.clip or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(weights.values()), limit)))
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        optimizer.step()
    return norms, {name: x.detach() for name, x in weights.items()}


def engine_training(optim: OptimConfig, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    engine = engine_of(optim=optim)
    norms = [engine.train_step(batches(2, seed=step), NextToken(), RATES[step]).grad_norm for step in range(steps)]
    return norms, {name: x for name, x in state_of(engine).items() if not name.startswith("optim.")}


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e6])
def test_training_equals_torch(clip):
    optim = replace(OPTIM, clip=clip)
    (norms, ours), (their_norms, theirs) = engine_training(optim, 4), torch_training(optim, 4)
    assert norms == pytest.approx(their_norms, rel=1e-11)
    assert worst(ours, theirs) <= 1e-11
    assert min(norms) > 0.05, "clipping at 0.05 acts"


@pytest.mark.parametrize("change", [{"clip": 0.0}, {"weight_decay": 0.29}, {"eps": 2e-6}, {"betas": (0.8, 0.91)}])
def test_another_setting_is_noticed(change):
    _, ours = engine_training(replace(OPTIM, **change), 2)
    _, theirs = torch_training(OPTIM, 2)
    assert worst(ours, theirs) > 1e-8


def test_decay_of_norms_is_noticed():
    _, ours = engine_training(OPTIM, 2)
    _, theirs = torch_training(OPTIM, 2, decay_all=True)
    assert worst(ours, theirs) > 1e-4


def test_bf16_keeps_fp32_masters():
    """Updates far below the spacing of bf16 numbers add up in the master, and the weight is its rounding."""
    engine = engine_of(precision="bf16", optim=replace(OPTIM, weight_decay=0.0))
    start = state_of(engine)
    for step in range(4):
        engine.train_step(batches(1, seed=step), NextToken(), 1e-6)
    end = state_of(engine)
    names = [name for name in end if not name.startswith("optim.")]
    assert names and all(end[name].dtype == torch.bfloat16 for name in names)
    for name in names:
        master, before = end[f"optim.master.{name}"], start[f"optim.master.{name}"]
        assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), end[name])
        assert 0 < float((master - before).abs().max()) < 1e-5
    still = sum(int(torch.equal(end[name], start[name])) for name in names)
    assert still > 0, "the control: in bf16 alone these updates would be lost"
