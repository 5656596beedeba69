"""Update rules written out on logical tensors, one parameter at a time: the referees of the sharded
ones.

Nothing of megallm but the sibling reference is imported. Each rule keeps its own state by name;
`update` returns the new weight after `count` updates including this one. Gradients come clipped.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megallm.oracle.reference import decays


@dataclass
class Adam:
    """AdamW as torch.optim.AdamW, after clipping as torch.nn.utils.clip_grad_norm_; coupled decay
    as torch's Adam.
    """

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float
    decoupled: bool = True
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)

    def update(self, name: str, weight: Tensor, grad: Tensor, lr: float, count: int) -> Tensor:
        beta1, beta2 = self.betas
        decay = self.weight_decay if decays(name) else 0.0
        if not self.decoupled:
            grad, decay = grad + decay * weight, 0.0
        first = beta1 * self.first.get(name, 0.0) + (1 - beta1) * grad
        second = beta2 * self.second.get(name, 0.0) + (1 - beta2) * grad.square()
        self.first[name], self.second[name] = first, second
        mean, spread = first / (1 - beta1**count), (second / (1 - beta2**count)).sqrt()
        return weight * (1 - lr * decay) - lr * mean / (spread + self.eps)


@dataclass
class Sgd:
    """Momentum with or without Nesterov's step, coupled decay."""

    momentum: float
    nesterov: bool
    weight_decay: float
    clip: float
    buffer: dict[str, Tensor] = field(default_factory=dict)

    def update(self, name: str, weight: Tensor, grad: Tensor, lr: float, count: int) -> Tensor:
        grad = grad + (self.weight_decay if decays(name) else 0.0) * weight
        self.buffer[name] = self.momentum * self.buffer.get(name, 0.0) + grad
        ahead = grad + self.momentum * self.buffer[name] if self.nesterov else self.buffer[name]
        return weight - lr * ahead


@dataclass
class Quotient:
    """AdaGrad (`smoothing` None) and RMSProp: the gradient over the root of a sum or a mean of its
    squares.
    """

    smoothing: float | None
    momentum: float
    eps: float
    weight_decay: float
    clip: float
    squares: dict[str, Tensor] = field(default_factory=dict)
    buffer: dict[str, Tensor] = field(default_factory=dict)

    def update(self, name: str, weight: Tensor, grad: Tensor, lr: float, count: int) -> Tensor:
        grad = grad + (self.weight_decay if decays(name) else 0.0) * weight
        old, new = (1.0, 1.0) if self.smoothing is None else (self.smoothing, 1 - self.smoothing)
        self.squares[name] = old * self.squares.get(name, 0.0) + new * grad.square()
        self.buffer[name] = self.momentum * self.buffer.get(name, 0.0) + grad / (self.squares[name].sqrt() + self.eps)
        return weight - lr * self.buffer[name]


@dataclass
class Lion:
    """The sign of an interpolated momentum (arXiv 2302.06675, algorithm 2)."""

    betas: tuple[float, float]
    weight_decay: float
    clip: float
    first: dict[str, Tensor] = field(default_factory=dict)

    def update(self, name: str, weight: Tensor, grad: Tensor, lr: float, count: int) -> Tensor:
        beta1, beta2 = self.betas
        old = self.first.get(name, torch.zeros_like(grad))
        self.first[name] = beta2 * old + (1 - beta2) * grad
        decay = self.weight_decay if decays(name) else 0.0
        return weight - lr * ((beta1 * old + (1 - beta1) * grad).sign() + decay * weight)


@dataclass
class Adafactor:
    """Algorithms 4 and 5 of arXiv 1804.04235 with decoupled decay; each matrix or vector of a stack
    by itself.
    """

    decay_power: float
    update_clip: float
    eps: float
    min_scale: float
    weight_decay: float
    clip: float
    state: dict[str, Tensor] = field(default_factory=dict)

    def update(self, name: str, weight: Tensor, grad: Tensor, lr: float, count: int) -> Tensor:
        dims = 2 if grad.dim() > 1 and decays(name) else 1
        pieces = enumerate(zip(_flat(weight, dims), _flat(grad, dims), strict=True))
        steps = torch.stack([self._one(f"{name}.{i}", one, g, lr, count) for i, (one, g) in pieces]).view(grad.shape)
        return weight * (1 - lr * (self.weight_decay if decays(name) else 0.0)) - steps

    def _one(self, name: str, weight: Tensor, grad: Tensor, lr: float, count: int) -> Tensor:
        """Returns the step of one matrix or vector."""
        keep = 1 - count**-self.decay_power
        squares = grad.square() + self.eps
        if grad.dim() == 1:
            mean = self._mean(name, squares, keep)
        else:
            rows, columns = (self._mean(f"{name}/{dim}", squares.mean(dim), keep) for dim in (1, 0))
            mean = torch.outer(rows, columns) / rows.mean()
        step = grad / mean.sqrt()
        step = step / max(1.0, float(step.square().mean().sqrt()) / self.update_clip)
        return max(self.min_scale, float(weight.square().mean().sqrt())) * min(lr, count**-0.5) * step

    def _mean(self, key: str, new: Tensor, keep: float) -> Tensor:
        self.state[key] = keep * self.state.get(key, 0.0) + (1 - keep) * new
        return self.state[key]


@dataclass
class Muon:
    """Momentum made orthogonal for the matrices of blocks, `rest` for everything else (arXiv
    2502.16982).
    """

    momentum: float
    nesterov: bool
    ns_steps: int
    update_scale: str
    rest: Adam
    buffer: dict[str, Tensor] = field(default_factory=dict)

    @property
    def clip(self) -> float:
        return self.rest.clip

    def update(self, name: str, weight: Tensor, grad: Tensor, lr: float, count: int) -> Tensor:
        if not (name.startswith(("layers.", "mtp.")) and grad.dim() > 1 and decays(name)):
            return self.rest.update(name, weight, grad, lr, count)
        self.buffer[name] = self.momentum * self.buffer.get(name, 0.0) + grad
        ahead = grad + self.momentum * self.buffer[name] if self.nesterov else self.buffer[name]
        rows, columns = grad.shape[-2:]
        size = 0.2 * max(rows, columns) ** 0.5 if self.update_scale == "rms" else max(1.0, rows / columns) ** 0.5
        turned = torch.stack([self._orthogonal(one) for one in _flat(ahead, 2)]).view(grad.shape)
        return weight * (1 - lr * self.rest.weight_decay) - lr * size * turned

    def _orthogonal(self, x: Tensor) -> Tensor:
        """Jordan's quintic on x / |x|, without its shortcut for tall matrices: X X^T X is (X X^T) X
        and X (X^T X).
        """
        x = x / max(float(x.square().sum().sqrt()), 1e-7)  # experts that no token chose have no gradient
        for _ in range(self.ns_steps):
            cube = x @ x.T @ x
            x = 3.4445 * x - 4.7750 * cube + 2.0315 * (x @ x.T @ cube)
        return x


def _flat(x: Tensor, dims: int) -> list[Tensor]:
    """Returns the matrices (2) or vectors (1) of a stack."""
    return list(x.reshape(-1, *x.shape[-dims:]))
