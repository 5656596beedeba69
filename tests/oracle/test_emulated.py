"""Layouts, checkpoints, generation and trainers by nccl's rules (`megallm oracle --device emulated` runs the whole
table so), and what a step costs there: waits of the host, and memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode

from megallm.checkpoint import store
from megallm.checkpoint.reader import CheckpointReader
from megallm.engine.engine import Engine
from megallm.losses.language import NextToken
from megallm.models.sections import MoeConfig
from megallm.oracle.compare import run_row
from megallm.oracle.emulated_device import is_on_host, tensors_of
from megallm.oracle.fine_tuning import FINE_TUNING
from megallm.oracle.table import ROWS
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from tests.engine.test_engine_generator import CASES, check, rolled_out
from tests.engine.tiny import MODEL, batches, engine_of, share
from tests.ranks import pool, run_ranks
from tests.training.test_grpo import SOME, train

pytestmark = pytest.mark.oracle
emulated = partial(run_ranks, device="emulated", timeout=240.0)

# One of each kind of message: every axis, schedule, stage of ZeRO, transport of cp, experts, ties, FP8, offload.
SLICE = [
    "zero3-dp2", "zero2-dp2", "zero1-dp3-tied-pp2", "tp2-sp", "pp2", "interleaved", "zb-v-tied-kv", "tree-dp2",
    "dp2-cp2-ulysses-one-token", "cp4-ring-packed-recompute-full", "moe-ep2-over-tp-sp", "fp8-moe-ep2-zero2",
    "muon-zero2-dp2-tp2", "adafactor-zero3-dp3-tied-pp2",
]  # fmt: skip
BY_NAME = {row.name: row for row in (*ROWS, *FINE_TUNING)}


@pytest.mark.parametrize("name", SLICE)
def test_a_row_equals_the_reference_by_the_rules_of_nccl(name: str) -> None:
    verdict = run_row(pool(), BY_NAME[name], device="emulated")
    assert verdict.passed, verdict.problem or verdict.failures


@pytest.mark.parametrize("case", ["zb-v-zero2", "experts-pp"])
def test_generation(case: str) -> None:
    layout, model, options = CASES[case]
    expected = rolled_out(Layout(), model, {}, {"batch": 1})
    for found in emulated(
        layout.world, rolled_out, layout, model, options, {"batch": 4, "chunk": 8}, 1
    ):
        check(found, expected)


def test_a_trainer_with_rollouts() -> None:
    alone = train(Layout(), False, 0, SOME)
    for result in emulated(4, train, Layout(tp=2, pp=2), False, 1, SOME | {"sp": True}):
        assert result["said"] == alone["said"]
        np.testing.assert_allclose(result["numbers"], alone["numbers"], rtol=1e-9, atol=1e-12)


def saved_and_loaded(root: str, layout: Layout, other: Layout, options: dict[str, Any]) -> list[float]:
    """The losses of two steps after a checkpoint, once going on, and once read at another layout."""
    mesh = Mesh.start(layout)
    engine = engine_of(mesh, **options)
    text = batches(4)
    engine.train_step(share(text, mesh), NextToken(), 0.05)
    folder = store.save(root, 1, list(engine.parts()), {"engine": engine.counters()}, mesh)
    losses = [engine.train_step(share(text, mesh), NextToken(), 0.05).loss for _ in range(2)]
    again = engine_of(Mesh.start(other), zero=1)
    again.load(CheckpointReader(folder))
    return losses + [again.train_step(share(text, again.mesh), NextToken(), 0.05).loss for _ in range(2)]


def test_a_checkpoint_goes_on_at_another_layout(tmp_path) -> None:
    options = {"pp": 2, "dp": 2, "zero": 3}
    for losses in emulated(
        4, saved_and_loaded, str(tmp_path), Layout(pp=2, dp=2), Layout(dp=2, tp=2), options
    ):
        assert losses[:2] == pytest.approx(losses[2:], rel=1e-12)


# What a step costs

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")


class Watch(TorchDispatchMode):
    """Counts what kernels would wait for, also below Python, and what is allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.allocated: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        there = [x for x in tensors_of(args) if not is_on_host(x)]
        index = name in ("index", "index_put_") and any(x.dtype == torch.bool for x in tensors_of(args[1]))
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if there and (name in WAITING or index or unsized):
            self.waits.append(name)
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in dense(args)}
        self.allocated += [x.numel() for x in dense(result) if x.untyped_storage().data_ptr() not in given]
        return result


def dense(values: Any) -> list[Tensor]:
    """The tensors with memory of their own; the gradient of an embedding is sparse."""
    return [x for x in tensors_of(values) if x.layout == torch.strided]


