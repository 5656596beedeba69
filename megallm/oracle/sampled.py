"""Rows that sample: what the engine's generator answers before each update, against the reference's
weights of that moment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megallm.engine.engine import Engine
from megallm.inference.samples import Request
from megallm.inference.sampling import Sampling
from megallm.oracle.reference import forward
from megallm.oracle.table import Row

PROMPTS, ANSWER, HEAT = 5, 4, 0.7
Drawn = list[tuple[list[int], list[int], list[float]]]  # prompt, answer, its log-probs


def draw(engine: Engine, row: Row, step: int) -> Drawn:
    """Returns answers to prompts of the row's seed, on every rank; collective over the world."""
    made = torch.Generator().manual_seed(row.seed)
    sizes = torch.randint(2, 5, (PROMPTS,), generator=made).tolist()
    prompts = [
        torch.randint(row.config.vocab_size, (size,), generator=made).tolist() for size in sizes
    ]
    asked = [
        Request.of(step * PROMPTS + number, prompt, ANSWER) for number, prompt in enumerate(prompts)
    ]
    with engine.generator(4) as generator:
        found = generator.generate(engine.mine(asked), Sampling(ANSWER, HEAT, seed=row.seed))
    told = engine.all([[each.prompt, each.tokens, each.log_probs] for each in found])
    return [tuple(each) for each in told]


def difference(config: Mapping[str, Any], weights: Mapping[str, Tensor], drawn: Sequence) -> float:
    """Returns how far the log-probs of answers are from the reference's, in nats."""
    worst = 0.0
    for prompt, answer, said in drawn:
        tokens = torch.tensor([[*prompt, *answer]])
        places = torch.arange(tokens.shape[1])[None]
        found = torch.log_softmax(forward(config, weights, tokens, places) / HEAT, -1)
        own = [found[0, len(prompt) + at - 1, token] for at, token in enumerate(answer)]
        gaps = torch.stack(own) - torch.tensor(said, dtype=torch.float64)
        worst = max(worst, float(gaps.abs().max()))
    return worst
