"""Seconds of saving and loading a state: ours, at once and beside training, beside torch's.

A state of fp32 matrices of `--megabytes` in one process, on one disk: `megallm.checkpoint` (`store.save`,
`AsyncSaver`), `torch.distributed.checkpoint` (`save`, `async_save`) and `torch.save`. The stall is how long the
caller waits; the save ends when everything is durable, so files of torch's are synced, which they are not by
themselves. Every system keeps the checkpoint before until the new one is durable. Loading fills tensors that are
there; ours checks the hash of every byte, the others none. `reshard` reads every matrix as two halves of its columns.
Rounds interleave the systems; medians are reported.

    python bench/checkpoint.py [--megabytes 200 1000] [--rounds 5] [--folder DIR] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ratio import machine

from megallm.checkpoint import store
from megallm.checkpoint.async_save import AsyncSaver
from megallm.checkpoint.reader import CheckpointReader, step_name
from megallm.checkpoint.store import Part, RetentionPolicy
from megallm.parallel.mesh import Mesh

ROWS, COLUMNS = 1024, 2560  # 10 MiB a matrix
Times = dict[str, float]


def state_of(megabytes: int) -> dict[str, torch.Tensor]:
    count = max(1, round(megabytes * 1e6 / (ROWS * COLUMNS * 4)))
    return {f"layers.{i}.weight": torch.randn(ROWS, COLUMNS) for i in range(count)}


def seconds(call: Callable[[], object]) -> float:
    begin = time.monotonic()
    call()
    return time.monotonic() - begin


def sync_files(folder: Path) -> None:
    """What torch leaves to the system: make the files durable."""
    for path in sorted(folder.rglob("*")):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


class Ours:
    """`megallm.checkpoint`, a new step in every round."""

    def __init__(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        self.folder, self.state, self.mesh, self.step = folder, state, Mesh.single(), 0
        self.parts = [Part(name, tuple(t.shape), (0, 0), t) for name, t in state.items()]
        self.saver = AsyncSaver(folder, self.mesh)
        self.saver.prepare(self.parts)
        self.saver.wait()

    def save(self) -> Times:
        self.step += 1
        spent = seconds(lambda: store.save(self.folder, self.step, self.parts, {}, self.mesh, 1))
        return {"ours: save": spent}

    def save_beside(self) -> Times:
        self.step += 1
        begin = time.monotonic()
        self.saver.start(self.step, self.parts, {}, RetentionPolicy(1))
        stall = time.monotonic() - begin
        self.saver.wait()
        result = self.saver.result()
        assert result is not None
        result.check()
        return {"ours, async: stall": stall, "ours, async: save": result.seconds}

    def load(self) -> Times:
        def whole() -> None:
            with CheckpointReader(self.folder / step_name(self.step)) as reader:
                for name, tensor in self.state.items():
                    reader.read_into(name, (0, 0), tensor)

        def halves() -> None:
            with CheckpointReader(self.folder / step_name(self.step)) as reader:
                for name, tensor in self.state.items():
                    for half in range(2):
                        begin = half * COLUMNS // 2
                        reader.read_into(name, (0, begin), tensor[:, begin : begin + COLUMNS // 2])

        return {"ours: load": seconds(whole), "ours: reshard": seconds(halves)}

    def close(self) -> None:
        self.saver.close()


class Dcp:
    """`torch.distributed.checkpoint`."""

    def __init__(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        self.folder, self.state, self.number = folder, state, 0

    def _next(self) -> Path:
        self.number += 1
        return self._folder()

    def _retire(self) -> None:
        """Remove the one before, when the new one is durable."""
        shutil.rmtree(self.folder / f"dcp-{self.number - 1}", ignore_errors=True)

    def _folder(self) -> Path:
        return self.folder / f"dcp-{self.number}"

    def save(self) -> Times:
        def whole() -> None:
            dcp.save(self.state, checkpoint_id=self._next())
            sync_files(self._folder())
            self._retire()

        return {"DCP: save": seconds(whole)}

    def save_beside(self) -> Times:
        begin = time.monotonic()
        future = dcp.async_save(self.state, checkpoint_id=self._next())
        stall = time.monotonic() - begin
        future.result()
        sync_files(self._folder())
        self._retire()
        return {"DCP, async: stall": stall, "DCP, async: save": time.monotonic() - begin}

    def load(self) -> Times:
        return {"DCP: load": seconds(lambda: dcp.load(self.state, checkpoint_id=self._folder()))}

    def close(self) -> None:
        pass


class Plain:
    """`torch.save` and `torch.load` of one file."""

    def __init__(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        self.path, self.state = folder / "plain" / "state.pt", state
        self.path.parent.mkdir()

    def save(self) -> Times:
        def whole() -> None:
            torch.save(self.state, self.path.with_suffix(".new"))
            sync_files(self.path.parent)
            self.path.with_suffix(".new").replace(self.path)

        return {"torch.save: save": seconds(whole)}

    def save_beside(self) -> Times:
        return {}

    def load(self) -> Times:
        def whole() -> None:
            loaded = torch.load(self.path, weights_only=True)
            for name, tensor in self.state.items():
                tensor.copy_(loaded[name])

        return {"torch.save: load": seconds(whole)}

    def close(self) -> None:
        pass


def rounds_of(megabytes: int, rounds: int, folder: Path) -> Iterator[Times]:
    """The times of each round, every system once."""
    state = state_of(megabytes)
    systems = [Ours(folder, state), Dcp(folder, state), Plain(folder, state)]
    for _ in range(rounds):
        times: Times = {}
        for system in systems:
            for call in (system.save, system.save_beside, system.load):
                times |= call()
        yield times
    for system in systems:
        system.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=".")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29543"}
    dist.init_process_group("gloo", rank=0, world_size=1)
    result: dict[str, dict[str, float]] = {}
    for megabytes in args.megabytes:
        folder = Path(tempfile.mkdtemp(dir=args.folder, prefix="bench-checkpoint-"))
        try:
            found = list(rounds_of(megabytes, args.rounds, folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        result[f"{megabytes} MB"] = {
            name: statistics.median(times[name] for times in found) for name in found[0]
        }
    dist.destroy_process_group()
    if args.json:
        print(json.dumps({"machine": machine(), "seconds": result}))
        return
    print(machine())
    for size, times in result.items():
        print(f"\n{size}")
        for name, spent in times.items():
            print(f"  {name:<20} {spent:8.3f} s")


if __name__ == "__main__":
    main()
