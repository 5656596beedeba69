"""Decoding with latent attention: what a position of the cache takes, and tokens a second, in three forms.

    python bench/latent.py [--context 2048] [--batch 4]

`absorbed` is what megallm does: attention in the space of the latents. `expanded` makes keys and values of all heads
from the cached latents at each step. `ordinary` caches keys and values of as many heads of 192 features. One layer with
DeepSeek-V2-Lite's sizes (16 heads of 128 + 64 and 128 features, latents of 512), fp32, one thread, median of 20 steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time

import torch

from megallm.inference.blocks import blocks_of
from megallm.inference.cache import PagedCache, Pages
from megallm.models.build import initial_values, place_parameters
from megallm.models.config import ModelConfig
from megallm.models.decoder import Stage
from megallm.models.mla import LatentAttention
from megallm.models.stages import StageSpan
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import named_shards

SIZES = {"kv_lora_dim": 512, "q_lora_dim": 0, "nope_head_size": 128, "rope_head_size": 64, "value_head_size": 128}
LATENT = ModelConfig(num_layers=1, hidden_size=2048, ffn_hidden_size=64, num_heads=16, vocab_size=64, mla=SIZES)
ORDINARY = dataclasses.replace(LATENT, mla={}, head_size=192)


def expanded(
    self: LatentAttention, plain: torch.Tensor, rotated: torch.Tensor, seen: torch.Tensor, cache
) -> torch.Tensor:
    """In place of `absorbed`: keys and values of all heads from the latents of the whole cache."""
    k, v = self.keys_and_values(seen[..., : self.latent_size], seen[..., self.latent_size :])
    return cache.cached_attention(torch.cat((plain, rotated), -1), k, v, None)


def measure(config: ModelConfig, batch: int, context: int) -> tuple[int, float, torch.Tensor]:
    """Bytes of a cached position, seconds of a step, and the step's output."""
    config = config.resolve()
    stage = Stage(config, Mesh.single(), StageSpan(0, 1, True, True))
    shards = {name: shard for name, _, shard in named_shards(stage)}
    zeros = {name: (0,) * len(shard.full) for name, shard in shards.items()}
    place_parameters(stage, {n: initial_values(n, s, zeros[n], s.full, 1).float() for n, s in shards.items()})
    attention = stage.layers["0"].attention
    each = blocks_of(context + 1)
    cache = PagedCache([attention.cache_shape], batch * each, torch.float32, torch.device("cpu"))
    tables = [range(row * each, (row + 1) * each) for row in range(batch)]
    for stored in cache.layers[0]:
        stored.normal_(generator=torch.Generator().manual_seed(1))
    size = sum(stored[:, 0].numel() * stored.element_size() for stored in cache.layers[0])
    x = torch.randn(batch, 1, 2048, generator=torch.Generator().manual_seed(2))
    places = stage.attention_inputs(torch.full((batch, 1), context), torch.float32)
    times = []
    with torch.no_grad():
        for _ in range(20):
            (layer,) = cache.rows(Pages.of(tables, [context] * batch, 1, x.device))
            begin = time.perf_counter()
            out = attention(x, places, layer)
            times.append(time.perf_counter() - begin)
    return size, statistics.median(times), out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.batch} texts of {args.context} tokens, one layer, fp32, one thread")
    real, found = LatentAttention.absorbed, {}
    for name, config, form in (
        ("absorbed", LATENT, real), ("expanded", LATENT, expanded), ("ordinary", ORDINARY, real),
    ):  # fmt: skip
        LatentAttention.absorbed = form
        size, seconds, found[name] = measure(config, args.batch, args.context)
        speed = f"{seconds * 1e3:8.2f} ms a step   {args.batch / seconds:8.0f} tokens/s"
        print(f"{name:<10} {size:>6} bytes a position   {speed}")
    error = (found["absorbed"] - found["expanded"]).abs().max() / found["expanded"].abs().max()
    print(f"absorbed against expanded: largest relative difference {error:.1e}")


if __name__ == "__main__":
    main()
