"""A base in 4 bit: the same values at every layout, no copy of it, and adapters that train over it."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.engine.engine import Engine
from megallm.losses.language import NextToken
from megallm.models.config import ModelConfig
from megallm.ops.nf4 import MatrixRange, Nf4
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.peft.config import PeftConfig
from megallm.peft.inject import prepare_adapters
from megallm.peft.merge import MergedSource, merge
from megallm.peft.start import start_from_base
from tests.engine.tiny import batches, config_of, share, state_of
from tests.ranks import run_ranks

TINY: dict[str, Any] = {
    "family": "llama", "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_heads": 4,
    "num_kv_heads": 2, "vocab_size": 61, "max_positions": 64, "init_std": 0.2,
}  # fmt: skip
MODELS = {
    "dense": TINY,
    "odd": TINY | {"hidden_size": 40, "ffn_hidden_size": 92},  # rows that are no whole blocks
    "moe": TINY | {"moe": {"num_experts": 4, "ffn_hidden_size": 24, "shared_ffn_hidden_size": 20}},
    "mla": TINY | {
        "num_kv_heads": None,
        "mla": {"kv_lora_dim": 12, "nope_head_size": 6, "rope_head_size": 4, "value_head_size": 6},
    },
}  # fmt: skip
LORA = PeftConfig("lora", dim=4, alpha=8.0)
QLORA = replace(LORA, quantize="nf4")


def model(name: str) -> ModelConfig:
    return ModelConfig(**MODELS[name]).resolve()


def rounded(engine: Engine) -> None:
    """Give an ordinary engine the weights that a base in 4 bit has."""
    for name, shard, _, tensor in engine.masters():
        inside = name.startswith("layers.") and ".adapter." not in name and tensor.dim() > 1
        if inside and not name.endswith("router.weight"):
            rows, columns = shard.full[-2:]
            for matrix in tensor.view(-1, rows, columns):
                piece = MatrixRange((0, rows), (0, columns), (rows, columns))
                matrix.copy_(Nf4.of(matrix, piece).dequantize(matrix.dtype))
    engine.parameters.publish()


def steps(engine: Engine, mesh: Mesh) -> tuple[list, list]:
    numbers = []
    for step in range(2):
        given = share(batches(4, tokens=16, seed=step), mesh)
        stats = engine.train_step(given, NextToken(), 0.02)
        numbers.append((stats.loss, stats.grad_norm))
    return numbers, [(p.name, p.offset, p.tensor.clone()) for p in engine.parts()]


def trained(layout: Layout, name: str, changes: dict[str, Any]) -> tuple[list, list]:
    mesh = Mesh.start(layout) if layout.world > 1 else Mesh.single()
    engine = Engine.build(config_of(model(name), **changes), mesh, prepare_adapters(QLORA, model(name)))
    return steps(engine, mesh)


CASES: dict[str, tuple[Layout, str, dict[str, Any]]] = {
    "tp4": (Layout(tp=4), "dense", {}),
    "tp2-odd-recompute": (Layout(tp=2), "odd", {"sp": True, "recompute": "full"}),
    "zero3": (Layout(dp=2), "dense", {"zero": 3}),
    "zb-v": (Layout(pp=2), "dense", {"schedule": "zb-h1"}),
    "experts": (Layout(dp=2, tp=2, ep=4), "moe", {"sp": True, "zero": 2}),
    "latents": (Layout(cp=2, tp=2), "mla", {"sp": True}),
}


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[list, dict[str, Tensor]]]:
    """What an ordinary frozen base with the same rounded values trains to, in one process."""
    found = {}
    for name in MODELS:
        engine = Engine.build(config_of(model(name)), Mesh.single(), prepare_adapters(LORA, model(name)))
        plain = steps(engine, Mesh.single())[0]
        engine = Engine.build(config_of(model(name)), Mesh.single(), prepare_adapters(LORA, model(name)))
        rounded(engine)
        numbers, parts = steps(engine, Mesh.single())
        assert abs(numbers[1][0] - plain[1][0]) > 1e-4  # the rounding is not nothing
        found[name] = numbers, {part: tensor for part, _, tensor in parts}
    return found


@pytest.mark.parametrize("case", CASES)
def test_trains_as_the_rounded_base_in_one_process(case, expected):
    layout, name, changes = CASES[case]
    numbers, whole = expected[name]
    for ours, pieces in run_ranks(layout.world, trained, layout, name, changes):
        for step, want in zip(ours, numbers, strict=True):
            assert step == pytest.approx(want, rel=1e-9)
        for part, offset, tensor in pieces:
            box = tuple(slice(a, a + n) for a, n in zip(offset, tensor.shape, strict=True))
            torch.testing.assert_close(tensor, whole[part][box], rtol=1e-8, atol=1e-11)
        assert not any(part.endswith("attention.q.weight") for part, _, _ in pieces)


def test_filled_from_another_engine_and_kept_in_half_a_byte():
    """From the weights of another run; nothing as large as a matrix stays beside its codes."""
    big = model("dense")
    source = Engine.build(config_of(big, precision="bf16"), Mesh.single())
    held = {name: tensor for name, tensor in state_of(source).items() if "optim." not in name}
    before = tensors()
    engine = Engine.build(
        config_of(big, precision="bf16", seed=6), Mesh.single(), prepare_adapters(QLORA, big)
    )
    engine.fill(Held(held))
    weights = engine.model.quantized
    for name, weight in weights.items():
        whole = held[name].view(-1, *held[name].shape[-2:])
        piece = MatrixRange((0, whole.shape[1]), (0, whole.shape[2]), tuple(whole.shape[1:]))
        want = torch.stack([Nf4.of(x, piece).dequantize(torch.float32) for x in whole])
        assert torch.equal(weight.dequantize(torch.float32), want.view(held[name].shape))
    total = sum(weight.numel for weight in weights.values())
    assert total == sum(held[name].numel() for name in weights)
    assert sum(weight.num_bytes for weight in weights.values()) <= 0.55 * total
    engine.train_step(batches(2, tokens=16), NextToken(), 0.02)
    del whole, want
    # All that came into being is the codes, the buckets of everything else, and its optimizer's.
    flat = [x for b in engine.parameters.flat for x in (b.params, b.master, b.grads)]
    flat += [x for each in engine.optimizer.states.values() for x in each.values()]
    others = storages(tensors()).items() - storages(before).items() - storages(flat).items()
    assert 0.5 * total <= sum(size for _, size in others) <= 0.6 * total
    assert not any(name in engine.parameters.shapes for name in weights)


def tensors() -> list[Tensor]:
    """Every tensor that is alive."""
    gc.collect()
    return [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter)]


def storages(found: list[Tensor]) -> dict[int, int]:
    """Bytes of the memory behind tensors, by address."""
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found if not x.is_meta}


def test_dora_reads_the_rounded_base_and_cannot_be_merged_into_it():
    config = model("dense")
    norms = []
    for wanted in (replace(QLORA, dora=True), replace(LORA, dora=True)):
        engine = Engine.build(config_of(config), Mesh.single(), prepare_adapters(wanted, config))
        if wanted.quantize == "none":
            rounded(engine)
        start_from_base(engine)
        norms.append(engine.train_step(batches(1), NextToken(), 0.02).grad_norm)
        if wanted.quantize == "nf4":
            with pytest.raises(UsageError, match="4 bit"):
                merge(engine)
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)


@pytest.mark.parametrize("name", ["dense", "odd", "moe"])
def test_a_merged_folder_is_the_model_that_was_trained(name):
    """`megallm merge` takes what the 4-bit codes stand for; into the weights that were quantised it is another."""
    config, gaps = model(name), []
    base = Held(state_of(Engine.build(config_of(config), Mesh.single())))
    engine = Engine.build(config_of(config), Mesh.single(), prepare_adapters(QLORA, config))
    engine.fill(base)
    engine.train_step(batches(2), NextToken(), 0.02)
    adapter = Held({n: x for n, x in state_of(engine).items() if ".adapter." in n and "optim." not in n})
    expected = engine.log_probs(batches(1))[0]
    for wanted in (QLORA, LORA):
        plain = Engine.build(config_of(config), Mesh.single())
        plain.fill(MergedSource(base, adapter, wanted, config))
        gaps.append(float((plain.log_probs(batches(1))[0] - expected).abs().max()))
    assert gaps[0] < 1e-11 and gaps[1] > 1e-3


@pytest.mark.parametrize("method", ["prefix", "prompt", "p-tuning", "houlsby", "ia3"])
def test_what_is_no_part_of_a_matrix_is_not_merged(method):
    """Virtual tokens would be lost without a word."""
    config, wanted = model("dense"), PeftConfig(method, virtual_tokens=3)
    engine = Engine.build(config_of(config), Mesh.single(), prepare_adapters(wanted, config))
    held = Held({name: x for name, x in state_of(engine).items() if "optim." not in name})
    with pytest.raises(UsageError, match="is no part of a matrix: only those of lora and adalora"):
        MergedSource(held, held, wanted, config)


class Held:
    """Weights in memory as a source."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self.tensors[name].shape), self.tensors[name].dtype

    def read_into(self, name: str, offset: tuple[int, ...], tensor: Tensor) -> None:
        box = tuple(slice(a, a + n) for a, n in zip(offset, tensor.shape, strict=True))
        tensor.copy_(self.tensors[name][box])
