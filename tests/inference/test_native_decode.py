"""Generation by the C++ extension gives the tokens and log-probabilities of the way in torch: a whole stage in one
call, for each kind of CPU, and the steps between the products."""

from __future__ import annotations

import pytest
import torch

from megallm.base import extension
from megallm.base.errors import CheckpointError
from megallm.inference import cache
from megallm.inference.generator import Generator
from megallm.inference.native import NativeStage
from megallm.inference.samples import Request
from megallm.inference.sampling import Sampling, sample
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


def counted(monkeypatch, owner, name: str) -> list[int]:
    """A list that grows with every call of a function."""
    calls, function = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: calls.append(1) or function(*args))
    return calls


def model_of(name: str) -> ModelConfig:
    return ModelConfig(
        family="llama", num_layers=2, hidden_size=24, ffn_hidden_size=40, vocab_size=50, max_positions=128,
        init_std=0.3, **SHAPES[name],
    ).resolve()  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_tokens_and_log_probs_are_those_of_torch(monkeypatch, name, precision):
    engine = engine_of(Mesh.single(), model=model_of(name), precision=precision)
    whole, steps = counted(monkeypatch, NativeStage, "run"), counted(monkeypatch, decode, "native_step")
    native = generated(engine)
    assert len(whole) > 20
    assert [tokens for tokens, _ in generated(engine, 2)] == [tokens for tokens, _ in native], "rows do not meet"
    assert not steps
    monkeypatch.setattr(NativeStage, "suits", lambda self, rows: False)
    by_step = generated(engine)
    assert len(steps) > 40
    monkeypatch.setattr(extension, "ops", lambda: None)
    whole.clear(), steps.clear()
    plain = generated(engine)
    assert not steps and not whole
    worst = 1e-12 if precision == "fp64" else 2e-5
    for found in (native, by_step):
        for (ours, log_probs), (theirs, wanted) in zip(found, plain, strict=True):
            assert ours == theirs
            assert torch.allclose(torch.tensor(log_probs), torch.tensor(wanted), rtol=0, atol=worst)


@pytest.mark.parametrize("isa", ["v4", "v3", "plain"])
@pytest.mark.parametrize("batch", [1, 7, 40])
def test_every_kind_of_cpu_computes_the_same(monkeypatch, isa, batch):
    """A kind that this CPU lacks is computed by the plainest one. 40 rows are two panels, chunks of texts more."""
    engine, make = engine_of(Mesh.single(), model=model_of("gqa"), precision="fp64"), NativeStage.__init__
    asked = [Request.of(n, [n, 7, 3] * (1 + n % 5), 12) for n in range(40)]
    sampling = Sampling(12, 0.9, seed=5)
    wanted = Generator(engine.model, 40).generate(asked, sampling)
    monkeypatch.setattr(NativeStage, "__init__", lambda self, *args: make(self, *args, isa=isa))
    again = [Request.of(each.id, each.prompt, 12) for each in asked]
    for ours, theirs in zip(Generator(engine.model, batch).generate(again, sampling), wanted, strict=True):
        assert ours.tokens == theirs.tokens
        assert torch.allclose(torch.tensor(ours.log_probs), torch.tensor(theirs.log_probs), rtol=0, atol=1e-12)


def test_draws_are_those_of_torch(monkeypatch):
    logits = torch.randn(20, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 3
    draws = torch.linspace(0.001, 0.999, 20, dtype=torch.float64)
    logits[3, 5:] = -torch.inf
    draws[3] = 1 - 1e-16
    ways = Sampling(temperature=1.0), Sampling(temperature=0.7), Sampling(temperature=0.0)
    for kind, worst in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        native = [sample(logits.to(kind), each, draws) for each in ways]
        with monkeypatch.context() as patch:
            patch.setattr(extension, "ops", lambda: None)
            plain = [sample(logits.to(kind), each, draws) for each in ways]
        for ours, theirs in zip(native, plain, strict=True):
            assert torch.equal(ours.tokens, theirs.tokens)
            for found, wanted in zip(ours[1:], theirs[1:], strict=True):
                assert torch.allclose(found, wanted, rtol=0, atol=worst)
    logits[7, 9] = torch.nan
    with pytest.raises(CheckpointError, match="not numbers"):
        sample(logits, ways[0], draws)


def test_a_wrong_position_would_be_noticed(monkeypatch):
    """The control: keys turned as if each stood one further."""
    monkeypatch.setattr(NativeStage, "suits", lambda self, rows: False)
    engine = engine_of(Mesh.single(), precision="fp64")
    right, attend = generated(engine), cache.RowCache.attend

    def wrong(self, q, kv, inputs, heads, window):
        inputs = type(inputs)(inputs.sin, inputs.cos, inputs.context)
        return attend(self, q, kv, inputs, heads, window)

    monkeypatch.setattr(cache.RowCache, "attend", wrong)
    assert generated(engine) != right


def test_a_wrong_position_of_a_whole_stage_would_be_noticed(monkeypatch):
    """The control: the tables of sines and cosines the wrong way round."""
    engine = engine_of(Mesh.single(), precision="fp64")
    right, make = generated(engine), NativeStage.__init__

    def wrong(self, stage, cache, tables):
        make(self, stage, cache, [(sin, cos) for cos, sin in tables])

    monkeypatch.setattr(NativeStage, "__init__", wrong)
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
