"""A tiny world of threads in place of processes, and random ways to cut logical tensors into parts."""

import random
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from megallm.checkpoint import store
from megallm.parallel.shard import Box, piece

torch.set_num_threads(1)


@dataclass
class World:
    rank: int
    size: int


@dataclass
class Room:
    """Where the threads of one world meet."""

    size: int
    barrier: threading.Barrier = field(init=False)
    values: dict = field(default_factory=dict)

    def __post_init__(self):
        self.barrier = threading.Barrier(self.size, timeout=20)


class ThreadMesh:
    def __init__(self, room, rank):
        self.room, self.world = room, World(rank, room.size)

    def gather_json(self, value):
        self.room.values[self.world.rank] = value
        self.room.barrier.wait()
        result = [self.room.values[r] for r in range(self.room.size)] if self.world.rank == 0 else None
        self.room.barrier.wait()
        return result

    def broadcast_json(self, value):
        if self.world.rank == 0:
            self.room.values["broadcast"] = value
        self.room.barrier.wait()
        result = self.room.values["broadcast"]
        self.room.barrier.wait()
        return result


class Cluster:
    """Runs a collective function once per rank and returns what each rank got, exceptions included."""

    def run(self, size, function):
        room, results = Room(size), [None] * size

        def body(rank):
            try:
                results[rank] = function(ThreadMesh(room, rank))
            except Exception as error:  # handed to the test
                results[rank] = error

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert not any(thread.is_alive() for thread in threads), "a rank hangs"
        return results

    def save(self, root, step, parts_of_rank, meta=None, keep=None):
        """Save with one thread per entry of `parts_of_rank`; raises what rank 0 raised."""
        results = self.run(
            len(parts_of_rank),
            lambda mesh: store.save(root, step, parts_of_rank[mesh.world.rank], meta, mesh, keep),
        )
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]


@pytest.fixture
def cluster():
    return Cluster()


def cut_axis(name, tensor, size, dim):
    """One part per rank: the uneven pieces of one dim."""
    parts = []
    for rank in range(size):
        begin, end = piece(tensor.shape[dim], size, rank)
        offset = tuple(begin if d == dim else 0 for d in range(tensor.dim()))
        parts.append([store.Part(name, tuple(tensor.shape), offset, tensor.narrow(dim, begin, end - begin))])
    return parts


def random_boxes(shape, rng, pieces):
    """Disjoint boxes that cover `shape`: boxes halved at random places along random dims."""
    boxes = [Box((0,) * len(shape), tuple(shape))]
    for _ in range(pieces):
        box = boxes.pop(rng.randrange(len(boxes)))
        dims = [d for d, n in enumerate(box.shape) if n > 1]
        if not dims:
            boxes.append(box)
            continue
        dim = rng.choice(dims)
        cut = rng.randrange(1, box.shape[dim])
        for begin, count in ((0, cut), (cut, box.shape[dim] - cut)):
            offset = tuple(o + begin * (d == dim) for d, o in enumerate(box.offset))
            boxes.append(Box(offset, tuple(count if d == dim else n for d, n in enumerate(box.shape))))
    return boxes


@pytest.fixture
def cuts():
    class Cuts:
        axis = staticmethod(cut_axis)
        boxes = staticmethod(random_boxes)

    return Cuts


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(11)
    return {
        "layers.0.mlp.down.weight": torch.randn(12, 10, generator=generator),
        "layers.0.norm.weight": torch.randn(12, generator=generator).to(torch.bfloat16),
        "optim.exp_avg.layers.0.norm.weight": torch.randn(12, generator=generator, dtype=torch.float64),
        "counter": torch.tensor(7, dtype=torch.int64),
    }


@pytest.fixture
def small(tmp_path, cluster, tensors) -> Path:
    """A checkpoint of two shard files, step 5 of tmp_path/checkpoints."""
    parts = [[], []]
    for name, tensor in tensors.items():
        if tensor.dim() == 0:
            parts[0].append(store.Part(name, (), (), tensor))
        else:
            for rank, own in enumerate(cut_axis(name, tensor, 2, 0)):
                parts[rank] += own
    return cluster.save(tmp_path / "checkpoints", 5, parts, meta={"step": 5, "seed": 1.25})


@pytest.fixture
def rng():
    return random.Random(1234)
