"""Adapters in the slots of the parallel model: any layout trains and generates like one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megallm.engine.engine import Engine
from megallm.inference.answer import Answer, Ending
from megallm.inference.generator import Generator
from megallm.inference.samples import Request
from megallm.inference.sampling import Sampling
from megallm.losses.language import NextToken
from megallm.models.config import ModelConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import Shard, normal
from megallm.peft import lora
from megallm.peft.config import PeftConfig
from megallm.peft.dropout import number_samples
from megallm.peft.inject import prepare_adapters
from megallm.peft.start import start_from_base
from tests.engine.tiny import batches, config_of, share
from tests.ranks import run_ranks

TINY: dict[str, Any] = {
    "family": "llama", "num_layers": 4, "hidden_size": 24, "ffn_hidden_size": 28, "num_heads": 4,
    "num_kv_heads": 2, "vocab_size": 61, "max_positions": 64, "init_std": 0.2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "ffn_hidden_size": 14, "shared_ffn_hidden_size": 10, "aux_coef": 0.5}
LATENTS = {
    "kv_lora_dim": 7, "q_lora_dim": 9, "nope_head_size": 3, "rope_head_size": 4, "value_head_size": 5
}  # fmt: skip
MODELS = {
    "dense": TINY,
    "biased": TINY | {"tie_embeddings": True, "bias": True},
    "moe": TINY | {"moe": EXPERTS},
    "mla": TINY | {"num_kv_heads": None, "mla": LATENTS},
}
LORA = PeftConfig("lora", dim=3, alpha=5.0)
ALL = ("all-linear", "embedding", "lm_head")
METHODS = {
    "lora": LORA,
    "dora": PeftConfig("lora", dim=3, alpha=5.0, dora=True, rs=True, rank_pattern={"v_proj": 2}),
    "ends": PeftConfig("lora", dim=3, alpha=5.0, targets=ALL),
    "dropout": PeftConfig("lora", dim=3, targets=("all-linear", "lm_head"), dropout=0.3),
    "k_up": PeftConfig("lora", dim=3, targets=("*.k_up",)),
    "saved": PeftConfig("lora", dim=3, targets=("q_proj",), modules_to_save=("lm_head", "*norm")),
}
ZB_H1 = {"schedule": "zb-h1"}
FULL = {"recompute": "full"}
CASES: dict[str, tuple[Layout, str, str, dict[str, Any]]] = {
    "tp4": (Layout(tp=4), "dense", "lora", {}),
    "tp4-dora": (Layout(tp=4), "dense", "dora", {}),
    "tp2-sp-recompute": (Layout(tp=2), "biased", "lora", {"sp": True} | FULL),
    "tp2-sp-ends": (Layout(tp=2, pp=2), "biased", "ends", {"sp": True}),
    "zero3-ends-fused": (Layout(dp=2), "dense", "ends", {"zero": 3, "fused_head": "on"}),
    "tp2-dropout": (Layout(tp=2, cp=2), "dense", "dropout", {"sp": True} | FULL),
    "pp2-dropout": (
        Layout(pp=2, dp=2), "mla", "dropout", {"schedule": "interleaved", "chunks": 2, "recompute": "selective"}
    ),
    "zb-h1-tp2-sp": (Layout(pp=2, tp=2), "biased", "dora", ZB_H1 | {"sp": True, "recompute": "selective"}),
    "zb-v": (Layout(pp=2), "dense", "lora", {"schedule": "zb-v", "chunks": 2}),
    "interleaved": (Layout(pp=2), "dense", "saved", {"schedule": "interleaved", "chunks": 2}),
    "zero1": (Layout(dp=2), "dense", "saved", {"zero": 1}),
    "zero3-recompute": (Layout(dp=2), "dense", "dora", {"zero": 3} | FULL),
    "hybrid-zero2": (Layout(dp=4), "dense", "lora", {"zero": 2, "shard_size": 2}),
    "experts": (Layout(dp=2, tp=2, ep=4), "moe", "lora", {"sp": True} | FULL),
    "experts-zb-h1": (Layout(pp=2, tp=2, ep=2), "moe", "lora", ZB_H1 | {"recompute": "selective"}),
    "latents": (Layout(cp=2, tp=2), "mla", "dora", {"sp": True}),
    "only k_up": (Layout(cp=2), "mla", "k_up", {}),
}  # fmt: skip


def built(mesh: Mesh, model: str, method: str, changes: dict[str, Any]) -> Engine:
    """An engine whose adapters are at work: B does not start at zero here."""
    resolved = ModelConfig(**MODELS[model]).resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "constant", lambda value: normal(0.3))
        engine = Engine.build(
            config_of(resolved, **changes), mesh, prepare_adapters(METHODS[method], resolved, seed=3)
        )
    start_from_base(engine)
    return engine


def trained(
    layout: Layout, model: str, method: str, changes: dict[str, Any]
) -> tuple[list, list, list]:
    """Losses and norms of two steps, and this rank's pieces of the weights and moments."""
    mesh = Mesh.start(layout) if layout.world > 1 else Mesh.single()
    engine, numbers = built(mesh, model, method, changes), []
    before = [(p.name, p.tensor.clone()) for p in engine.parts()]
    for step in range(2):
        given = number_samples(batches(4, tokens=16, seed=step), 8 * step)
        stats = engine.train_step(share(given, mesh), NextToken(), 0.02)
        numbers.append((stats.loss, stats.grad_norm))
    after = [(p.name, p.offset, p.tensor.clone()) for p in engine.parts()]
    touched = [
        name
        for (name, old), (_, _, new) in zip(before, after, strict=True)
        if not torch.equal(old, new) and not name.startswith("optim.")
    ]
    return numbers, after, touched


