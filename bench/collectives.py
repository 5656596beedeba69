"""Collectives over shared memory beside gloo: time of a call, by operation and size.

    python bench/collectives.py                            # 2 ranks on two cores, 1 KB to 64 MB; about 3 minutes
    python bench/collectives.py --ranks 4 --only all_reduce --sizes 1M 16M

Each system is a process on each core, which times calls itself; rounds of a size run A B B A. `a/a` is shared memory
against itself. The size is that of the whole tensor of a rank: what it reduces, what it has gathered, what it sends.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import ratio  # noqa: E402

SYSTEMS = ("shm", "gloo")
OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "send_recv")
UNITS = {"K": 2**10, "M": 2**20}
BYTES_OF_A_TURN = 64 << 20  # calls of one size are repeated to move about this much, or CALLS times
CALLS = 200


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--sizes", nargs="+", default=["1K", "16K", "128K", "1M", "8M", "64M"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="rounds A B B A")
    parser.add_argument("--no-aa", action="store_true", help="leave the rows of shared memory against itself out")
    parser.add_argument("--json", metavar="F", help="write the rows to this file")
    worker = parser.add_argument_group("one rank of one system (internal)")
    worker.add_argument("--system", choices=SYSTEMS)
    worker.add_argument("--rank", type=int)
    worker.add_argument("--core", type=int)
    worker.add_argument("--store")
    return parser


def bytes_of(size: str) -> int:
    return int(size[:-1]) * UNITS[size[-1]]


def call_of(name: str, size: int, rank: int, ranks: int) -> Callable[[], None]:
    """One call of an operation on fp32 tensors of `size` bytes."""
    import torch
    import torch.distributed as dist

    count = size // 4 // ranks
    x, part, other = torch.ones(count * ranks), torch.ones(count), torch.ones(count * ranks)
    after, before = (rank + 1) % ranks, (rank - 1) % ranks

    def send_recv() -> None:
        for work in (dist.isend(x, after), dist.irecv(other, before)):
            work.wait()

    return {
        "all_reduce": lambda: dist.all_reduce(x, op=dist.ReduceOp.MAX),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, x),
        "all_gather": lambda: dist.all_gather_into_tensor(x, part),
        "all_to_all": lambda: dist.all_to_all_single(other, x),
        "broadcast": lambda: dist.broadcast(x, 0),
        "send_recv": send_recv,
    }[name]


def work(args: argparse.Namespace) -> None:
    """One rank of one system: answers lines {"name": .., "size": ..} with the seconds of a call."""
    os.sched_setaffinity(0, {args.core})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the error output
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    from megallm.base import shared_memory

    torch.set_num_threads(1)
    shared_memory.register()
    limit = timedelta(seconds=300)
    store = dist.FileStore(args.store, args.ranks)
    dist.init_process_group(args.system, store=store, rank=args.rank, world_size=args.ranks, timeout=limit)
    if args.system == "shm" and not isinstance(dist.group.WORLD, shared_memory.SharedMemoryGroup):
        raise RuntimeError("The ranks fell back to gloo: is the extension built?")
    for line in sys.stdin:
        request = json.loads(line)
        call = call_of(request["name"], request["size"], args.rank, args.ranks)
        times = max(3, min(CALLS, BYTES_OF_A_TURN // request["size"]))
        for _ in range(2):
            call()
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(times):
            call()
        dist.barrier()
        answers.write(json.dumps({"seconds": (time.perf_counter() - begin) / times}) + "\n")
        answers.flush()
    os._exit(0)  # the other rank may be gone: no goodbyes


def compare(a: ratio.Workers, b: ratio.Workers, name: str, size: int, rounds: int) -> dict[str, object]:
    """A row: the median seconds of a call of both, and their ratio."""
    seen: tuple[list[float], list[float]] = ([], [])

    def seconds(workers: ratio.Workers, into: list[float]) -> float:
        into.append(max(answer["seconds"] for answer in workers.ask(name=name, size=size)))
        return into[-1]

    ratios = ratio.abba(lambda: seconds(a, seen[0]), lambda: seconds(b, seen[1]), rounds)
    figure = ratio.paired_ratio(ratios)
    medians = [sorted(times)[len(times) // 2] for times in seen]
    return {"name": name, "bytes": size, "a": medians[0], "b": medians[1], "ratio": vars(figure), "text": str(figure)}


def main() -> int:
    args = arguments().parse_args()
    if args.system:
        work(args)
    rows, cores = [], [rank % len(os.sched_getaffinity(0)) for rank in range(args.ranks)]
    print(json.dumps({"command": shlex.join(sys.argv), **ratio.machine()}))
    print(f"{'operation':<16} {'size':>5} {'shm':>10} {'other':>10} {'GB/s':>6}  gloo's time / shm's")
    with tempfile.TemporaryDirectory(prefix="megallm-bench-") as folder:

        def start(system: str) -> ratio.Workers:
            command = [__file__, "--system", system, "--ranks", str(args.ranks)]
            return ratio.Workers(command, cores, Path(folder), {"OMP_NUM_THREADS": "1"})

        with start("shm") as ours, start("gloo") as gloo, start("shm") as again:
            for size in args.sizes:
                cases = [("all_reduce", again)] if not args.no_aa else []
                for name, other in [*cases, *((name, gloo) for name in args.only)]:
                    row = compare(ours, other, name, bytes_of(size), args.rounds)
                    row["label"] = "a/a" if other is again else name
                    rows.append(row)
                    speed = row["bytes"] / row["a"] / 1e9
                    times = f"{row['a'] * 1e6:>7.0f} us {row['b'] * 1e6:>7.0f} us"
                    print(f"{row['label']:<16} {size:>5} {times} {speed:>6.1f}  {row['text']}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": ratio.machine(), "rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
