"""One optimizer step of each update rule beside torch.optim's: CPU seconds, the same shapes, one thread.

    OMP_NUM_THREADS=1 python bench/optimizers.py [RULE ...] [--rounds 7]

Both update the 24.7M parameters of a small Llama in fp32 from gradients that stay as they are; ours includes what a
step of the engine adds (it can be skipped, weights are published). torch runs as its users write it, with defaults.
Rounds alternate between the two, so that other load on the machine hits both; the smallest time of each counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from megallm.engine.config import EngineConfig
from megallm.engine.engine import Engine
from megallm.models.config import ModelConfig
from megallm.optim.config import SETTINGS, OptimConfig
from megallm.parallel.mesh import Mesh

MODEL = ModelConfig(
    num_layers=6, hidden_size=288, num_heads=6, num_kv_heads=6, ffn_hidden_size=768, vocab_size=32000
).resolve()
PEERS: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, 1e-4),
    "adam": lambda ps: torch.optim.Adam(ps, 1e-4),
    "sgd": lambda ps: torch.optim.SGD(ps, 1e-4),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, 1e-4),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, 1e-4),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, 1e-4),
    "muon": lambda ps: torch.optim.Muon([p for p in ps if p.dim() == 2], 1e-4),
}


def our_step(rule: str) -> Callable[[], None]:
    engine = Engine.build(EngineConfig(MODEL, optim=OptimConfig(rule)), Mesh.single())
    for bucket in engine.parameters.flat:
        bucket.grads.normal_()
    skip = torch.tensor(False)
    return lambda: engine.optimizer.step(1e-4, skip)


def their_step(rule: str) -> Callable[[], None] | None:
    """torch's step over the same matrices and vectors; Muon's matrices are those of the blocks, as ours."""
    if rule not in PEERS:
        return None
    shards = Engine(EngineConfig(MODEL), Mesh.single()).parameters.shards
    params = []
    for name, shard in shards.items():
        if rule == "muon" and not name.startswith("layers."):
            continue
        for _ in range(shard.full[0] if len(shard.full) > 2 else 1):
            params.append(torch.nn.Parameter(torch.randn(shard.full[-2:])))
            params[-1].grad = torch.randn_like(params[-1])
    return PEERS[rule](params).step


def seconds(step: Callable[[], None]) -> float:
    begin = time.process_time()
    step()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rules", nargs="*", default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for rule in args.rules:
        ours, theirs = our_step(rule), their_step(rule)
        pairs = [(seconds(ours), seconds(theirs) if theirs else 0.0) for _ in range(args.rounds + 1)][1:]
        mine, other = (min(column) for column in zip(*pairs, strict=True))
        beside = f"torch {1e3 * other:7.1f} ms   ratio {other / mine:.2f}" if theirs else "torch has none"
        print(f"{rule:10} {1e3 * mine:7.1f} ms   {beside}", flush=True)


if __name__ == "__main__":
    main()
