"""Bytes of frozen weights, adapters and optimizer: what is planned is what is alive."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megallm.engine.engine import Engine
from megallm.engine.footprint import Footprint, measure_bytes, plan_bytes
from megallm.losses.language import NextToken
from megallm.models.config import ModelConfig
from megallm.optim.config import OptimConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.peft.config import PeftConfig
from megallm.peft.inject import prepare_adapters
from tests.engine.tiny import batches, config_of, share
from tests.peft.test_quantized import storages, tensors
from tests.ranks import run_ranks

MODEL = ModelConfig(
    family="llama", num_layers=2, hidden_size=64, ffn_hidden_size=256, num_heads=4, num_kv_heads=2, vocab_size=64,
    max_positions=64, tie_embeddings=True,
).resolve()  # fmt: skip
LORA = PeftConfig("lora", dim=16)
WANTED = {"all": PeftConfig(), "lora": LORA, "qlora": replace(LORA, quantize="nf4")}
PADDING = 0.03  # each parameter begins at a multiple of 16 elements, and buckets end at one a rank


def built(mesh: Mesh, kind: str, stage: int) -> Engine:
    optim = OptimConfig(clip=1.0)
    config = config_of(MODEL, optim, zero=stage, precision="bf16")
    return Engine.build(config, mesh, prepare_adapters(WANTED[kind], MODEL))


def measured(layout: Layout, kind: str, stage: int) -> tuple[Footprint, Footprint]:
    """Planned before the first step, measured after it."""
    engine = built(Mesh.start(layout), kind, stage)
    planned = plan_bytes(engine)
    engine.train_step(share(batches(2), engine.mesh), NextToken(), 0.01)
    return planned, measure_bytes(engine)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", WANTED)
def test_planned_is_measured(kind, stage):
    for planned, found in run_ranks(2, measured, Layout(dp=2), kind, stage):
        for want, held in zip(planned, found, strict=True):
            assert want <= held <= want * (1 + PADDING) + 64


def test_bytes_a_parameter():
    """2 for a frozen one in bf16, 18 for an adapter's, at most 0.55 in 4 bit."""
    lora, qlora = (plan_bytes(built(Mesh.single(), kind, 0)) for kind in ("lora", "qlora"))
    assert lora.frozen == 2 * lora.frozen_params
    assert lora.trained + lora.gradients + lora.optimizer == 18 * lora.trained_params
    assert (lora.frozen_params, lora.trained_params) == (qlora.frozen_params, qlora.trained_params)
    rest = MODEL.vocab_size * 64 + 5 * 64  # the embedding and norms stay in bf16
    assert (qlora.frozen - 2 * rest) / (qlora.frozen_params - rest) <= 0.55
    assert qlora.quantized_params == qlora.frozen_params - rest and qlora.frozen == qlora.quantized + 2 * rest
    told = qlora.lines()[0]
    assert f"({qlora.quantized_params:,} of them in 4 bit, " in told and "0.516 bytes each)" in told
    said = " ".join(lora.lines())
    assert "2.00 bytes each" in said and "18.00 bytes each (weights" in said


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_nothing_else_is_alive(kind):
    """All storages that came into being with an engine are those that are counted."""
    before = storages(tensors())
    engine = built(Mesh.single(), kind, 0)
    engine.train_step(batches(2), NextToken(), 0.01)
    alive = sum(size for _, size in storages(tensors()).items() - before.items())
    found = measure_bytes(engine)
    assert found.total <= alive <= 1.02 * found.total
    kept = engine.parameters.flat[0].params.float()  # negative control
    more = sum(size for _, size in storages(tensors()).items() - before.items())
    assert more > 1.02 * found.total and kept is not None