@pytest.mark.parametrize("case", CASES)
def test_adapters_train_as_in_one_process(case):
    layout, model, method, changes = CASES[case]
    plain = {key: value for key, value in changes.items() if key == "fused_head"}
    numbers, parts, _ = trained(Layout(), model, method, plain)
    whole = {name: tensor for name, _, tensor in parts}
    assert any(".adapter." in name for name in whole if name.startswith("optim."))
    missing = {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in whole.items()}
    for ours, pieces, touched in run_ranks(layout.world, trained, layout, model, method, changes):
        for step, expected in zip(ours, numbers, strict=True):
            assert step == pytest.approx(expected, rel=1e-9)
        saved = ("head.", "final_norm.", "norm.") if method == "saved" else ()
        assert all(".adapter." in name or any(s in name for s in saved) for name in touched)
        for name, offset, tensor in pieces:
            box = tuple(slice(a, a + n) for a, n in zip(offset, tensor.shape, strict=True))
            torch.testing.assert_close(tensor, whole[name][box], rtol=1e-8, atol=1e-11)
            missing[name][box] = False
    assert not any(left.any() for left in missing.values())


def generated(layout: Layout, model: str, method: str) -> float:
    """The largest difference between log-probabilities of generation and of `log_probs`."""
    engine = built(Mesh.start(layout), model, method, {"zero": 3})
    requests = [Request(number, [1 + number, 7, 3], Answer(Ending(8))) for number in range(3)]
    with engine.parameters.gathered():
        Generator(engine.model).generate(requests, Sampling())
    gaps = []
    for request in requests:
        text = torch.tensor([[*request.prompt, *request.answer.tokens]])
        batch = {"tokens": text[:, :-1], "labels": text[:, 1:]}
        batch |= {"positions": torch.arange(10)[None], "mask": torch.ones(1, 10, dtype=torch.bool)}
        made = torch.tensor(request.answer.log_probs, dtype=torch.float64)
        gaps.append(engine.log_probs([batch])[0][0, 2:] - made)
    return float(torch.stack(gaps).abs().max())


@pytest.mark.parametrize(("model", "method"), [("dense", "ends"), ("mla", "dora")])
def test_generation_uses_the_adapters(model, method):
    assert max(run_ranks(4, generated, Layout(dp=2, tp=2), model, method)) < 1e-12


BROKEN = {
    "no partial sums": (Layout(tp=2), "_record", lambda full, dim, axis, partial, init, decay=True: Shard(
        full, {} if axis is None else {dim: axis}, (), init, decay
    )),
    "wrong rows of kv": (Layout(tp=4), "rows_of", lambda values, rows: (
        values if rows is None else values[: rows.stop - rows.start]
    )),
}  # fmt: skip


def broken(layout: Layout, what: str) -> float:
    """The gradient norm of the second step with one thing left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, BROKEN[what][1], BROKEN[what][2])
        numbers, _, _ = trained(layout, "dense", "lora", {})
    return numbers[1][1]


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_record_is_seen(what):
    layout = BROKEN[what][0]
    numbers, _, _ = trained(Layout(), "dense", "lora", {})
    for norm in run_ranks(layout.world, broken, layout, what):
        assert norm != pytest.approx(numbers[1][1], rel=1e-6)
