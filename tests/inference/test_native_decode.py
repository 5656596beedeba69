"""Decoding by the C++ extension gives the tokens and log-probabilities of the way in torch."""

from __future__ import annotations

import pytest
import torch

from megallm.base import extension
from megallm.inference import cache
from megallm.inference.generator import Generator
from megallm.inference.samples import Request
from megallm.inference.sampling import Sampling
from megallm.models import decode
from megallm.models.config import ModelConfig
from megallm.parallel.mesh import Mesh
from tests.engine.tiny import engine_of

pytestmark = pytest.mark.skipif(extension.ops() is None, reason="the extension megallm._ops is not built")
SHAPES = {
    "gqa": {"num_heads": 4, "num_kv_heads": 2},
    "mha": {"num_heads": 4, "num_kv_heads": 4, "qk_norm": True},
    "window": {"num_heads": 4, "num_kv_heads": 1, "sliding_window": 19},
    "odd": {"num_heads": 2, "num_kv_heads": 1, "head_size": 6, "tie_embeddings": True},
}


def generated(engine, batch: int = 7) -> list[tuple[list[int], list[float]]]:
    """Answers of several lengths; two prompts are the same, and one is longer than a block."""
    prompts = [[3, 1, 4], [3, 1, 4], [5] * 21, [2, 7], list(range(40))]
    asked = [Request.of(n, prompt, 30 - 4 * n) for n, prompt in enumerate(prompts)]
    samples = Generator(engine.model, batch).generate(asked, Sampling(30, 0.9, seed=5))
    return [(each.tokens, each.log_probs) for each in samples]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_tokens_and_log_probs_are_those_of_torch(monkeypatch, name, precision):
    model = ModelConfig(
        family="llama", num_layers=2, hidden_size=24, ffn_hidden_size=40, vocab_size=50, max_positions=128,
        init_std=0.3,
        **SHAPES[name],
    ).resolve()  # fmt: skip
    engine, calls = engine_of(Mesh.single(), model=model, precision=precision), []
    step = decode.native_step
    monkeypatch.setattr(decode, "native_step", lambda *args: calls.append(1) or step(*args))
    native = generated(engine)
    assert len(calls) > 40
    assert [tokens for tokens, _ in generated(engine, 2)] == [tokens for tokens, _ in native], "rows do not meet"
    calls.clear()
    monkeypatch.setattr(extension, "ops", lambda: None)
    plain = generated(engine)
    assert not calls
    worst = 1e-12 if precision == "fp64" else 2e-5
    for (ours, found), (theirs, wanted) in zip(native, plain, strict=True):
        assert ours == theirs
        assert torch.allclose(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=worst)


def test_a_wrong_position_would_be_noticed(monkeypatch):
    """The control: keys turned as if each stood one further."""
    engine = engine_of(Mesh.single(), precision="fp64")
    right, attend = generated(engine), cache.RowCache.attend

    def wrong(self, q, kv, inputs, heads, window):
        inputs = type(inputs)(inputs.sin, inputs.cos, inputs.context)
        return attend(self, q, kv, inputs, heads, window)

    monkeypatch.setattr(cache.RowCache, "attend", wrong)
    assert generated(engine) != right


def test_e_to_the_x_is_exact_to_rounding():
    both = torch.cat((torch.linspace(-90, 90, 4001), torch.ones(4001))).view(1, -1).contiguous()
    out = torch.empty(1, 4001)
    extension.ops().swiglu(both.data_ptr(), out.data_ptr(), 1, 4001, False)
    wanted = torch.nn.functional.silu(both[:, :4001].double())
    assert torch.allclose(out.double(), wanted, rtol=5e-7, atol=1e-30)


def test_large_work_is_left_to_threads():
    pages = cache.Pages.of([list(range(64))] * 64, [1000] * 64, 1, torch.device("cpu"))
    pools = torch.zeros(16, 16, 64), torch.zeros(16, 16, 64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert cache.suits(pages, *pools)
        torch.set_num_threads(2)
        assert not cache.suits(pages, *pools)
    finally:
        torch.set_num_threads(before)
    assert not cache.suits(pages, *(pool.bfloat16() for pool in pools))
