"""Norms of queries and keys over all heads together: which rank counts a head, and what one rank alone computes."""

from __future__ import annotations

import pytest
import torch

from megallm.base.errors import UsageError
from megallm.models.attention import HeadPlan, JointNorm
from megallm.models.config import ModelConfig
from megallm.parallel.mesh import Mesh
from megallm.training.config import PretrainConfig
from megallm.training.validate import find_problems

TINY = ModelConfig(family="olmoe", num_layers=1, hidden_size=24, num_heads=4, num_kv_heads=2, vocab_size=61)


@pytest.mark.parametrize(
    ("heads", "kv", "tp"),
    [(heads, kv, tp) for heads in range(1, 25) for kv in range(1, heads + 1) if heads % kv == 0
     for tp in range(1, heads + 1) if heads % tp == 0],
)  # fmt: skip
def test_every_key_head_counts_once(heads, kv, tp):
    plans = [HeadPlan.of(heads, kv, tp, rank) for rank in range(tp)]
    counted = [head for plan in plans for head in range(plan.kv_begin + plan.kv_shared, plan.kv_begin + plan.num_kv)]
    assert counted == list(range(kv))
    projected = sum(plan.num_kv for plan in plans)
    assert projected > kv if tp > kv else projected >= kv


def test_one_rank_alone_is_a_norm_over_all_features():
    config = TINY.resolve()
    norm = JointNorm(Mesh.single(), config, config.num_heads)
    size, x = config.head_size, torch.randn(2, 5, 4, config.head_size, dtype=torch.float64)
    norm.weight = torch.nn.Parameter(torch.randn(4 * size, dtype=torch.float64))
    flat = x.flatten(-2)
    expected = flat / (flat.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * norm.weight
    assert torch.allclose(norm(x), expected.view_as(x), rtol=1e-14, atol=0)
    by_head = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * norm.weight.view(4, size)
    assert not torch.allclose(norm(x), by_head, rtol=0.05)


def test_the_span_is_head_or_all():
    config = PretrainConfig(model=ModelConfig(family="llama", num_layers=1, hidden_size=24, num_heads=4, vocab_size=61,
                                              qk_norm=True, qk_norm_span="layer"))  # fmt: skip
    assert any("model.qk_norm_span" in str(problem) and "all" in str(problem) for problem in find_problems(config, 1))
    with pytest.raises(UsageError, match="model.family is 'olmo'.*Did you mean 'olmoe'"):
        ModelConfig(family="olmo", num_layers=1, hidden_size=24, num_heads=4, vocab_size=61).resolve()
