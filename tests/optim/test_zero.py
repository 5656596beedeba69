"""ZeRO: bit for bit a data-parallel run, in less memory; the tree: the same bits for any number of data ranks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megallm.engine.config import EngineConfig
from megallm.engine.engine import Engine
from megallm.losses.language import NextToken
from megallm.models.config import ModelConfig
from megallm.optim import buckets
from megallm.optim.buckets import ALIGN, BucketParam, plan_buckets
from megallm.optim.config import OptimConfig, ZeroConfig
from megallm.optim.flat import FlatBucket
from megallm.optim.zero import IN_FLIGHT
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from tests.engine.tiny import config_of
from tests.ranks import run_ranks

MODEL = ModelConfig(  # sizes that no vector width divides
    num_layers=3, hidden_size=21, num_heads=4, num_kv_heads=2, head_size=6, ffn_hidden_size=53, vocab_size=67,
    tie_embeddings=True, init_std=0.2,
).resolve()  # fmt: skip
STEPS, ROWS, LENGTH = 3, 8, 16


def batches(step: int, mesh: Mesh, micro: int = 2) -> list[dict[str, torch.Tensor]]:
    """This data rank's contiguous share of a global batch of ROWS rows, in microbatches of `micro` rows."""
    draw = torch.Generator().manual_seed(step)
    tokens = torch.randint(MODEL.vocab_size, (ROWS, LENGTH + 1), generator=draw)
    mask = torch.rand(ROWS, LENGTH, generator=draw) < 0.8
    share = ROWS // mesh.dp.size
    rows = range(mesh.dp.rank * share, (mesh.dp.rank + 1) * share, micro)
    positions = torch.arange(LENGTH).expand(micro, LENGTH)
    return [
        {"tokens": tokens[i : i + micro, :-1], "labels": tokens[i : i + micro, 1:], "mask": mask[i : i + micro]}
        | {"positions": positions}
        for i in rows
    ]


def config(zero: ZeroConfig, clip: float = 0.0, precision: str = "fp32", **rest) -> EngineConfig:
    optim = OptimConfig(lr=1e-2, clip=clip, eps=1e-4)
    return config_of(MODEL, optim, zero=zero, precision=precision, seed=3, **rest)


def train(layout: Layout, engine_config: EngineConfig, micro: int = 2) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train here; the whole weights of this rank's stages and the losses."""
    engine = Engine.build(engine_config, Mesh.start(layout))
    losses = [engine.train_step(batches(step, engine.mesh, micro), NextToken(), 1e-2).loss for step in range(STEPS)]
    return whole_weights(engine), losses


def whole_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of the weights of this rank's stages; collective over the shard group."""
    for bucket in engine.parameters.flat:
        bucket.unshard()
    return {name: view.clone() for name, view in engine.parameters.views.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("zero", [ZeroConfig(1), ZeroConfig(1, shard_size=2), ZeroConfig(1, offload=True)])
def test_zero_1_equals_data_parallel_bit_for_bit(zero):
    """Same buckets, one reduction a step: reduce-scatter and all-gather give the bits of an all-reduce."""
    size = 4 if zero.shard_size else 2
    layout = Layout(dp=size)
    plain = run_ranks(size, train, layout, config(ZeroConfig(0)))
    sharded = run_ranks(size, train, layout, config(zero))
    close = all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(plain[0][0].values(), sharded[0][0].values(), strict=True)
    )
    if zero.shard_size:  # sums inside and across groups: another order, so not the same bits
        assert close
    else:
        assert same(plain[0][0], sharded[0][0]) and plain[0][1] == sharded[0][1]
    assert all(same(sharded[0][0], other[0]) for other in sharded)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_2_and_3_equal_data_parallel_of_the_same_cadence(stage):
    """One microbatch a rank: a reduction per microbatch is then the one reduction of the step."""
    layout = Layout(dp=2)
    plain = run_ranks(2, train, layout, config(ZeroConfig(0)), 4)
    sharded = run_ranks(2, train, layout, config(ZeroConfig(stage)), 4)
    assert same(plain[0][0], sharded[0][0]) and plain[0][1] == sharded[0][1]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_with_clipping_the_difference_is_rounding(stage):
    layout = Layout(dp=2)
    plain = run_ranks(2, train, layout, config(ZeroConfig(0), clip=0.5))
    sharded = run_ranks(2, train, layout, config(ZeroConfig(stage), clip=0.5))
    for name, weight in plain[0][0].items():
        torch.testing.assert_close(sharded[0][0][name], weight, rtol=0, atol=1e-6, msg=name)