@contextmanager
def window(engine: Engine, watch: Watch) -> Iterator[list[tuple[str, str]]]:
    """The waits between the first forward pass and the last reduction."""
    rules = _get_current_function_mode()
    found: list[tuple[str, str]] = []
    run, finish = engine.model.run_schedule, engine.parameters.finish

    def begin(*args: Any, **kwargs: Any) -> Any:
        rules.waits.clear()
        watch.waits.clear()
        return run(*args, **kwargs)

    def end() -> None:
        finish()
        found.extend(rules.waits)
        found.extend((name, "a kernel") for name in watch.waits)

    engine.model.run_schedule, engine.parameters.finish = begin, end
    try:
        yield found
    finally:
        engine.model.run_schedule, engine.parameters.finish = run, finish


def cost_of_step(layout: Layout, options: dict[str, Any], packed: bool) -> tuple[list, list[int]]:
    """Where the host waited inside the third of three steps, and what each of the last two allocated."""
    mesh = Mesh.start(layout)
    engine = engine_of(mesh, **{axis: layout.size(axis) for axis in ("pp", "cp", "tp", "ep")}, **options)
    text = batches(4, rows=1 if packed else 2, tokens=16)
    for batch in text if packed else ():
        batch["cu_seqlens"] = torch.tensor([0, 5, 16], dtype=torch.int32)
    mine, sizes = share(text, mesh), []
    for _ in range(3):
        with Watch() as watch, window(engine, watch) as found:
            engine.train_step(mine, NextToken(), 0.01)
        sizes.append(sum(watch.allocated))
    return found, sizes[1:]


MODEL_MOE = MoeConfig(num_experts=4, ffn_hidden_size=16)
DENSE = {
    "dp2-zero3": (Layout(dp=2), {"zero": 3}, False),
    "pp2-zb-v": (Layout(pp=2), {"schedule": "zb-v", "chunks": 2}, False),
    "tp2-sp-fused": (Layout(tp=2), {"sp": True, "fused_head": "on"}, False),
    "cp2-packed": (Layout(cp=2), {}, True),
    "offload": (Layout(dp=2), {"zero": 1, "zero_offload": True}, False),
    "fp32-recompute": (Layout(dp=2), {"precision": "fp32", "recompute": "full"}, False),
}  # fmt: skip
LONGER = dataclasses.replace(MODEL, num_layers=4)


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_step_never_waits_for_the_device_and_allocates_the_same_each_time(name: str) -> None:
    layout, options, packed = DENSE[name]
    for waits, (before, after) in emulated(
        layout.world, cost_of_step, layout, options | {"model": LONGER}, packed
    ):
        assert waits == []
        assert before == after > 0


def waits_with_experts(layout: Layout, precision: str = "fp32", **moe: Any) -> list[str]:
    """Where the host waits in a step of two layers and two microbatches a rank, by place."""
    model = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL_MOE, **moe), tie_embeddings=False).resolve()
    options = {"model": model, "precision": precision}
    (waits, _), *_ = emulated(2, cost_of_step, layout, options, False)
    return [place for _, place in waits if place != "a kernel"]


@pytest.mark.parametrize("moe", [{}, {"capacity": 0.5}, {"shared_ffn_hidden_size": 16, "selection_bias": True}])
def test_experts_on_one_rank_wait_for_nothing_where_the_kernel_takes_the_sizes(moe: dict[str, Any]) -> None:
    assert waits_with_experts(Layout(dp=2), **moe) == []


@pytest.mark.parametrize("moe", [{}, {"capacity": 0.5}])
def test_an_exchange_over_ep_waits_once_a_layer_and_microbatch_for_its_sizes(moe: dict[str, Any]) -> None:
    """Also where copies are dropped, or the kernel does not fit: the host knows the rows of each expert by then."""
    for sizes in ({}, {"ffn_hidden_size": 18}):
        places = waits_with_experts(Layout(dp=2, ep=2), **moe, **sizes)
        assert places == ["parallel/expert.py:plan_dispatch"] * (MODEL.num_layers * 2)


def test_the_loop_over_experts_waits_once_a_layer_and_microbatch() -> None:
    """Rows that are no multiple of 16 bytes, or float64: the host has to know how many rows each expert has."""
    for moe in ({"ffn_hidden_size": 18}, {"ffn_hidden_size": 18, "capacity": 0.5}):
        assert waits_with_experts(Layout(dp=2), **moe) == ["ops/grouped_gemm.py:sizes"] * (MODEL.num_layers * 2)


def test_a_wait_inside_a_step_would_be_seen() -> None:
    (waits, _), *_ = emulated(2, cost_of_a_loss_that_reads)
    assert [name for name, _ in waits].count("item") == 2


class Reading(NextToken):
    """A loss that looks at its own value."""

    def __call__(self, outputs, batch):
        terms = super().__call__(outputs, batch)
        next(iter(terms.losses.values())).item()
        return terms


def cost_of_a_loss_that_reads() -> tuple[list, None]:
    mesh = Mesh.start(Layout(dp=2))
    engine = engine_of(mesh)
    with Watch() as watch, window(engine, watch) as found:
        engine.train_step(share(batches(4), mesh), Reading(), 0.01)
    return found, None
