"""CPU seconds of a whole training step in one process: ours beside transformers' Llama.

    OMP_NUM_THREADS=1 python bench/step.py --shapes 15m 42m --precision fp32 --rounds 5

The same tokens (4 rows of 256), initial weights and AdamW without clipping; losses of the first steps must agree before
anything is timed. `default` is transformers as its users run it, `tuned` with torch.compile, fused AdamW and malloc
settings. In bf16 the tuned peer holds its weights and moments in bf16 (no master weights, which ours keep in fp32) and
the default one runs under autocast. `reference` is ours without the extension's kernels. Every system is a process of its
own on one core; rounds run A B B A and count CPU time, and the A/A row must be 1.00 within 3 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from parallel import MALLOC, SHAPES  # noqa: E402
from ratio import NOISY, Ratio, SystemFailed, Workers, abba, machine, paired_ratio, peak_bytes, resident_bytes  # noqa: E402

ROWS, LR, SEED = 4, 1e-3, 1234
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
Step = Callable[[int], float]


def model_config(shape: str) -> Any:
    from megallm.models.config import ModelConfig

    layers, hidden, ffn, heads, vocab, _ = SHAPES[shape]
    sizes = {"num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": ffn, "num_heads": heads}
    return ModelConfig(family="llama", vocab_size=vocab, norm_eps=1e-6, **sizes).resolve()


def tokens_of(shape: str, number: int) -> Any:
    """`[rows, T + 1]` of a step; eight steps that repeat."""
    import torch

    draw = torch.Generator().manual_seed(number % 8)
    return torch.randint(SHAPES[shape][4], (ROWS, SHAPES[shape][5] + 1), generator=draw)


def ours(shape: str, precision: str, fused_head: str = "auto") -> Step:
    """The engine with the memory settings that `megallm pretrain` gives its ranks."""
    import torch

    from megallm.engine.config import EngineConfig
    from megallm.engine.engine import Engine
    from megallm.launch.process import keep_memory
    from megallm.losses.language import NextToken
    from megallm.models.compute import ComputeConfig
    from megallm.optim.config import OptimConfig
    from megallm.parallel.mesh import Mesh

    keep_memory()
    optim = OptimConfig(clip=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0).resolve()
    compute = ComputeConfig(precision=precision, fused_head=fused_head)
    engine = Engine.build(
        EngineConfig(model_config(shape), optim=optim, compute=compute, seed=SEED), Mesh.single()
    )
    positions = torch.arange(SHAPES[shape][5]).expand(ROWS, -1)

    def step(number: int) -> float:
        text = tokens_of(shape, number)
        batch = {"tokens": text[:, :-1], "labels": text[:, 1:], "positions": positions}
        batch["mask"] = torch.ones_like(batch["labels"], dtype=torch.bool)
        return engine.train_step([batch], NextToken(), LR).loss

    return step


def their_model(shape: str) -> Any:
    """transformers' Llama with our initial weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megallm.models.build import initial_values
    from megallm.models.compute import ComputeConfig
    from megallm.models.parallel_model import ParallelModel
    from megallm.parallel.config import LayoutConfig
    from megallm.parallel.mesh import Mesh

    config = model_config(shape)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads, tie_word_embeddings=config.tie_embeddings,
            max_position_embeddings=config.max_positions, rope_theta=config.rope_theta, rms_norm_eps=config.norm_eps,
        )
    )  # fmt: skip
    from posttrain import their_names

    params = {f"base_model.model.{name}": param for name, param in theirs.named_parameters()}
    entries = ParallelModel(config, LayoutConfig(), ComputeConfig(), Mesh.single()).entries()
    with torch.no_grad():
        for name, _, shard, _ in entries:
            value = initial_values(name, shard, (0,) * len(shard.full), shard.full, SEED)
            names = [one.replace(".base_layer", "") for one in their_names(name)]
            for one, part in zip(names, value if len(names) > 1 else [value], strict=True):
                params.pop(one).copy_(part)
    if params:
        raise ValueError(f"no initial weights for {', '.join(params)}")
    return theirs.train()


