"""What fine-tunes a model, on layouts, against references of its own: a slice of what `megallm oracle --trainer
KIND` runs."""

from __future__ import annotations

import pytest
import torch

from megallm.base.errors import UsageError
from megallm.oracle import run
from megallm.oracle.compare import Verdict, frozen, run_row
from megallm.oracle.feed import global_batch, micro_batches
from megallm.oracle.fine_tuning import FINE_TUNING, as_trainer, control_row, fits_trainer
from megallm.oracle.reference import decays
from megallm.oracle.table import sample_rows
from megallm.oracle.trainers import CONTROLS_OF, LAYOUTS, TRAINER_MISTAKES, TRAINERS
from megallm.parallel.comm import BREAKS
from tests.oracle.test_oracle import arguments
from tests.ranks import pool

pytestmark = pytest.mark.oracle

NARROW = [layout for layout in LAYOUTS if layout[0] != "dp2-tp2-pp2-zero2"]
# Every layout with one kind, so that every kind has one or two; and some that only their kind has.
KINDS = list(TRAINERS)
SLICE = [f"{KINDS[n % len(KINDS)]}-{NARROW[n % len(NARROW)][0]}" for n in range(max(len(KINDS), len(NARROW)))]
SLICE += ["sft-dropout-tp2-sp-full", "sft-dropout-cp2-dp2-zero3-packed", "lora-dropout-dp2-tp2-sp"]
SLICE += ["lora-ends-tied-pp2-sp", "dpo-lora-dp2-tp2", "dpo-packed", "gspo-cp2-ulysses-packed", "reward-zb-v"]
SLICE += ["distill-tp4-two-kv", "distill-stored-cp2-packed", "distill-self-lora-pp2-tp2"]
BY_NAME = {row.name: row for row in FINE_TUNING}
CONTROLS = [(kind, name) for kind, names in CONTROLS_OF.items() for name in names]


def assert_equal(verdict: Verdict) -> None:
    assert verdict.passed, verdict.problem or verdict.failures
    state = {name for name in verdict.weights if name.endswith(".moe.router.bias")}
    untouched = frozen(verdict.row, verdict.weights)
    assert verdict.grads.keys() == verdict.weights.keys() - state - untouched
    assert (verdict.row.adapter is None) == (not untouched)


@pytest.mark.parametrize("name", SLICE)
def test_row_equals_the_reference(name):
    assert_equal(run_row(pool(), BY_NAME[name]))


@pytest.mark.parametrize("kind", ["lora", "dpo", "gspo"])
def test_random_layouts_equal_the_reference(kind):
    for row in run.random_rows("all", 1, 3, kind):
        assert_equal(run_row(pool(), row))


def test_every_kind_stands_on_sixteen_layouts_and_in_the_slice():
    for kind in TRAINERS:
        layouts = {(row.layout_text, row.packed, row.mask) for row in FINE_TUNING if row.trainer == kind}
        assert len(layouts) >= 16, kind
    assert {BY_NAME[name].trainer for name in SLICE} == TRAINERS.keys()


# Negative controls

QUICK = (
    ("sft", "loss.counts"), ("sft", "dropout.keys"),
    ("lora", "lora.partial"), ("lora", "frozen.touched"), ("lora", "grads.partial"),
    ("dora", "dora.norm"), ("adalora", "adalora.gram"), ("adalora", "adalora.scores"), ("prefix", "cp.lse"),
    ("qlora", "frozen.touched"), ("houlsby", "grads.partial"), ("reward", "head.outputs"),
    ("reward", "pairs.split"), ("dpo", "pairs.split"), ("dpo", "loss.counts"), ("kto", "loss.counts"),
    ("dpo", "counts.doubled"), ("ilql", "target.sign"), ("ilql", "head.outputs"), ("awr", "loss.counts"),
    ("grpo", "vocab.entropy"), ("gspo", "cp.outputs"), ("distill", "vocab.divergence"),
    ("distill", "distill.temperature"), ("chord", "demonstrations.sampled"), ("chord", "loss.counts"),
)  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), QUICK)
def test_a_mistake_is_noticed(kind, name):
    verdict = run_row(pool(), control_row(name, kind), frozenset({name}))
    assert verdict.problem is None, "the row must fail by its numbers, not by a crash"
    assert not verdict.passed
    assert bool(verdict.touched) == (name == "frozen.touched")


