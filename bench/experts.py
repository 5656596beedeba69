"""A layer of experts beside that of transformers (Mixtral's block), forward and backward in one process.

    OMP_NUM_THREADS=1 python bench/experts.py --tokens 2048 --hidden 256 --ffn 512 --experts 8 --dtype bf16

Rounds run A B B A (bench/ratio.py); the two layers hold the same weights and their outputs are compared first. The
loop is our layer with the grouped kernel refused. In bf16 a token now and then goes to another expert than theirs,
whose router multiplies in bf16.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
import transformers
from ratio import abba, paired_ratio
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from megallm.models.build import place_parameters
from megallm.models.config import ModelConfig
from megallm.models.moe import Moe
from megallm.ops import grouped_gemm
from megallm.parallel.mesh import Mesh

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(args: argparse.Namespace) -> tuple[torch.nn.Module, Moe]:
    """Their block and ours, with the same random weights."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=args.hidden, intermediate_size=args.ffn, num_local_experts=args.experts, num_experts_per_tok=2
    )
    config._experts_implementation = args.implementation
    theirs = MixtralSparseMoeBlock(config).to(DTYPES[args.dtype])
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    moe = {"num_experts": args.experts, "ffn_hidden_size": args.ffn}
    model = ModelConfig(num_layers=1, hidden_size=args.hidden, num_heads=4, vocab_size=64, moe=moe).resolve()
    ours = Moe(model, Mesh.single(), False, False)
    weights = {
        "router.weight": theirs.gate.weight.detach().clone(),
        "experts.gate_up.weight": theirs.experts.gate_up_proj.detach().clone().unflatten(1, (2, args.ffn)),
        "experts.down.weight": theirs.experts.down_proj.detach().clone(),
    }
    place_parameters(ours, weights)
    return theirs, ours


def timed(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], float]:
    """Seconds of one forward and backward pass."""

    def once() -> float:
        begin = time.perf_counter()
        out = layer(x)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        return time.perf_counter() - begin

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("tokens", 2048), ("hidden", 256), ("ffn", 512), ("experts", 8), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--implementation", default="grouped_mm", help="theirs: eager, batched_mm or grouped_mm")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    theirs, ours = build(args)
    x = torch.randn(1, args.tokens, args.hidden, dtype=DTYPES[args.dtype], requires_grad=True)
    expected, found = theirs(x), ours(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    error = float(((expected - found).abs().mean() / expected.abs().mean()).detach())
    fits = grouped_gemm.fits_kernel
    run_ours, run_theirs = timed(ours, x), timed(theirs, x)
    run_ours(), run_theirs()
    report = {"error": error, "theirs": str(paired_ratio(abba(run_ours, run_theirs, args.rounds)))}

    def run_loop() -> float:
        grouped_gemm.fits_kernel = lambda *_: False
        seconds = run_ours()
        grouped_gemm.fits_kernel = fits
        return seconds

    report["loop"] = str(paired_ratio(abba(run_ours, run_loop, args.rounds)))
    if args.json:
        print(json.dumps(report))
        return
    print(f"mean difference of the outputs: {error:.1e} of their mean size")
    print(f"transformers' block takes {report['theirs']} the time of ours, the loop over experts {report['loop']}")


if __name__ == "__main__":
    main()
