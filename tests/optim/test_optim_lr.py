"""Learning-rate schedules: end points, continuity, shape."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.optim.config import SCHEDULES, OptimConfig
from megallm.optim.lr import learning_rate

configs = st.builds(
    OptimConfig,
    lr=st.floats(1e-5, 1.0),
    min_lr=st.just(0.0) | st.floats(1e-7, 1e-5),
    warmup_steps=st.integers(0, 50),
    schedule=st.sampled_from(SCHEDULES),
    decay_fraction=st.floats(0.05, 1.0),
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
    last = config.lr if config.schedule == "constant" else config.min_lr
    assert rates[-1] == pytest.approx(last, abs=1e-12)


@settings(deadline=None)
@given(configs, st.integers(200, 400))
def test_no_schedule_jumps(config, total):
    """The largest step down is what the steepest shape allows: half a circle of cosine, or the tail of WSD."""
    rates = [learning_rate(config, step, total) for step in range(max(config.warmup_steps, 1), total + 1)]
    share = config.decay_fraction if config.schedule == "wsd" else 1.0
    steepest = (math.pi / 2 if config.schedule == "cosine" else 1.0) / (share * (total - config.warmup_steps))
    assert all(a - b <= config.lr * steepest * (1 + 1e-6) for a, b in zip(rates, rates[1:], strict=False))


def test_known_values():
    base = {"lr": 1.0, "warmup_steps": 10, "min_lr": 0.1}
    rate = {name: learning_rate(OptimConfig(schedule=name, **base), 60, 110) for name in SCHEDULES}
    assert rate == pytest.approx({"constant": 1.0, "linear": 0.55, "cosine": 0.55, "wsd": 1.0})
    wsd = OptimConfig(schedule="wsd", decay_fraction=0.5, **base)
    assert [learning_rate(wsd, step, 110) for step in (60, 85, 110)] == pytest.approx([1.0, 0.55, 0.1])
    assert learning_rate(OptimConfig(schedule="cosine", **base), 35, 110) == pytest.approx(0.1 + 0.9 * (2 + 2**0.5) / 4)
    assert learning_rate(OptimConfig(lr=1.0, schedule="cosine"), 200, 110) == 0.0, "past the end it stays"


def test_the_horizon_is_that_of_all_steps_and_not_where_a_leg_stops():
    config = OptimConfig(schedule="cosine", lr=1.0)
    assert learning_rate(config, 50, 100) != learning_rate(config, 50, 50)
