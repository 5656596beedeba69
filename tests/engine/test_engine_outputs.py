"""What a step asks of the head and reports of it, and steps in which there is nothing to learn."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import Tensor

from megallm.base.errors import CheckpointError, UsageError
from megallm.checkpoint import store
from megallm.checkpoint.reader import CheckpointReader
from megallm.engine.engine import Engine
from megallm.losses.language import Accuracy, NextToken
from megallm.losses.terms import Terms
from megallm.models import decoder
from megallm.models.parallel_model import ParallelModel
from megallm.models.sections import MoeConfig
from megallm.optim.clip import clip_gradients
from megallm.optim.config import OptimConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from tests.engine.tiny import MODEL, Batch, batches, config_of, equal, share, state_of
from tests.ranks import run_ranks

EXPERTS = MoeConfig(num_experts=4, top_k=2, selection_bias=True, aux_coef=0.0)
MOE = replace(MODEL, family="mixtral", tie_embeddings=False, moe=EXPERTS).resolve()


@dataclass(frozen=True)
class Weighed:
    """`-sum(weight log_prob)` with a weight of rows that may be no whole number; reports the mean weight too."""

    needs: ClassVar[tuple[str, ...]] = ("log_prob", "entropy")
    temperature: float = 1.0
    advantage: float = 1.0

    def weights(self, batch: Batch) -> Tensor:
        rows = torch.arange(1, batch["mask"].shape[0] + 1, dtype=torch.float64) / 7
        return batch["mask"] * rows[:, None]

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.weights(batch).sum(), "tokens": batch["mask"].sum()}

    def __call__(self, outputs: dict[str, Tensor], batch: Batch) -> Terms:
        weights = self.weights(batch)
        losses = {"loss": -(outputs["log_prob"] * weights).sum() * self.advantage}
        metrics = {"surprise": outputs["entropy"].detach() * weights, "tokens": weights}
        return Terms(losses, {name: values.sum() for name, values in metrics.items()})


def nothing(batch: Batch) -> Batch:
    return batch | {"mask": torch.zeros_like(batch["mask"])}


# --- steps without gradients ---------------------------------------------------------------------------------------


EMPTY_CASES: dict[str, tuple[Layout, dict[str, Any]]] = {
    "fp64": (Layout(), {}),
    "bf16": (Layout(), {"precision": "bf16"}),
    "fp16": (Layout(), {"precision": "fp16"}),
    "moe": (Layout(), {"model": MOE}),
    "sgd": (Layout(), {"optim": OptimConfig(rule="sgd", momentum=0.9, weight_decay=0.1)}),
    "dp2-zero1-bf16": (Layout(dp=2), {"zero": 1, "precision": "bf16"}),
    "dp2-zero2": (Layout(dp=2), {"zero": 2}),
    "dp2-zero3-bf16": (Layout(dp=2), {"zero": 3, "precision": "bf16"}),
    "pp2-tp2-zb-h1": (Layout(pp=2, tp=2), {"schedule": "zb-h1"}),
}


def idle_steps(layout: Layout, options: dict[str, Any], careless: str = "") -> tuple[list[bool], list[bool]]:
    """(whether weights and state are the same bits after a masked step and one without advantages, `empty` of each
    of four steps); the first and the last of them have gradients."""
    mesh = Mesh.start(layout) if layout.world > 1 else Mesh.single()
    engine = Engine.build(config_of(**({"optim": OptimConfig(weight_decay=0.1)} | options)), mesh)
    if careless == "optimizer":
        update = engine.optimizer.step
        engine.optimizer.step = lambda lr, skip: update(lr, torch.zeros_like(skip))
    if careless == "routers":
        finish = engine.model.routers.finish
        engine.model.routers.finish = lambda skip: finish(torch.zeros_like(skip))
    given = share(batches(2 * layout.dp), mesh)
    stats = [engine.train_step(given, NextToken(), 0.01)]
    before, counters = state_of(engine), engine.counters()
    same = []
    for micros, loss in (([nothing(batch) for batch in given], NextToken()), (given, Weighed(advantage=0.0))):
        stats.append(engine.train_step(micros, loss, 0.01))
        same.append(equal(state_of(engine), before) and engine.counters() == counters)
    stats.append(engine.train_step(given, NextToken(), 0.01))
    same.append(not equal(state_of(engine), before))
    assert not any(each.skipped for each in stats) and stats[1].grad_norm == 0 and stats[1].counts == {"loss": 0}
    return same, [each.empty for each in stats]


@pytest.mark.parametrize("case", EMPTY_CASES)
def test_a_step_without_gradients_changes_nothing(case):
    layout, options = EMPTY_CASES[case]
    for same, empty in run_ranks(layout.world, idle_steps, layout, options):
        assert same == [True, True, True] and empty == [False, True, True, False]


def test_an_update_by_gradients_of_zero_would_be_noticed():
    """The controls: decay and momentum move the weights, and tokens that were routed the routers' biases."""
    same, empty = idle_steps(Layout(), {}, careless="optimizer")
    assert same == [False, False, True] and empty == [False, True, True, False]
    same, empty = idle_steps(Layout(), {"model": MOE}, careless="routers")
    assert same == [True, False, True] and empty == [False, True, True, False]