def test_other_bits_are_noticed():
    """The control: a reduction per microbatch instead of one per step changes bits, and `same` sees it."""
    layout = Layout(dp=2)
    plain = run_ranks(2, train, layout, config(ZeroConfig(0)))
    sharded = run_ranks(2, train, layout, config(ZeroConfig(2)))
    assert not same(plain[0][0], sharded[0][0])


def test_bf16_gradient_messages_are_close_and_different():
    layout = Layout(dp=2)
    plain = run_ranks(2, train, layout, config(ZeroConfig(2)))[0][0]
    rounded = run_ranks(2, train, layout, config(ZeroConfig(2, bf16_grads=True)))[0][0]
    assert not same(plain, rounded)
    for name, weight in plain.items():
        torch.testing.assert_close(rounded[name], weight, rtol=0, atol=2e-2, msg=name)


# --- memory ----------------------------------------------------------------------------------------------------------


def live_bytes(engine: Engine) -> int:
    """Bytes of the state that lives between uses: every distinct storage of buckets and optimizer."""
    storages = {}
    for bucket in engine.parameters.flat:
        moments = [flats[bucket.index] for flats in engine.optimizer.states.values() if bucket.index in flats]
        for tensor in (bucket.params, bucket.weights, bucket.master, bucket.grads, *moments):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def measured_bytes(layout: Layout, zero: ZeroConfig) -> tuple[int, int, list[tuple[str, int]]]:
    """Live bytes, parameters, and for each moment of a step how many buckets hold their parameters."""
    engine = Engine.build(config(zero, precision="bf16"), Mesh.start(layout))
    seen: list[tuple[str, int]] = []
    parameters = engine.parameters

    def watch(name: str) -> None:
        inner = getattr(type(parameters), name)

        def outer(keys: tuple[str, ...]) -> None:
            inner(parameters, keys)
            seen.append((name, sum(b.params.untyped_storage().nbytes() > 0 for b in parameters.flat)))

        setattr(parameters, name, outer)

    for name in ("before_forward", "after_forward", "before_backward", "after_backward"):
        watch(name)
    engine.train_step(batches(0, engine.mesh), NextToken(), 1e-2)
    return live_bytes(engine), engine.num_local_params(), seen


FORMULAS = {0: lambda d: 18.0, 1: lambda d: 6 + 12 / d, 2: lambda d: 2 + 16 / d, 3: lambda d: 18 / d}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [2, 4])
def test_bytes_per_parameter_follow_the_formula(stage, size):
    """bf16 weights, fp32 gradients, master weights and two moments: 18 bytes, divided as the stage says."""
    bytes_, params, _ = run_ranks(size, measured_bytes, Layout(dp=size), ZeroConfig(stage))[0]
    members, buckets = 3 * 7 + 2, 5  # at most: each begins at a multiple of ALIGN, and each bucket ends at one a rank
    padding = 18 * ALIGN * (members + buckets * size)
    assert padding < 0.05 * 18 * params
    assert abs(bytes_ - FORMULAS[stage](size) * params) <= padding


def test_stage_3_holds_at_most_two_units_at_a_time():
    """In use and prefetched; after each use the memory is really gone."""
    _, _, seen = run_ranks(2, measured_bytes, Layout(dp=2), ZeroConfig(3))[0]
    assert max(count for _, count in seen) <= 3  # the head uses two: its norm and the tied embedding
    assert max(count for name, count in seen if name == "after_forward") == 1  # what is prefetched
    assert min(count for name, count in seen if name == "after_backward") == 0