def test_controls_name_reductions_and_rows_that_exist():
    assert all(name in BREAKS | TRAINER_MISTAKES for _, name in CONTROLS)
    assert all(control_row(name, kind) is not None for kind, name in CONTROLS)
    assert CONTROLS_OF.keys() == TRAINERS.keys()
    assert {name for _, name in CONTROLS} >= TRAINER_MISTAKES.keys()


def test_a_touched_weight_is_named_and_nothing_else_fails():
    verdict = run_row(pool(), control_row("frozen.touched", "ia3"), frozenset({"frozen.touched"}))
    assert verdict.failures == [f"frozen {verdict.touched[0]} was touched"] and len(verdict.touched) == 1
    assert verdict.initial and not verdict.passed


# The batches


@pytest.mark.parametrize("name", ["dpo-packed", "reward-dp2-zero1-masked-rank", "kto-accumulation", "gspo-packed"])
def test_batches_hold_sequences_and_their_numbers(name):
    row = BY_NAME[name]
    whole = global_batch(row, 1)
    micros = [m for rank in range(row.layout.dp) for m in micro_batches(row, 1, rank)]
    assert torch.equal(torch.cat([m["mask"] for m in micros]), whole["mask"])
    for micro in micros:
        sequences = len(micro["cu_seqlens"]) - 1 if row.packed else row.micro_batch
        assert micro["margin"].shape == micro["advantages"].shape == (sequences,)
        if row.trainer in ("dpo", "reward"):
            assert sequences % 2 == 0
        if row.trainer == "reward" and not row.packed:
            assert micro["mask"].sum(1).view(-1, 2).diff().count_nonzero() == 0
    counts = [int(m["mask"].sum()) for m in micros]
    assert len(set(counts)) > 1 or row.trainer == "reward"


def test_decay_skips_what_is_no_matrix_of_an_adapter():
    skipped = ("ia3_l", "keys", "values", "0.lora_E", "0.lora_magnitude_vector", "down.bias")
    assert not any(decays(f"layers.0.mlp.down.adapter.default.{leaf}") for leaf in skipped)
    assert not decays("prompt.adapter.default.weight_0")
    assert all(decays(f"layers.0.attention.q.adapter.default.0.lora_{leaf}") for leaf in "AB")


# The command


def test_the_command_takes_trainers():
    said: list[str] = []
    assert run.main(arguments(trainer="dora", layout="tp=2", break_name="dora.norm"), said.append) == 70
    assert "0 of 1 rows equal the reference with the reduction dora.norm left out." in "".join(said)
    said.clear()
    assert run.main(arguments(trainer="gspo", list=True), said.append) == 0
    assert "gspo-dp2-zero3-full" in "".join(said) and "sft-single" not in "".join(said)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"trainer": "ppo2"}, "--trainer ppo2 is not known; it takes pretrain, sft, lora"),
        ({"trainer": "prompt", "layout": "dp=2,ep=2"}, "experts have no prompt"),
        ({"trainer": "sft", "break_name": "muon.matrices"}, "its names are loss.counts"),
        ({"break_name": "pairs.split"}, "pairs.split is no reduction"),
    ],
)
def test_what_cannot_be_run_is_refused(given, words):
    with pytest.raises(UsageError, match=words):
        run.main(arguments(**given), lambda text: None)


@pytest.mark.parametrize("kind", TRAINERS)
def test_random_rows_are_those_of_pretraining(kind):
    drawn = [row for row in sample_rows(40, 5) if fits_trainer(row, kind)]
    made = [as_trainer(row, kind) for row in drawn]
    assert len(made) > 5 and {row.trainer for row in made} == {kind}
    for before, after in zip(drawn, made, strict=True):
        assert before.layout_text == after.layout_text
        assert after.config.max_positions == 64 and global_batch(after, 0)["mask"].any()