# --- what the loss asks for and reports ----------------------------------------------------------------------------


def reported(layout: Layout, options: dict[str, Any]) -> tuple[dict[str, float], ...]:
    mesh = Mesh.start(layout) if layout.world > 1 else Mesh.single()
    engine, loss = Engine.build(config_of(**options), mesh), Weighed(temperature=0.7)
    given = share(batches(4, tokens=16), mesh)
    sums, counts = engine.evaluate(given, loss)
    stats = engine.train_step(given, loss, 0.01)
    return stats.losses, stats.metrics, stats.counts, {name: total / counts[name] for name, total in sums.items()}


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(pp=2, tp=2), Layout(cp=2)], ids=str)
def test_metrics_and_soft_counts_are_those_of_the_global_batch_on_every_rank(layout):
    losses, metrics, counts, evaluated = reported(Layout(), {})
    masks = [batch["mask"] for batch in batches(4, tokens=16)]
    soft = sum((mask.sum(1) * torch.tensor([1.0, 2.0], dtype=torch.float64) / 7).sum().item() for mask in masks)
    tokens = sum(int(mask.sum()) for mask in masks)
    assert counts == pytest.approx({"loss": soft, "tokens": tokens}, rel=1e-12)
    assert type(counts["tokens"]) is int and soft % 1
    assert metrics["tokens"] == pytest.approx(soft / tokens)  # its own count; the other has the first term's
    assert 0.8 * math.log(61) < metrics["surprise"] < math.log(61)
    assert evaluated == pytest.approx(losses | metrics)
    for rank in run_ranks(layout.world, reported, layout, {}):
        for mine, theirs in zip(rank, (losses, metrics, counts, evaluated), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-12)


def test_next_token_measures_entropy_and_accuracy_and_weighs_by_probability():
    engine, given = Engine.build(config_of(), Mesh.single()), batches(2)
    loss = NextToken(dft=True, measured=("entropy", "mean_token_accuracy"))
    (scores, others) = engine.scores(given, ("log_prob", "entropy", "correct"))
    counted = torch.cat([batch["mask"].flatten() for batch in given])
    names = ("log_prob", "entropy", "correct")
    log_prob, entropy, correct = (
        torch.cat([scores[name].flatten(), others[name].flatten()])[counted] for name in names
    )
    stats = engine.train_step(given, loss, 0.0)
    assert stats.losses == pytest.approx({"loss": float(-(log_prob * log_prob.exp()).mean())})
    means = {"entropy": float(entropy.mean()), "mean_token_accuracy": float(correct.mean())}
    assert stats.metrics == pytest.approx(means)
    sums, counts = engine.evaluate(given, Accuracy())
    assert sums == {"accuracy": float(correct.sum())} and counts == {"accuracy": len(correct)}
    # The weight has no gradient: d(-p log p) would have another one.
    x = torch.tensor([[-1.0]], requires_grad=True)
    NextToken(dft=True)({"log_prob": x}, {"mask": torch.ones(1, 1, dtype=torch.bool)}).losses["loss"].backward()
    assert float(x.grad) == pytest.approx(-math.exp(-1))