def count_messages(layout: Layout, zero: ZeroConfig, schedule: str, micros: int) -> tuple[int, int]:
    """Gathers of one step, and the most reduce-scatters that were under way at once, on this rank."""
    rows = batches(0, Mesh.single(), 1)[:micros]
    engine = Engine.build(config(zero, schedule=schedule), Mesh.start(layout))
    gather, send, seen = FlatBucket._start_gather, FlatBucket.reduce_scatter, []
    FlatBucket._start_gather = lambda bucket: (seen.append(0), gather(bucket))[1]
    FlatBucket.reduce_scatter = lambda bucket, whole, done: (send(bucket, whole, done), seen.append(len(done)))[0]
    try:
        engine.train_step(rows, NextToken(), 1e-2)
    finally:
        FlatBucket._start_gather, FlatBucket.reduce_scatter = gather, send
    return seen.count(0), max(seen)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_stage_3_gathers_once_for_each_use_and_keeps_few_messages(schedule):
    """A microbatch: every unit's buckets forward, the head's (it shares the embedding) and the blocks' backward."""
    per_micro = (1 + 3 + 2) + (2 + 3)
    counts = {
        micros: run_ranks(2, count_messages, Layout(dp=2), ZeroConfig(3), schedule, micros)[0] for micros in (1, 4)
    }
    assert [gathers for gathers, _ in counts.values()] == [per_micro, 4 * per_micro]
    assert all(most <= IN_FLIGHT for _, most in counts.values())