def transformers(shape: str, precision: str, tuned: bool) -> Step:
    """transformers' Llama under torch's AdamW."""
    import torch

    model = their_model(shape)
    narrow = precision == "bf16"
    if narrow and tuned:
        model = model.bfloat16()
    settings = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(model.parameters(), fused=tuned, **settings)
    call = torch.compile(model) if tuned else model

    def step(number: int) -> float:
        text = tokens_of(shape, number)
        mixed = torch.autocast("cpu", torch.bfloat16) if narrow and not tuned else nullcontext()
        with mixed:
            logits = call(input_ids=text[:, :-1], use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def build(system: str, shape: str, precision: str) -> Step:
    if system in ("default", "tuned"):
        return transformers(shape, precision, system == "tuned")
    return ours(shape, precision)


def serve(system: str, shape: str, precision: str, core: int) -> None:
    """Answer each line `{"steps": n}` with losses, CPU seconds and the peak of memory."""
    import os

    os.sched_setaffinity(0, {core})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the error output
    import torch
    import transformers as _library

    import megallm.engine.engine

    assert megallm and _library
    torch.set_num_threads(1)
    before = resident_bytes()
    step, number = build(system, shape, precision), 0
    for line in sys.stdin:
        losses, begin = [], time.process_time()
        for _ in range(json.loads(line)["steps"]):
            losses.append(step(number))
            number += 1
        told = {"losses": losses, "seconds": time.process_time() - begin, "growth": peak_bytes() - before}
        answers.write(json.dumps(told) + "\n")
        answers.flush()


def seconds(system: Workers) -> Callable[[], float]:
    return lambda: system.ask(steps=2)[0]["seconds"]


def environment(system: str) -> dict[str, str]:
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    settings |= MALLOC if system == "tuned" else {}
    return settings | ({"MEGALLM_OPS_ISA": "reference"} if system == "reference" else {})


def compare(shape: str, other: str, args: argparse.Namespace, folder: Path) -> str:
    """One row of the table; raises SystemExit when the losses are apart."""
    command = [__file__, "--shapes", shape, "--precision", args.precision, "--serve"]
    with (
        Workers([*command, "ours"], [args.core], folder, environment("ours")) as mine,
        Workers([*command, other], [args.core], folder, environment(other)) as theirs,
    ):
        first = [system.ask(steps=args.agree)[0]["losses"] for system in (mine, theirs)]
        gap = max(abs(a - b) / b for a, b in zip(*first, strict=True))
        if not gap <= TOLERANCE[args.precision]:
            raise SystemExit(f"{shape} {other}: losses differ by {gap:.1e}: {first}")
        ratio: Ratio = paired_ratio(abba(seconds(mine), seconds(theirs), args.rounds))
        last = [system.ask(steps=1)[0] for system in (mine, theirs)]
    noisy = "  NOISY" if other == "ours" and abs(ratio.median - 1) > NOISY else ""
    times = " / ".join(f"{one['seconds']:.3f}" for one in last)
    sizes = " / ".join(f"{one['growth'] / 2**20:.0f}" for one in last)
    return f"{shape} {args.precision} {other:<9} {ratio!s:<22} {times} s  {sizes} MiB  losses {gap:.0e}{noisy}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["15m", "42m"])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--against", nargs="+", default=["ours", "reference", "default", "tuned"],
                        choices=("ours", "reference", "default", "tuned"))  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--agree", type=int, default=4, help="steps whose losses must agree")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    for name in ("--rank", "--store"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.shapes[0], args.precision, args.core)
        return
    print(json.dumps({"command": sys.argv, **machine()}), flush=True)
    print("peer's time / ours; seconds of a step and growth of memory, ours / theirs", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            for other in args.against:
                try:
                    print(compare(shape, other, args, Path(folder)), flush=True)
                except SystemFailed as error:
                    print(f"{shape} {other}: {error}", flush=True)


if __name__ == "__main__":
    main()
