"""No rank ever holds the whole model: what is alive while an engine is built, saved and loaded, at tp=2 x pp=2."""

from __future__ import annotations

import gc
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megallm.checkpoint import store
from megallm.checkpoint.reader import CheckpointReader
from megallm.engine import engine as engine_module
from megallm.engine.config import EngineConfig
from megallm.engine.engine import Engine
from megallm.models.compute import ComputeConfig
from megallm.models.config import ModelConfig
from megallm.models.parallel_model import ParallelModel
from megallm.parallel.config import LayoutConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from tests.ranks import run_ranks

LAYOUT = Layout(pp=2, tp=2)
# Sixteen layers of equal matrices, so that one tensor is small beside a rank's quarter of the model.
MODEL = ModelConfig(
    family="llama", num_layers=16, hidden_size=96, ffn_hidden_size=256, num_heads=4, num_kv_heads=4, vocab_size=512
).resolve()
CONFIG = EngineConfig(MODEL)
FP32, STATES = 4, 4  # bytes of a number; weights, gradients and two moments
SLACK = 1 << 19  # Python's own objects, manifests, receive buffers


class Idle(TorchDispatchMode):
    """Watches nothing: the first mode of a process imports a great deal, which nobody wants to count."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


# Threads that write files or belong to gloo let go of memory in their own time, without Python's lock: switching
# tracemalloc meanwhile can end a process by SIGSEGV.
QUIET_SECONDS = 0.1


class Alive(TorchDispatchMode):
    """The most bytes of tensor storage alive at once (by weak references), and of numpy and Python (tracemalloc).

    Storage of the `known` tensors was there before and does not count.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size and address not in self.seen:
            self.seen.add(address)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self.seen.discard(address)
        self.now -= size

    def __enter__(self) -> Alive:
        with Idle():
            torch.ones(1).mul(2.0)
        gc.collect()
        time.sleep(QUIET_SECONDS)
        tracemalloc.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.python_peak = tracemalloc.get_traced_memory()[1]
        time.sleep(QUIET_SECONDS)
        tracemalloc.stop()

    @property
    def bytes(self) -> int:
        """An upper bound: both peaks, whether they came together or not."""
        return self.peak + self.python_peak


def warm_mesh() -> Mesh:
    """A mesh on which a small engine was built before: what torch and Python import on first use is not counted."""
    mesh = Mesh.start(LAYOUT)
    Engine.build(replace(CONFIG, model=replace(MODEL, num_layers=2)), mesh)
    return mesh


def build_peak(greedy: bool) -> tuple[int, int]:
    """(most bytes alive while the engine is built, local parameters)."""
    mesh = warm_mesh()
    original = engine_module.initial_values
    if greedy:
        engine_module.initial_values = hoard(original)
    with Alive() as alive:
        engine = Engine.build(CONFIG, mesh)
    engine_module.initial_values = original
    return alive.bytes, engine.num_local_params()


def hoard(initial: Callable) -> Callable:
    """Initial values that are made whole and kept: what a rank that materialises the model would do."""
    kept = {}

    def values(name: str, shard: Any, offset: tuple, shape: tuple, seed: int) -> torch.Tensor:
        kept[name] = initial(name, shard, (0,) * len(shard.full), shard.full, seed)
        return kept[name][tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]

    return values


def save_and_load_peaks(root: str) -> tuple[int, int, int, int]:
    """(bytes alive beside the engine while saving, in all while loading, in all for inference, local parameters)."""
    mesh = warm_mesh()
    engine = Engine.build(CONFIG, mesh)
    store.save(root, 1, list(engine.parts()), {}, mesh)
    with Alive(part.tensor for part in engine.parts()) as saving:
        step = store.save(root, 2, list(engine.parts()), {"engine": engine.counters()}, mesh)
    del engine
    with Alive() as loading, CheckpointReader(step) as reader:
        loaded = Engine.build(CONFIG, mesh)
        loaded.load(reader)
    local = loaded.num_local_params()
    del loaded
    with Alive() as inference, CheckpointReader(step) as reader:
        model = ParallelModel(MODEL, LayoutConfig(), ComputeConfig(), mesh).load(reader)
    assert sum(x.numel() for stage in model.stages.values() for x in stage.parameters()) == local
    return saving.bytes, loading.bytes, inference.bytes, local


def largest_shard() -> int:
    """Elements of the largest local tensor of any rank: the gate and up of a layer, or half of the vocabulary."""
    return max(2 * MODEL.ffn_hidden_size, MODEL.vocab_size) * MODEL.hidden_size // 2


def test_building_holds_the_shard_and_one_tensor():
    """Initial values are made in float64 from 64-bit draws: one tensor costs a few times its size."""
    one = 6 * 8 * largest_shard()
    for peak, local in run_ranks(4, build_peak, False):
        assert local < 0.3 * MODEL.num_params()
        assert STATES * FP32 * local <= peak <= STATES * FP32 * local + one + SLACK, (peak, local)


def test_a_rank_that_makes_the_whole_model_is_noticed():
    one = 6 * 8 * largest_shard()
    for peak, local in run_ranks(4, build_peak, True):
        assert peak > STATES * FP32 * local + one + SLACK


def test_saving_and_loading_hold_the_shard_and_one_piece(tmp_path: Path):
    one = 6 * 8 * largest_shard()
    for saving, loading, inference, local in run_ranks(4, save_and_load_peaks, str(tmp_path)):
        # Rank 0 merges the tables of all pieces; a copy of the state would be 3 x FP32 x local more.
        assert saving <= one + 4 * SLACK < 3 * FP32 * local
        assert loading <= STATES * FP32 * local + one + 2 * SLACK  # the manifest of all tensors
        assert FP32 * local <= inference <= FP32 * local + one + SLACK
        assert FP32 * local <= 0.35 * FP32 * MODEL.num_params()


@pytest.mark.parametrize("extra", [0, 1 << 22])
def test_the_count_sees_a_tensor_that_lives_and_forgets_one_that_died(extra):
    with Alive() as alive:
        torch.ones(1 << 20).mul(2.0)
        kept = torch.ones(1 << 18)
        other = torch.zeros(extra)
    assert alive.peak == max(8 << 20, (1 << 20) + 4 * extra)
    assert alive.now == kept.nbytes + other.nbytes
