"""Parallel training steps of megallm beside torch's own parallelisms: time, peak memory, same losses first.

    python bench/parallel.py                        # all comparisons, 15 rounds; minutes each
    python bench/parallel.py --only tp pp-1f1b --rounds 2 --shape tiny     # a smoke run

Both systems of a comparison get the same tokens, the same initial weights and AdamW with the same settings and no
clipping, on two processes of one thread each, pinned to two cores, over gloo; ours over shared memory, as
`megallm pretrain` on one host. Losses of the first steps must agree within `--tolerance`, or nothing is timed. Peers are DDP, FSDP2, DTensor tensor parallelism and torch's pipelining;
context parallelism has no peer on CPU and stands beside one process. With `--tuned` both get malloc settings and
oneDNN matrix multiplies, and the peer torch.compile where it can. Memory is by how much a rank's resident size grew
from the moment before its model was built.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import ratio  # noqa: E402

SHAPES = {  # num_layers, hidden_size, ffn_hidden_size, num_heads, vocab_size, tokens of a row
    "tiny": (4, 64, 128, 4, 512, 64),
    "15m": (6, 288, 768, 6, 32000, 256),
    "42m": (8, 512, 1376, 8, 32000, 256),
}
# name -> (ours, peer, microbatches on each rank of a data-parallel replica)
COMPARISONS = {
    "a/a": ("megallm:tp=2", "megallm:tp=2", 1),
    "dp": ("megallm:dp=2", "ddp", 1),
    "zero-1": ("megallm:dp=2,zero=1", "ddp-zero1", 1),
    "zero-2": ("megallm:dp=2,zero=2", "fsdp2-keep", 1),
    "zero-3": ("megallm:dp=2,zero=3", "fsdp2", 1),
    "zero-1-deepspeed": ("megallm:dp=2,zero=1", "deepspeed-1", 1),
    "zero-2-deepspeed": ("megallm:dp=2,zero=2", "deepspeed-2", 1),
    "zero-3-deepspeed": ("megallm:dp=2,zero=3", "deepspeed-3", 1),
    "tree": ("megallm:dp=2,tree=1", "megallm:dp=2", 4),  # what equal bits for any dp cost
    "tp": ("megallm:tp=2", "dtensor-tp", 1),
    "tp+sp": ("megallm:tp=2,sp=1", "dtensor-sp", 1),
    "pp-1f1b": ("megallm:pp=2,schedule=1f1b", "torch-1f1b", 8),
    "pp-interleaved": ("megallm:pp=2,schedule=interleaved,chunks=2", "torch-interleaved", 8),
    "cp": ("megallm:cp=2", "torch-single", 1),  # torch's context_parallel has no CPU kernel: beside one process
}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
RANKS = 2


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, metavar="NAME", help=f"of {', '.join(COMPARISONS)}")
    parser.add_argument("--shape", choices=SHAPES, default="15m")
    parser.add_argument("--rows", type=int, default=2, help="rows of a microbatch")
    parser.add_argument("--rounds", type=int, default=15, help="rounds A B B A")
    parser.add_argument("--steps", type=int, default=2, help="steps of one letter of a round")
    parser.add_argument("--agree", type=int, default=20, help="steps whose losses must agree")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest relative difference of a loss")
    parser.add_argument("--tuned", action="store_true", help="malloc settings, oneDNN, torch.compile for the peer")
    parser.add_argument("--collectives", choices=("auto", "gloo"), default="auto", help="ours; peers have gloo")
    parser.add_argument("--cores", type=int, nargs=RANKS, default=list(range(RANKS)))
    parser.add_argument("--json", metavar="F", help="write the rows to this file")
    worker = parser.add_argument_group("one rank of one system (internal)")
    worker.add_argument("--system")
    worker.add_argument("--micros", type=int)
    worker.add_argument("--rank", type=int)
    worker.add_argument("--core", type=int)
    worker.add_argument("--store")
    return parser


def compare(name: str, args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """One row: losses first, then the rounds."""
    ours, peer, micros = COMPARISONS[name]
    shared = ["--shape", args.shape, "--rows", str(args.rows), "--micros", str(micros), *["--tuned"] * args.tuned]
    shared += ["--collectives", args.collectives]
    env = {"OMP_NUM_THREADS": "1", **(MALLOC if args.tuned else {})}
    row: dict[str, object] = {"name": name, "ours": ours, "peer": peer, "tuned": args.tuned}

    def start(system: str) -> ratio.Workers:
        return ratio.Workers([__file__, "--system", system, *shared], args.cores, folder, env)

    try:
        with start(ours) as a, start(peer) as b:
            losses = [first_losses(workers, args.agree) for workers in (a, b)]
            apart = max(abs(x - y) / abs(y) for x, y in zip(*losses, strict=True))
            row |= {"first_loss": losses[0][0], "last_loss": losses[0][-1], "losses_apart": apart}
            if not apart <= args.tolerance:
                return row | {"problem": f"losses differ by {apart:.1e} of their value: not timed"}
            rounds = ratio.abba(*(lambda w=w: seconds(w, args.steps) for w in (a, b)), args.rounds)
            row |= {"ratio": dataclasses.asdict(ratio.paired_ratio(rounds)), "rounds": rounds}
            for key, workers in (("ours", a), ("peer", b)):
                answers = workers.ask(steps=1)
                row[f"{key}_seconds"] = max(answer["seconds"] for answer in answers)
                row[f"{key}_growth_mib"] = max(answer["growth"] for answer in answers) / 2**20
    except ratio.SystemFailed as error:
        row["problem"] = f"a system failed: {error}"
    return row


def first_losses(workers: ratio.Workers, steps: int) -> list[float]:
    """The losses of the first steps, from a rank that knows them."""
    return max((answer["losses"] for answer in workers.ask(steps=steps)), key=len)


def seconds(workers: ratio.Workers, steps: int) -> float:
    """The slowest rank's time for a few steps."""
    return max(answer["seconds"] for answer in workers.ask(steps=steps))