class SlowWeights:
    """A source of the constant 5, slow enough on rank 0 for what was on its way to arrive meanwhile."""

    def __init__(self, pause: float, shapes: dict[str, tuple[int, ...]]) -> None:
        self.pause, self.shapes = pause, shapes

    def info(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return self.shapes[name], torch.float32

    def read_into(self, name: str, offset: Sequence[int], tensor: torch.Tensor) -> None:
        time.sleep(self.pause)
        tensor.fill_(5.0)


def load_while_weights_travel(layout: Layout, zero: ZeroConfig) -> bool:
    mesh = Mesh.start(layout)
    with patch.object(buckets, "BUCKET_BYTES", 1):
        engine = Engine(config(zero), mesh)
    time.sleep(0.3 * mesh.rank)  # so that rank 0's gathers are still waiting for rank 1 when it loads
    engine.parameters.publish()
    shapes = {name: shard.full for name, shard in engine.parameters.shards.items()}
    engine.load(SlowWeights(0.0 if mesh.rank else 0.02, shapes), optimizer=False)
    return all(bool((weight == 5.0).all()) for weight in whole_weights(engine).values())


@pytest.mark.parametrize("stage", [1, 3])
def test_weights_on_their_way_do_not_overwrite_what_is_loaded(stage):
    assert all(run_ranks(2, load_while_weights_travel, Layout(dp=2), ZeroConfig(stage)))


# --- the tree --------------------------------------------------------------------------------------------------------


def test_tree_gives_the_same_bits_for_1_2_and_4_data_ranks():
    tree = config(ZeroConfig(), clip=0.5, tree=True)
    runs = {size: run_ranks(size, train, Layout(dp=size), tree, 1)[0] for size in (1, 2, 4)}
    assert same(runs[1][0], runs[2][0]) and same(runs[1][0], runs[4][0])
    sharded = dataclasses.replace(tree, zero=ZeroConfig(1))
    assert same(runs[1][0], run_ranks(4, train, Layout(dp=4), sharded, 1)[0][0])


def test_without_the_tree_the_bits_depend_on_the_ranks():
    """The control: ordinary sums differ between 1 and 4 data ranks."""
    plain = config(ZeroConfig())
    one = run_ranks(1, train, Layout(), plain, 1)[0]
    four = run_ranks(4, train, Layout(dp=4), plain, 1)[0]
    assert not same(one[0], four[0])


# --- overlap ---------------------------------------------------------------------------------------------------------


def order_of_messages(layout: Layout, zero: ZeroConfig) -> list[str]:
    """The order of gradient messages and of backward passes through blocks in the last microbatch."""
    with patch.object(buckets, "BUCKET_BYTES", 1):
        engine = Engine.build(config(zero), Mesh.start(layout))
    log: list[str] = []
    original, gates = dist.all_reduce, type(engine.parameters).after_backward

    def spy(tensor, *args, **kwargs):
        if kwargs.get("async_op"):
            log.append("message")
        return original(tensor, *args, **kwargs)

    def gate(keys):
        log.append(keys[0])
        gates(engine.parameters, keys)

    engine.parameters.after_backward = gate
    dist.all_reduce = spy
    try:
        engine.train_step(batches(0, engine.mesh), NextToken(), 1e-2)
    finally:
        dist.all_reduce = original
    return log


def test_reductions_start_while_the_backward_pass_goes_on():
    log = run_ranks(2, order_of_messages, Layout(dp=2), ZeroConfig(0))[0]
    last = len(log) - 1 - log[::-1].index("layers.0")
    assert "message" in log[:last], "every message waited for the end of the backward pass"
    assert "message" not in log[: log.index("layers.0")], "a message left before the last microbatch"


# What a step leaves in the buffers.


def steps_between(
    zero: ZeroConfig, layout: Layout, spoil: bool, keep: bool, tree: bool = False
) -> dict[str, torch.Tensor]:
    """Weights after STEPS steps; `spoil`: between them the gradient buffers are filled, their padding too."""
    engine = Engine.build(config(zero, clip=1.0, tree=tree), Mesh.start(layout))
    for step in range(STEPS):
        if spoil:
            for bucket in engine.parameters.flat:
                bucket.grads.fill_(float("nan"))
                if keep:  # the control: as if the step had not begun
                    bucket.begin_step = lambda: None
        engine.train_step(batches(step, engine.mesh), NextToken(), 1e-2)
    assert any(bucket.plan.gaps for bucket in engine.parameters.flat), "sizes that leave padding"
    assert all(bool((b.grads == b.grads).all()) for b in engine.parameters.flat) or keep
    return whole_weights(engine)


@pytest.mark.parametrize("stage", [0, 1, 2, 3, "tree"])
def test_what_gradients_were_in_the_buffers_before_changes_no_bit(stage):
    tree = stage == "tree"
    zero, layout = ZeroConfig(0 if tree else stage), Layout(dp=2)
    for quiet, spoilt in zip(run_ranks(2, steps_between, zero, layout, False, False, tree),
                             run_ranks(2, steps_between, zero, layout, True, False, tree), strict=True):  # fmt: skip
        assert all(torch.equal(quiet[name], spoilt[name]) for name in quiet)


def test_a_step_that_keeps_the_gradients_of_the_last_is_noticed():
    quiet, spoilt = (
        run_ranks(2, steps_between, ZeroConfig(stage=2), Layout(dp=2), bad, bad)[0] for bad in (False, True)
    )
    assert not any(torch.equal(quiet[name], spoilt[name]) for name in quiet), "steps that are not finite are skipped"


def test_the_gaps_of_a_bucket_are_what_no_member_fills():
    def made(sizes: list[int], shards: int) -> list[list[tuple[int, int]]]:
        members = [BucketParam(str(i), size, "u") for i, size in enumerate(sizes)]
        return [bucket.gaps for bucket in plan_buckets(members, 4, shards)]

    assert made([ALIGN, 2 * ALIGN], 1) == [[]]
    assert made([ALIGN - 1, ALIGN + 5], 1) == [[(ALIGN - 1, ALIGN), (2 * ALIGN + 5, 3 * ALIGN)]]
    assert made([ALIGN], 3) == [[(ALIGN, 3 * ALIGN)]]
