"""Branches that tiny models do not take by themselves: each has rows of the oracle, and a mistake in it is noticed.

Each mistake passes the row named beside it, which was all there was: a clip that also scales up, Adafactor without its
relative step, a kernel for grouped products that takes the wrong matrices, buckets and chunks that are forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch.nn.functional as F
from torch import Tensor

from megallm.engine import engine
from megallm.ops import cross_entropy
from megallm.optim import elementwise, zero
from megallm.optim.adafactor import Adafactor
from megallm.optim.elementwise import Clock
from megallm.optim.zero import ShardedParameters
from megallm.oracle import compare
from megallm.oracle.compare import RankRecord, Verdict, train_rank
from megallm.oracle.table import row_named
from tests.ranks import run_ranks

pytestmark = pytest.mark.oracle


# --- mistakes ------------------------------------------------------------------------------------------------------


def clip_that_scales_up() -> AbstractContextManager[Any]:
    """The factor limit / norm without its bound of 1."""

    def clip(parameters: ShardedParameters, limit: float, loss_scale: Tensor | None = None) -> Tensor:
        norm = parameters.squared_norm().sqrt()
        for bucket in parameters.flat:
            bucket.shard_grads.mul_(limit / (norm + 1e-6))
        return norm

    return patch.object(engine, "clip_gradients", clip)


def no_relative_step() -> AbstractContextManager[Any]:
    """The step of every update is that of the first, min(lr, 1)."""
    apply = Adafactor._apply

    def wrong(self: Adafactor, rows: Any, place: Any, rates: Tensor, lr: float, clock: Clock) -> None:
        apply(self, rows, place, rates, lr, clock._replace(count=clock.count * 0))

    return patch.object(Adafactor, "_apply", wrong)


def matrices_of_the_next_expert() -> AbstractContextManager[Any]:
    right = F.grouped_mm

    def wrong(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        return right(a, b.roll(1, 0) if b.dim() == 3 else b, offs=offs)

    return patch.object(F, "grouped_mm", wrong)


@contextmanager
def norm_of_the_first_bucket() -> Iterator[None]:
    right = ShardedParameters.squared_norm

    def wrong(self: ShardedParameters) -> Tensor:
        with patch.object(self, "trainable", self.trainable[:1]):
            return right(self)

    with patch.object(ShardedParameters, "squared_norm", wrong):
        yield


def head_gradient_of_the_last_chunk() -> AbstractContextManager[Any]:
    return patch.object(cross_entropy, "_add_product_", lambda total, dy, x: total.copy_(dy.mT @ x))


def update_of_the_first_chunk() -> AbstractContextManager[Any]:
    return patch.object(elementwise, "range", lambda begin, end, step: [begin], create=True)


class Mistake(NamedTuple):
    """`make` is in force inside the ranks; the rows of `seen` notice it, `unseen` does not."""

    make: Callable[[], AbstractContextManager[Any]]
    seen: tuple[str, ...]
    unseen: str


MISTAKES = (
    Mistake(clip_that_scales_up, ("clip-not-reached", "clip-reached-in-some-steps"), "single"),
    Mistake(no_relative_step, ("adafactor-relative-step",), "adafactor-single"),
    Mistake(matrices_of_the_next_expert, ("grouped", "grouped-ep2-over-dp"), "moe-single"),
    Mistake(norm_of_the_first_bucket, ("pieces",), "single"),
    Mistake(head_gradient_of_the_last_chunk, ("pieces-fused",), "fused-tp2"),
    Mistake(update_of_the_first_chunk, ("pieces-rmsprop-zero1-dp2",), "rmsprop-tp2-sp"),
)


def train_wrongly(make: Callable[[], AbstractContextManager[Any]], name: str) -> RankRecord:
    with make():
        return train_rank(row_named(name), frozenset())


def judged(mistake: Mistake, name: str) -> Verdict:
    verdict = Verdict(row_named(name))
    compare.judge(verdict, run_ranks(verdict.row.layout.world, train_wrongly, mistake.make, name))
    return verdict


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.make.__name__ for mistake in MISTAKES])
def test_a_mistake_in_the_branch_is_noticed_by_its_rows_only(mistake: Mistake) -> None:
    for name in mistake.seen:
        verdict = judged(mistake, name)
        assert verdict.initial and not verdict.passed, name
        errors = [verdict.grad_norm, *verdict.grads.values(), *verdict.weights.values()]
        assert max(errors) > 3e-3, "far beyond rounding, also that of fp32"
    assert judged(mistake, mistake.unseen).passed


# --- the branches are taken ----------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """Of one rank: calls of the grouped kernel, most chunks of the head, most buckets planned at once, norms."""

    grouped: int
    chunks: int
    buckets: int
    norms: list[float]


def watch(name: str) -> Seen:
    """Train a row of the table in this rank and count."""
    chunks, buckets = [0], [0]
    cut, plan = cross_entropy.token_chunks, zero.plan_buckets

    def count_chunks(*given: Any) -> list[slice]:
        chunks.append(len(list(cut(*given))))
        return list(cut(*given))

    def count_buckets(*given: Any) -> Any:
        buckets.append(len(plan(*given)))
        return plan(*given)

    with (
        patch.object(F, "grouped_mm", wraps=F.grouped_mm) as grouped,
        patch.object(cross_entropy, "token_chunks", count_chunks),
        patch.object(zero, "plan_buckets", count_buckets),
    ):
        record = train_rank(row_named(name), frozenset())
    return Seen(grouped.call_count, max(chunks), max(buckets), [step.grad_norm for step in record.steps])


@pytest.mark.parametrize("name", ["grouped", "pieces-fused"])
def test_rows_take_the_branch_they_are_named_after(name: str) -> None:
    (seen,) = run_ranks(1, watch, name)
    (plain,) = run_ranks(1, watch, "moe-single" if name == "grouped" else "single")
    assert plain.grouped == 0 and plain.chunks <= 1 and plain.buckets == 1, "what small models do by themselves"
    if name == "grouped":
        products = 3 * 2 * 2 * row_named(name).micros * 3  # 2 layers, gate_up and down, 3 steps; dx, dw, y
        assert seen.grouped == products
    else:
        assert seen.chunks >= 3 and seen.buckets > 3  # of the tokens that count, 3 at once


def test_the_clip_is_reached_in_some_steps_and_not_in_others() -> None:
    often, never = (run_ranks(row_named(n).layout.world, watch, n)[0].norms for n in
                    ("clip-reached-in-some-steps", "clip-not-reached"))  # fmt: skip
    limit = row_named("clip-reached-in-some-steps").clip
    assert min(often) < 0.9 * limit and max(often) > 1.1 * limit, often
    assert max(never) < 0.9 * row_named("clip-not-reached").clip
