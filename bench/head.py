"""The head's memory and time: fused linear cross entropy beside logits and cross entropy, forward and backward.

    OMP_NUM_THREADS=1 python bench/head.py --tokens 8192 --vocab 128000 --hidden 288

`entropy` and `torch-entropy` are trained on the log-probability and a hundredth of the entropy, both at a temperature.
`fused@10` counts one token in ten: the others never reach the matrix.

Each way runs in a process of its own. Memory is how far the peak of the resident set rises above what was resident
before (hidden states, weight, and the libraries after a warm-up on eight tokens). Seconds are of CPU time, best of
`--rounds`: the machine may be busy with other things.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.models.heads import counted_tokens, put_back, select_counted
from megallm.ops.cross_entropy import Projection
from megallm.parallel.mesh import Mesh
from megallm.parallel.vocab import Wanted, fused_scores, label_scores

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20


TEMPERATURE = 0.7
BOTH = Wanted(("log_prob", "entropy"), TEMPERATURE)


def losses(way: str, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The sum that is differentiated: `torch` as users write it, the others ours; `@n` counts n percent of tokens."""
    mesh, vocab = Mesh.single(), weight.shape[0]
    name, _, percent = way.partition("@")
    if name == "torch":
        return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1).float(), labels.flatten(), reduction="sum")
    if name == "torch-entropy":
        log_prob = (F.linear(hidden, weight).float() / TEMPERATURE).log_softmax(-1)
        entropy = -(log_prob.exp() * log_prob).sum()
        return 0.01 * entropy - log_prob.gather(-1, labels[..., None]).sum()
    if name == "logits":
        return -label_scores(F.linear(hidden, weight), labels, mesh, vocab)["log_prob"].sum()
    mask = torch.arange(labels.numel()).view(labels.shape) * 37 % 100 < int(percent or 100)
    counted = counted_tokens(mask, hidden.device)
    rows, own = select_counted(hidden, counted), select_counted(labels, counted)
    found = fused_scores(rows, Projection(weight), own, mesh, vocab, BOTH if name == "entropy" else Wanted())
    found = {key: put_back(values, counted, labels.shape) for key, values in found.items()}
    return 0.01 * found.get("entropy", torch.zeros(())).sum() - found["log_prob"].sum()


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(way: str, args: argparse.Namespace) -> dict[str, float]:
    """Peak growth in MiB, seconds, and the loss of one way, in this process."""
    torch.manual_seed(0)
    dtype = DTYPES[args.dtype]
    hidden = torch.randn(1, args.tokens, args.hidden, dtype=dtype).requires_grad_()
    weight = (torch.randn(args.vocab, args.hidden, dtype=dtype) * 0.05).requires_grad_()
    labels = torch.randint(args.vocab, (1, args.tokens))
    losses(way, hidden[:, :8], weight[:64], labels[:, :8] % 64).backward()
    hidden.grad = weight.grad = None
    before, seconds = resident(), []
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    for _ in range(args.rounds):
        begin = time.process_time()
        loss = losses(way, hidden, weight, labels)
        loss.backward()
        seconds.append(time.process_time() - begin)
        hidden.grad = weight.grad = None
    return {"mib": (peak() - before) / MIB, "seconds": min(seconds), "loss": loss.item()}


def peak() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=128000)
    parser.add_argument("--hidden", type=int, default=288)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ways", nargs="+", default=["torch", "logits", "fused"],
                        help="torch, torch-entropy, logits; fused, entropy, each perhaps with @PERCENT")  # fmt: skip
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    found = {}
    for way in args.ways:
        command = [sys.executable, __file__, "--only", way]
        for name in ("tokens", "vocab", "hidden", "dtype", "rounds"):
            command += [f"--{name}", str(getattr(args, name))]
        found[way] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    report = {f"{way}_{name}": value for way, values in found.items() for name, value in values.items()}
    plain = "torch" if "torch" in found else "logits"
    report["memory_ratio"] = found[plain]["mib"] / found["fused"]["mib"]
    report["time_ratio"] = found[plain]["seconds"] / found["fused"]["seconds"]
    if args.json:
        print(json.dumps(report))
        return
    for way, values in found.items():
        print(f"{way:<14} {values['mib']:8.0f} MiB  {values['seconds']:7.2f} CPU s  loss {values['loss']:.6g}")
    print(f"memory {report['memory_ratio']:.1f} times less, time {report['time_ratio']:.2f} times less than {plain}")


if __name__ == "__main__":
    main()