def test_scores_at_a_temperature_are_those_of_divided_logits():
    engine, given = Engine.build(config_of(), Mesh.single()), batches(1)
    plain, cooled = (engine.scores(given, ("log_prob", "entropy"), t)[0] for t in (1.0, 0.7))
    assert (cooled["entropy"] <= plain["entropy"]).all() and not torch.allclose(plain["log_prob"], cooled["log_prob"])
    stage = engine.model.stages[0]
    stage.units = None
    with mock.patch.object(decoder, "label_scores", lambda logits, labels, *_: {"log_prob": logits[:, 0]}):
        first = stage(None, given[0])["log_prob"]  # the logit of entry 0, where tokens count
    assert torch.equal(first == 0, ~given[0]["mask"])
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UsageError, match="temperature"):
            engine.scores(given, ("log_prob",), bad)


def test_a_loss_that_needs_what_the_head_has_not_is_refused():
    @dataclass(frozen=True)
    class Critic(Weighed):
        needs: ClassVar[tuple[str, ...]] = ("value",)

    engine = Engine.build(config_of(), Mesh.single())
    with pytest.raises(UsageError, match="Critic needs value; the head model.head=lm gives log_prob, entropy, correct"):
        engine.train_step(batches(1), Critic(), 0.01)


# --- tokens that do not count --------------------------------------------------------------------------------------


def rows_of_the_head(layout: Layout, options: dict[str, Any]) -> tuple[list[int], list[Tensor], list[bool]]:
    """(tokens that reached the vocabulary's matrix on this rank, scores of each microbatch, masks)."""
    mesh, seen = Mesh.start(layout), []
    names = {"on": "fused_scores", "off": "label_scores"}
    name = names[options["fused_head"]]
    plain = vars(decoder)[name]

    def spy(x: Tensor, *rest: Any) -> dict[str, Tensor]:
        seen.append(x.flatten(0, -2).shape[0])
        return plain(x, *rest)

    engine, given = Engine.build(config_of(**options), mesh), share(batches(4, tokens=16), mesh)
    given[0] = nothing(given[0])
    with mock.patch.object(decoder, name, spy):
        scores = engine.scores(given, ("log_prob", "entropy"))
    return seen, [each["log_prob"] for each in scores], [batch["mask"] for batch in given]


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(cp=2), Layout(dp=2)], ids=str)
def test_masked_tokens_never_reach_the_vocabulary(layout, fused):
    ranks = run_ranks(layout.world, rows_of_the_head, layout, {"fused_head": fused, "sp": layout.tp > 1})
    every = [sum(rank[0][micro] for rank in ranks) for micro in range(len(ranks[0][0]))]
    masks = [rank[2] for rank in (ranks if layout.dp > 1 else ranks[:1])]
    counted = [sum(int(mask[micro].sum()) for mask in masks) for micro in range(len(every))]
    assert counted[0] == 0 and every == [n * layout.tp for n in counted]
    for _, scores, mask in ranks:
        assert all(torch.equal(x == 0, ~m) for x, m in zip(scores, mask, strict=True))


# --- value heads ---------------------------------------------------------------------------------------------------


def test_a_value_head_starts_small_and_never_takes_rows_of_a_vocabulary(tmp_path: Path):
    wide = replace(MODEL, tie_embeddings=False, hidden_size=24)
    language = Engine.build(config_of(wide), Mesh.single())
    folder = store.save(tmp_path, 3, list(language.parts()), {"engine": language.counters()}, Mesh.single())
    config = config_of(replace(wide, head="value"))
    critic = Engine.build(config, Mesh.single())
    shards = critic.parameters.shards
    assert shards["head.weight"].init.std == 25**-0.5 and shards["head.weight"].full == (1, 24)
    with CheckpointReader(folder) as reader:
        reader.read_into("head.weight", (0, 0), torch.empty(1, 24, dtype=torch.float64))  # a box of it can be read
        with pytest.raises(CheckpointError, match=r"head.weight in the shape \[61, 24\], this model needs \[1, 24\]"):
            critic.load(reader, optimizer=False)
        with pytest.raises(CheckpointError, match="head.weight"):
            ParallelModel(config.model, config.layout, config.compute, Mesh.single()).load(reader)


def test_the_norm_of_a_step_is_zero_only_without_gradients():
    """Clipping divides by the norm: nothing of a step without gradients becomes not a number."""
    engine = Engine.build(config_of(optim=OptimConfig(clip=1.0)), Mesh.single())
    engine.train_step([nothing(batch) for batch in batches(1)], NextToken(), 0.01)
    assert float(clip_gradients(engine.parameters, 1.0)) == 0.0
    assert all(torch.isfinite(held.tensor).all() for held in engine.gradients())
