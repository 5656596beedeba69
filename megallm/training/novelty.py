"""A reward for answers that are unlike those before: random network distillation (Burda et al.,
arXiv 1810.12894) on the policy's own hidden states.

A network with random weights that stay, the target, and one that learns to say the same, the
predictor, both read an answer's final hidden states, averaged over its tokens. What the predictor
does not know yet is new. Inputs are standardised and rewards divided by their deviation, both over
all answers so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megallm.base.rng import key_of, normal_values
from megallm.checkpoint.io import Part
from megallm.checkpoint.reader import CheckpointReader
from megallm.training.rl_config import NoveltyConfig

PREFIX = "optim.novelty."  # of its tensors in a checkpoint
CLIP = 5.0  # deviations to which standardised inputs are clipped
BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam


@dataclass
class Moments:
    """Mean and variance of everything seen, `[D]`, by the parallel rule of Chan et al. (1979)."""

    size: int
    count: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))

    def __post_init__(self) -> None:
        self.mean, self.squares = torch.zeros(2, self.size, dtype=torch.float64)

    def see(self, x: Tensor) -> None:
        """Add rows `[n, D]`."""
        count, own = len(x), x.mean(0)
        total = self.count + count
        away = own - self.mean
        self.squares += (x - own).square().sum(0) + away.square() * self.count * count / total
        self.mean += away * count / total
        self.count += count

    @property
    def deviation(self) -> Tensor:
        """Returns `[D]`, at least a rounding."""
        return (self.squares / self.count.clamp(min=1)).sqrt().clamp(min=1e-8)


class Network:
    """Two layers with a ReLU between them, `[n, D]` -> `[n, outputs]`; all weights in one vector.

    They begin as normal numbers that the seed and the name decide, scaled by their inputs.
    """

    def __init__(self, sizes: tuple[int, int, int], seed: int, name: str) -> None:
        inputs, width, outputs = sizes
        self.shapes = (width, inputs), (width,), (outputs, width), (outputs,)
        scales = (2 / inputs) ** 0.5, 0.0, width**-0.5, 0.0
        pieces = [
            scale * normal_values(key_of(seed, "novelty", name, place), 0, int(np.prod(shape)))
            for place, (shape, scale) in enumerate(zip(self.shapes, scales, strict=True))
        ]
        self.weights = torch.from_numpy(np.concatenate(pieces))

    def __call__(self, x: Tensor, weights: Tensor) -> Tensor:
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        parts = [w.view(shape) for w, shape in zip(weights.split(sizes), self.shapes, strict=True)]
        return F.linear(F.linear(x, *parts[:2]).relu(), *parts[2:])


class Novelty:
    """The reward of what is new, of hidden states with `size` numbers; the state of one rank."""

    def __init__(self, config: NoveltyConfig, size: int, seed: int) -> None:
        self.config, sizes = config, (size, config.width, config.outputs)
        self.target = Network(sizes, seed, "target")
        self.predictor = Network(sizes, seed, "predictor")
        self.inputs, self.rewards = Moments(size), Moments(1)
        self.first, self.second = torch.zeros(2, len(self.predictor.weights), dtype=torch.float64)
        self.updates = torch.zeros(1, dtype=torch.float64)
        self.error = 0.0  # mean of the last call, before it was learned

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Returns the reward `[n]` of each row of `features` `[n, D]`, and learns them."""
        x = torch.from_numpy(np.array(features, np.float64))
        self.inputs.see(x)
        x = ((x - self.inputs.mean) / self.inputs.deviation).clamp(-CLIP, CLIP)
        with torch.no_grad():
            wanted = self.target(x, self.target.weights)
            errors = (self.predictor(x, self.predictor.weights) - wanted).square().mean(-1)
        self.rewards.see(errors[:, None])
        self.error = float(errors.mean())
        for _ in range(self.config.updates):
            self._learn(x, wanted)
        return (errors / self.rewards.deviation).numpy()

    def _learn(self, x: Tensor, wanted: Tensor) -> None:
        """One update of the predictor (Adam, arXiv 1412.6980)."""
        weights = self.predictor.weights.requires_grad_()
        with torch.enable_grad():
            loss = (self.predictor(x, weights) - wanted).square().mean()
        (gradient,) = torch.autograd.grad(loss, weights)
        weights.requires_grad_(False)
        self.updates += 1
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.lerp_(gradient.square(), 1 - BETAS[1])
        mean = self.first / (1 - BETAS[0] ** self.updates)
        square = self.second / (1 - BETAS[1] ** self.updates)
        weights -= self.config.lr * mean / (square.sqrt() + EPS)

    # State

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that changes; the target follows from the seed."""
        kept = {"predictor": self.predictor.weights, "first": self.first, "second": self.second}
        kept["updates"] = self.updates
        for name, moments in (("inputs", self.inputs), ("rewards", self.rewards)):
            kept |= {f"{name}.{key}": vars(moments)[key] for key in ("count", "mean", "squares")}
        return kept

    def state(self) -> Iterator[Part]:
        """Yields the state as parts of a checkpoint; on one rank only."""
        for name, tensor in self._tensors().items():
            yield Part(PREFIX + name, tuple(tensor.shape), (0,), tensor)

    def load(self, reader: CheckpointReader) -> None:
        """Read what `state` has written; nothing where nothing was."""
        if f"{PREFIX}updates" in reader.names():
            for name, tensor in self._tensors().items():
                tensor.copy_(reader.read(PREFIX + name))
