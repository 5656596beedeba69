"""Learning-rate schedules: end points, continuity, shape."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.optim.config import CHOICES, SCHEDULES, OptimConfig
from megallm.optim.lr import learning_rate

configs = st.builds(
    OptimConfig,
    lr=st.floats(1e-5, 1.0),
    min_lr=st.just(0.0) | st.floats(1e-7, 1e-5),
    warmup_steps=st.integers(0, 50),
    schedule=st.sampled_from(list(SCHEDULES)),
    decay_fraction=st.none() | st.floats(0.05, 1.0),
    decay_shape=st.none() | st.sampled_from(CHOICES["decay_shape"]),
)


@settings(deadline=None)
@given(configs, st.integers(51, 400))
def test_every_schedule_warms_up_starts_at_its_peak_and_never_rises_again(config, total):
    rates = [learning_rate(config, step, total) for step in range(1, total + 1)]
    warm = config.warmup_steps
    assert rates[:warm] == pytest.approx([config.lr * step / warm for step in range(1, warm + 1)])
    if warm:
        assert rates[warm - 1] == pytest.approx(config.lr)
    after = rates[max(warm - 1, 0) :]
    assert all(b <= a * (1 + 1e-12) for a, b in zip(after, after[1:], strict=False))
    assert all(min(config.min_lr, config.lr) * (1 - 1e-9) <= rate <= config.lr * (1 + 1e-9) for rate in after)
    last = {"constant": config.lr, "inverse_sqrt": max(config.lr * (max(warm, 1) / total) ** 0.5, config.min_lr)}
    assert rates[-1] == pytest.approx(last.get(config.schedule, config.min_lr), abs=1e-12)


@settings(deadline=None)
@given(configs, st.integers(200, 400))
def test_no_schedule_jumps(config, total):
    """The largest step down is what the steepest shape allows: half a circle of cosine, a line, the end of a root."""
    full = config.resolve()
    rates = [learning_rate(config, step, total) for step in range(max(config.warmup_steps, 1), total + 1)]
    shape = full.decay_shape if full.schedule == "wsd" else full.schedule
    tail = (full.decay_fraction if full.schedule == "wsd" else 1.0) * (total - config.warmup_steps)
    steepest = {"cosine": math.pi / 2 / tail, "sqrt": max(1.0, tail) ** -0.5, "inverse_sqrt": 0.3}.get(
        shape, 1.0 / tail
    )
    assert all(a - b <= config.lr * steepest * (1 + 1e-6) for a, b in zip(rates, rates[1:], strict=False))


def test_known_values():
    base = {"lr": 1.0, "warmup_steps": 10, "min_lr": 0.1}
    rate = {name: learning_rate(OptimConfig(schedule=name, **base), 60, 110) for name in SCHEDULES}
    middle = {"constant": 1.0, "linear": 0.55, "cosine": 0.55, "inverse_sqrt": (10 / 60) ** 0.5, "wsd": 1.0}
    assert rate == pytest.approx(middle)
    assert learning_rate(OptimConfig(schedule="cosine", **base), 35, 110) == pytest.approx(0.1 + 0.9 * (2 + 2**0.5) / 4)
    assert learning_rate(OptimConfig(lr=1.0, schedule="cosine"), 200, 110) == 0.0, "past the end it stays"


@pytest.mark.parametrize(
    ("shape", "middle"), [("linear", 0.55), ("cosine", 0.55), ("sqrt", 0.1 + 0.9 * (1 - 0.5**0.5))], ids=str
)
def test_wsd_holds_and_falls_in_each_shape(shape, middle):
    wsd = OptimConfig(lr=1.0, warmup_steps=10, min_lr=0.1, schedule="wsd", decay_fraction=0.5, decay_shape=shape)
    assert [learning_rate(wsd, step, 110) for step in (11, 60, 85, 110)] == pytest.approx([1.0, 1.0, middle, 0.1])


def test_inverse_sqrt_is_the_schedule_of_the_transformer():
    """lr min(step^-0.5, step warmup^-1.5) up to a constant (arXiv 1706.03762, equation 3); `min_lr` is a floor."""
    config = OptimConfig(lr=2.0, warmup_steps=16, schedule="inverse_sqrt")
    for step in (1, 8, 16, 17, 64, 1000):
        assert learning_rate(config, step, 50) == pytest.approx(2.0 * 4 * min(step**-0.5, step * 16**-1.5))
    assert learning_rate(replace(config, min_lr=0.5), 10**6, 50) == 0.5


def test_the_rate_of_a_rule_is_its_default():
    assert learning_rate(OptimConfig(rule="sgd", schedule="constant"), 1, 10) == 0.1
    assert learning_rate(OptimConfig(schedule="constant"), 1, 10) == 3e-4


def test_the_horizon_is_that_of_all_steps_and_not_where_a_leg_stops():
    config = OptimConfig(schedule="cosine", lr=1.0)
    assert learning_rate(config, 50, 100) != learning_rate(config, 50, 50)
