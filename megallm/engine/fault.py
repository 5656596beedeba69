"""The first thing of a step that is not finite: the step is computed once more, and every module's
output, and every gradient on its way back, is looked at.

Ranks look for themselves; the earliest finding counts (data, weights, forward pass by microbatch,
stage and order of the modules, loss, backward pass). A NaN that a reduction spreads is found
earliest by the rank that made it, since the reduction ends a module and the NaN entered inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megallm.engine.engine import Batch, Engine, Loss
from megallm.engine.state import pieces
from megallm.models.decoder import Stage
from megallm.parallel.recompute import runs_again
from megallm.parallel.tensor import Linear, Slot

PHASES = ("data", "weights", "forward", "loss", "backward", "gradients", "none")


class NonFinite(NamedTuple):
    """Where a number that is not finite came first, and what was found there; the same on every
    rank.

    `layer` is the logical name of the module, tensor or parameter; `micro` counts over the global
    batch (None: no microbatch of its own); `ranks` all found the same, the first of them is the
    one to ask. `none`: the second run of the step was finite.
    """

    phase: str
    layer: str
    micro: int | None
    ranks: tuple[int, ...]
    coords: dict[str, int]

    def __str__(self) -> str:
        if self.phase == "none":
            return (
                "computed once more, the step is finite: the fault does not repeat itself "
                "(memory, arithmetic or network of a rank)"
            )
        grid = " ".join(f"{axis}={self.coords[axis]}" for axis in ("pp", "dp", "cp", "tp"))
        who = f"rank {self.ranks[0]} ({grid})"
        if len(self.ranks) > 1:
            who = f"ranks {', '.join(map(str, self.ranks))} (the first: {grid})"
        where = "" if self.micro is None else f" of microbatch {self.micro}"
        return {
            "data": f"the batch's tensor {self.layer}{where} is not finite on {who}",
            "weights": f"the weight {self.layer} is not finite on {who}",
            "forward": f"the first output that is not finite is that of {self.layer}, in the "
            f"forward pass{where} on {who}",
            "loss": f"the model's outputs are finite, the loss {self.layer}{where} on {who} is not",
            "backward": f"losses are finite; the first gradient that is not is made by "
            f"{self.layer}, in the backward pass{where} on {who}",
            "gradients": f"losses are finite; of the gradients that of {self.layer} is not, on "
            f"{who}",
        }[self.phase]


class _Finding(NamedTuple):
    """What a rank found; the smallest of all ranks is the first."""

    phase: int
    micro: int
    stage: int
    order: int
    layer: str


def all_finite(x: Tensor) -> bool:
    """Returns whether every number of a tensor is finite; those that are no floats are."""
    x = x.detach()  # or what is looked at would be kept for a backward pass
    x = x._values() if x.is_sparse else x
    if not x.is_floating_point() or x.element_size() == 1:
        return True
    return bool(x.isfinite().all())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in what a module takes or returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (x for each in value.values() for x in tensors_in(each))
    elif isinstance(value, tuple | list):
        yield from (x for each in value for x in tensors_in(each))


class Tracer:
    """Hooks in the stages of a rank, which note what is not finite in the order in which it comes.

    `outputs` are (microbatch here, stage, order, module) of forward passes. Of backward passes the
    gradients of one tensor, the first, are kept: whose input and whose output it is.
    """

    def __init__(self, stages: Mapping[int, Stage]) -> None:
        self.outputs: list[tuple[int, int, int, str]] = []
        self.largest: dict[str, float] = {}  # by module, over all forward passes
        self.here = dict.fromkeys(stages, (-1, 0))  # microbatch and order of each stage
        self.at = (0, 0)  # the microbatch and the stage of the backward pass that runs
        self.gradients: list[tuple[str, str]] = []  # (input | output | parameter, name)
        self.found_at: tuple[int, int] | None = None
        self.order = self._fired = 0  # of the gradients of that microbatch and stage
        self._tensor: tuple[int, int] | None = None
        self._nodes: list[Any] = []  # kept, so that no other node has the number of one of these

    @contextmanager
    def hooked(self, stages: Mapping[int, Stage], params: Mapping[str, nn.Parameter]) -> Iterator:
        """Look at what runs inside the context."""
        handles, products = [], []
        try:
            for number, stage in stages.items():
                handles.append(stage.register_forward_pre_hook(partial(self._begin, number)))
                for name, module in stage.named_modules():
                    if isinstance(module, Slot):
                        continue  # what it holds is looked at; empty, it hands on what it gets
                    before = partial(self._before, number, name)
                    after = partial(self._after, number, name or self._whole(stage))
                    if name:
                        handles.append(module.register_forward_pre_hook(before))
                    handles.append(module.register_forward_hook(after))
                    if isinstance(module, Linear):
                        products.append(module)
                        module.multiply = partial(self._multiply, module, before, after)
            for name, param in params.items():
                if param.requires_grad:
                    handles.append(param.register_hook(partial(self._parameter, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for linear in products:
                del linear.multiply

    @staticmethod
    def _whole(stage: Stage) -> str:
        return "head" if stage.span.last else "what follows the last layer of the stage"

    def _begin(self, number: int, stage: Stage, inputs: tuple[Any, ...]) -> None:
        self.here[number] = (self.here[number][0] + 1, 0)

    def _before(self, number: int, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and not runs_again():
            for x in tensors_in(inputs):
                self._watch(number, "input", name, x)

    def _after(self, number: int, name: str, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if runs_again():
            return
        micro, order = self.here[number]
        self.here[number] = (micro, order + 1)
        for x in tensors_in(outputs):
            if not all_finite(x):
                self.outputs.append((micro, number, order, name))
            elif x.is_floating_point() and x.numel():
                largest = float(x.detach().abs().max())
                self.largest[name] = max(self.largest.get(name, 0.0), largest)
            if torch.is_grad_enabled():
                self._watch(number, "output", name, x)

    def _multiply(
        self, linear: Linear, before: Callable, after: Callable, x: Tensor, *rest: Any
    ) -> Tensor:
        """The product of a linear, which a layer may take without calling the module."""
        before(linear, (x,))
        y = type(linear).multiply(linear, x, *rest)
        after(linear, (x,), y)
        return y

    def _watch(self, number: int, kind: str, name: str, x: Tensor) -> None:
        if not x.requires_grad:
            return
        self._nodes.append(x if x.grad_fn is None else x.grad_fn)
        tensor = (id(self._nodes[-1]), x.output_nr)
        x.register_hook(partial(self._gradient, (self.here[number][0], number), tensor, kind, name))

    def _gradient(
        self, at: tuple[int, int], tensor: tuple[int, int], kind: str, name: str, grad: Tensor
    ) -> None:
        self._fired = self._fired + 1 if self.at == at else 0
        self.at = at
        if self._tensor is None and not all_finite(grad):
            self._tensor, self.found_at, self.order = tensor, at, self._fired
        if tensor == self._tensor:
            self.gradients.append((kind, name))

    def _parameter(self, name: str, grad: Tensor | None) -> None:
        if grad is not None and self.found_at is None and not all_finite(grad):
            self.found_at, self.order = self.at, self._fired
            self.gradients.append(("parameter", name))

    def backward_layer(self) -> str:
        """Returns the module whose backward pass made the first bad gradient: that of its input is
        bad and that of its output was not.
        """
        names = {name for kind, name in self.gradients if kind == "input"}
        names -= {name for name in names if any(other.startswith(f"{name}.") for other in names)}
        if names:
            parts = [name.split(".") for name in sorted(names)]
            if len(parts) == 1:
                return ".".join(parts[0])
            same = [a for a, *rest in zip(*parts, strict=False) if all(b == a for b in rest)]
            if same:
                return ".".join(same)  # several read the tensor: the module they are parts of
        kind, name = self.gradients[-1]
        if kind == "output" and name != "head":
            return "head" if name.startswith("final_norm") else f"what follows {name}"
        return "the loss" if name == "head" else name


def find_fault(engine: Engine, batches: Sequence[Batch], loss: Loss) -> NonFinite:
    """Returns what of a step was not finite first; collective over the world.

    `batches` are this data rank's, the weights those that the step was computed with. The step is
    computed once more, without an update: at the price of one step.
    """
    data, rank = engine.mesh.data, engine.mesh.rank
    first = data.rank * len(batches)
    found = [*_in_data(batches, first), *_in_weights(engine)]
    tracer = Tracer(engine.model.stages)
    with tracer.hooked(engine.model.stages, engine.parameters.params):
        engine.compute_gradients(batches, loss)
    found += [
        _Finding(2, first + micro, stage, order, name)
        for micro, stage, order, name in tracer.outputs[:1]
    ]
    found += _in_losses(engine, first)
    if tracer.gradients:
        micro, stage = tracer.found_at or (0, 0)
        found.append(_Finding(4, first + micro, -stage, tracer.order, tracer.backward_layer()))
    found += _in_gradients(engine)
    own = min(found, default=_Finding(6, -1, 0, 0, ""))
    told = engine.mesh.gather_json([*own, rank, engine.mesh.coords])
    chosen = engine.mesh.broadcast_json(told and _first(told))
    phase, micro, layer, ranks, coords = chosen
    return NonFinite(PHASES[phase], layer, None if micro < 0 else micro, tuple(ranks), coords)


def _first(told: list[list[Any]]) -> list[Any]:
    """The earliest finding, with all ranks that have the same."""
    best = min(told, key=lambda row: row[:6])
    ranks = sorted(row[5] for row in told if row[:5] == best[:5])
    phase, micro, _, _, layer = best[:5]
    return [phase, micro, layer, ranks, best[6]]


def _in_data(batches: Sequence[Batch], first: int) -> Iterator[_Finding]:
    for micro, batch in enumerate(batches):
        bad = next((name for name in sorted(batch) if not all_finite(batch[name])), None)
        if bad is not None:
            yield _Finding(0, first + micro, 0, 0, bad)
            return


def _in_weights(engine: Engine) -> Iterator[_Finding]:
    """Weights as the model has them: whole where this rank keeps them whole."""
    parameters = engine.parameters
    own = {bucket.index: bucket.weights for bucket in parameters.flat}
    held = ((piece.name, piece.tensor) for piece in pieces(parameters, own))
    freed = any(bucket.frees_params for bucket in parameters.flat)
    whole = () if freed else parameters.views.items()
    bad = next((name for name, x in (*held, *whole) if not all_finite(x)), None)
    if bad is not None:
        yield _Finding(1, -1, 0, 0, bad)


def _in_losses(engine: Engine, first: int) -> Iterator[_Finding]:
    for micro, terms in sorted(engine.last_run.results.items()):
        bad = next((name for name, x in terms.losses.items() if not all_finite(x)), None)
        if bad is not None:
            yield _Finding(3, first + micro, 0, 0, bad)
            return


def _in_gradients(engine: Engine) -> Iterator[_Finding]:
    bad = next((piece.name for piece in engine.gradients() if not all_finite(piece.tensor)), None)
    if bad is not None:
        yield _Finding(5, -1, 0, 0, bad)