def work(args: argparse.Namespace) -> None:
    """One rank of one system: answers lines {"steps": n} with seconds, losses and growth; the end of input ends it."""
    os.sched_setaffinity(0, {args.core})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the error output
    import torch
    import torch.distributed as dist
    from systems import Job, build

    from megallm.base import shared_memory

    torch.set_num_threads(1)
    if args.tuned:
        torch.set_float32_matmul_precision("medium")
    store, limit = dist.FileStore(args.store, RANKS), timedelta(seconds=300)
    own = args.system.startswith("megallm") and args.collectives == "auto"
    backend = shared_memory.register() if own else "gloo"  # as `megallm pretrain` does on one host
    dist.init_process_group(backend, store=store, rank=args.rank, world_size=RANKS, timeout=limit)
    before = ratio.resident_bytes()
    step = build(args.system, Job(SHAPES[args.shape], args.rows, args.micros, args.tuned))
    number = 0
    for line in sys.stdin:
        dist.barrier()
        losses, begin = [], time.perf_counter()
        for _ in range(json.loads(line)["steps"]):
            loss = step(number)
            number += 1
            losses += [] if loss is None else [loss]
        took = time.perf_counter() - begin
        answer = {"seconds": took, "losses": losses, "growth": ratio.peak_bytes() - before}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # the other rank may be gone: no goodbyes over gloo


def show(row: dict[str, object]) -> str:
    if "problem" in row:
        return f"{row['name']:<15} {row['peer']:<18} {row['problem']}"
    figure = ratio.Ratio(**row["ratio"])
    noisy = row["name"] == "a/a" and abs(figure.median - 1) > ratio.NOISY
    times = f"{row['ours_seconds']:>8.3f} s {row['peer_seconds']:>8.3f} s"
    sizes = f"{row['ours_growth_mib']:>7.0f} MiB {row['peer_growth_mib']:>7.0f} MiB"
    doubt = "  NOISY: distrust this run" if noisy else ""
    return f"{row['name']:<15} {row['peer']:<18} {figure!s:<22} {times} {sizes}  {row['losses_apart']:.0e}{doubt}"


def main() -> int:
    args = arguments().parse_args()
    if args.system:
        work(args)
    rows = []
    print(json.dumps({"command": shlex.join(sys.argv), **ratio.machine()}))
    columns = f"{'ours':>10} {'peer':>10} {'ours':>11} {'peer':>11}  losses"
    print(f"{'axis':<15} {'peer':<18} {'peer time / ours':<22} {columns}")
    with tempfile.TemporaryDirectory(prefix="megallm-bench-") as folder:
        for name in args.only or COMPARISONS:
            rows.append(compare(name, args, Path(folder)))
            print(show(rows[-1]), flush=True)
    if args.json:
        report = {"machine": ratio.machine(), "command": sys.argv, "rows": rows}
        Path(args.json).write_text(json.dumps(report, indent=2))
    return 1 if any("problem" in row for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
