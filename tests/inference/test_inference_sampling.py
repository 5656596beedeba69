"""Temperature, top-k and top-p against their definitions, and against counted frequencies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megallm.inference.sampling import Draws, Sampling, choose, sample

VOCAB = 12


def allowed(logits: Tensor, sampling: Sampling) -> dict[int, float]:
    """Token -> probability, by the definitions: the k likeliest, then the shortest list of total share p."""
    scaled = (logits.double() / sampling.temperature).tolist()
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    kept = order[: sampling.top_k] if sampling.top_k else order
    top = max(scaled)
    weights = {token: math.exp(scaled[token] - top) for token in kept}
    total, passed, final = sum(weights.values()), 0.0, {}
    for token in kept:
        if passed >= sampling.top_p * total:
            break
        final[token] = weights[token]
        passed += weights[token]
    return {token: weight / sum(final.values()) for token, weight in final.items()}


settings_of_sampling = st.builds(
    Sampling,
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.floats(0.05, 1.0),
    seed=st.integers(0, 1000),
)


@settings(deadline=None, max_examples=100)
@given(settings_of_sampling, st.integers(0, 10_000))
def test_only_allowed_tokens_are_chosen(sampling, seed):
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    wanted = allowed(logits, sampling)
    for position in range(20):
        token, log_prob = choose(logits, sampling, 0, position)
        assert token in wanted
        assert log_prob == pytest.approx(float(logits.log_softmax(-1)[token]), rel=1e-12), "before any filter"


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=1.0, top_k=4),
        Sampling(temperature=1.5, top_p=0.7),
        Sampling(temperature=0.8, top_k=6, top_p=0.8),
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(sampling):
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted, draws = allowed(logits, sampling), 3000
    counts = torch.bincount(torch.tensor([choose(logits, sampling, 3, i)[0] for i in range(draws)]), minlength=VOCAB)
    for token in range(VOCAB):
        p = wanted.get(token, 0.0)
        assert abs(int(counts[token]) - draws * p) <= 5 * math.sqrt(draws * p * (1 - p)) + 1e-9
    other = allowed(logits * 2.0, sampling)
    spread = sum((int(counts[t]) - draws * p) ** 2 / (draws * p) for t, p in other.items())
    assert spread > 40, "the control: another distribution is told apart"


def test_draws_of_other_requests_and_positions_are_independent():
    logits = torch.zeros(VOCAB)
    rows = [[choose(logits, Sampling(seed=1), request, i)[0] for i in range(400)] for request in range(2)]
    agree = sum(a == b for a, b in zip(*rows, strict=True)) / 400
    assert abs(agree - 1 / VOCAB) < 0.06
    assert rows[0] == [choose(logits.double(), Sampling(seed=1), 0, i)[0] for i in range(400)]


def test_temperature_zero_is_the_likeliest_and_ties_go_to_the_first():
    assert choose(torch.tensor([0.0, 3.0, 3.0, -1.0]), Sampling(temperature=0.0), 0, 0)[0] == 1


@settings(deadline=None, max_examples=60)
@given(
    st.builds(
        Sampling,
        temperature=st.floats(0.1, 3.0),
        top_k=st.integers(0, VOCAB),
        top_p=st.floats(0.3, 1.0),
        min_p=st.sampled_from([0.0, 0.05, 0.3]),
        repetition_penalty=st.sampled_from([1.0, 1.7]),
    ),
    st.integers(0, 1000),
)
def test_rows_are_drawn_as_they_would_be_alone(sampling, seed):
    """The tokens of a batch are those of its rows, bit for bit, with all three log-probabilities."""
    made = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, VOCAB, generator=made, dtype=torch.float64) * 3
    seen = torch.rand(7, VOCAB, generator=made) < 0.3
    draws = torch.tensor([Draws(sampling.seed, row).at(9) for row in range(7)], dtype=torch.float64)
    chosen = sample(logits, sampling, draws, seen)
    for row in range(7):
        alone = choose(logits[row], sampling, row, 9, seen[row].nonzero()[:, 0].tolist())
        assert (int(chosen.tokens[row]), float(chosen.log_probs[row])) == alone
        one = sample(logits[row : row + 1], sampling, draws[row : row + 1], seen[row : row + 1])
        assert all(torch.equal(part[0], whole[row]) for part, whole in zip(one, chosen, strict=True))
    policy = (logits / sampling.temperature).log_softmax(-1).gather(-1, chosen.tokens[:, None])[:, 0]
    torch.testing.assert_close(chosen.policy_log_probs, policy, rtol=1e-12, atol=1e-12)
    if not sampling.filters:
        assert torch.equal(chosen.behaviour_log_probs, chosen.policy_log_probs)


def test_the_behaviour_is_renormalised_over_what_could_be_drawn():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    draw = torch.tensor([0.5], dtype=torch.float64)
    kept = sample(logits, Sampling(temperature=0.5, top_k=2), draw)
    top = (logits / 0.5).softmax(-1)[0, :2]
    assert float(kept.behaviour_log_probs.exp()) == pytest.approx(float(top[int(kept.tokens)] / top.sum()))
    few = sample(logits, Sampling(min_p=0.3), torch.tensor([0.999], dtype=torch.float64))
    assert int(few.tokens) == 1, "e^-1 of the likeliest stays, e^-2 goes"
    greedy = sample(logits, Sampling(temperature=0.0), None)
    assert float(greedy.behaviour_log_probs) == 0 and torch.equal(greedy.policy_log_probs, greedy.log_probs)
