"""Every layout against the reference; every reduction missed when it is left out; the comparison itself."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megallm.base.errors import CannotWrite, InternalError, UsageError
from megallm.oracle import compare, run, table
from megallm.oracle.compare import RankRecord, Verdict, frozen, run_row, train_rank
from megallm.oracle.feed import global_batch, micro_batches
from megallm.oracle.fine_tuning import FINE_TUNING, control_row
from megallm.oracle.layered import LAYERED_CONTROLS
from megallm.oracle.table import (
    CONTROLS,
    MASKS,
    MODELS,
    RECOMPUTE,
    ROWS,
    Row,
    row_named,
    sample_rows,
)
from megallm.parallel.comm import BREAKS
from tests.ranks import pool, run_ranks

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_row_equals_the_reference(row: Row) -> None:
    assert_passed(run_row(pool(), row))


def test_random_layout_equals_the_reference(random_row: Row) -> None:
    assert_passed(run_row(pool(), random_row))


def assert_passed(verdict: Verdict) -> None:
    assert verdict.passed, verdict.problem or verdict.failures
    parameters = verdict.row.config.num_params()
    assert parameters > 0
    state = {name for name in verdict.weights if name.endswith(".moe.router.bias")}  # moved by loads, not by gradients
    assert verdict.grads.keys() == verdict.weights.keys() - state - frozen(verdict.row, verdict.weights)


# Negative controls


def test_every_reduction_has_a_control_row() -> None:
    assert CONTROLS.keys() == BREAKS.keys()


@pytest.mark.parametrize("name", BREAKS)
def test_leaving_a_reduction_out_is_noticed(name: str) -> None:
    row = control_row(name)  # passes unbroken: it is one of the rows above, or of fine-tuning's
    verdict = run_row(pool(), row, frozenset({name}))
    assert verdict.problem is None, "the row must fail by its numbers, not by a crash"
    assert verdict.initial or name == "dora.norm"  # DoRA's magnitudes start as lengths
    assert not verdict.passed
    assert verdict.failures


@pytest.mark.parametrize(("name", "reduction"), LAYERED_CONTROLS, ids=str)
def test_leaving_a_reduction_out_is_noticed_where_layers_differ(name: str, reduction: str) -> None:
    """Norms of outputs, biases of routers and experts, windows on a ring, caps in the fused head, and so on."""
    verdict = run_row(pool(), row_named(name), frozenset({reduction}))
    assert verdict.problem is None and verdict.initial and verdict.failures


def test_a_missing_clip_norm_or_report_is_blamed_on_what_it_touches() -> None:
    reported = run_row(pool(), row_named("dp2"), frozenset({"loss.report"}))
    assert len(reported.failures) == 1
    assert reported.failures[0].startswith("loss off by")
    tied = run_row(pool(), row_named("pp2-tied"), frozenset({"grads.tie"}))
    assert tied.grads["embedding.weight"] > 1e-3


# The comparison


@pytest.fixture(scope="module")
def records() -> list[RankRecord]:
    return run_ranks(2, train_rank, row_named("tp2"), frozenset())


def held(pieces: compare.Pieces, name: str) -> torch.Tensor:
    """The piece of one tensor that a rank of this row holds."""
    return next(tensor for piece, _, tensor in pieces if piece == name)


def tamper_gradient(record: RankRecord) -> str:
    held(record.steps[2].grads, "layers.1.mlp.down.weight")[0, 0] += 1e-8 * record.steps[2].grad_norm
    return "gradient of layers.1.mlp.down.weight"


def tamper_weight(record: RankRecord) -> str:
    held(record.final, "embedding.weight")[3, 3] *= 1 + 1e-7
    return "weight embedding.weight"


def tamper_loss(record: RankRecord) -> str:
    record.steps[1].loss *= 1 + 1e-8
    return "loss"


def tamper_norm(record: RankRecord) -> str:
    record.steps[0].grad_norm *= 1 - 1e-8
    return "grad_norm"


def tamper_start(record: RankRecord) -> str:
    weight = held(record.initial, "final_norm.weight")
    weight[0] = torch.nextafter(weight[0], weight[0] + 1)
    return "initial weights differ"


def tamper_with_nan(record: RankRecord) -> str:
    held(record.steps[0].grads, "final_norm.weight")[0] = float("nan")
    return "gradient of final_norm.weight"


TAMPERINGS = (tamper_gradient, tamper_weight, tamper_loss, tamper_norm, tamper_start, tamper_with_nan)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("tamper", TAMPERINGS, ids=[t.__name__ for t in TAMPERINGS])
def test_a_deviation_on_one_rank_is_seen_and_named(
    records: list[RankRecord], tamper: Callable[[RankRecord], str], rank: int
) -> None:
    row = row_named("tp2")
    clean = Verdict(row)
    compare.judge(clean, records)
    assert clean.passed
    changed = [
        dataclasses.replace(r, steps=[dataclasses.replace(s, grads=clone(s.grads)) for s in r.steps]) for r in records
    ]
    changed = [dataclasses.replace(r, initial=clone(r.initial), final=clone(r.final)) for r in changed]
    blamed = tamper(changed[rank])
    verdict = Verdict(row)
    compare.judge(verdict, changed)
    assert not verdict.passed
    assert len(verdict.failures) == 1
    assert verdict.failures[0].startswith(blamed)


def clone(pieces: compare.Pieces) -> compare.Pieces:
    return [(name, box, piece.clone()) for name, box, piece in pieces]


def test_a_piece_nobody_holds_is_an_error(records: list[RankRecord]) -> None:
    lacking = [
        dataclasses.replace(r, initial=[piece for piece in r.initial if piece[0] != "final_norm.weight"])
        for r in records
    ]
    with pytest.raises(InternalError, match="no rank holds some elements of final_norm.weight"):
        compare.judge(Verdict(row_named("tp2")), lacking)


# The rows


def test_the_table_has_distinct_names_and_uses_everything_it_defines() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {row.mask for row in (*ROWS, *FINE_TUNING)} == MASKS.keys()
    assert {row.recompute for row in ROWS} == set(RECOMPUTE)
    assert {row.model for row in ROWS} | {"four-kv"} == MODELS.keys()


@pytest.mark.parametrize("seed", range(20))
def test_random_rows_repeat_for_a_seed_and_fit(seed: int) -> None:
    rows = sample_rows(25, seed)
    assert rows == sample_rows(25, seed)
    assert rows[:10] == sample_rows(10, seed)
    assert rows != sample_rows(25, seed + 1)
    for row in rows:
        config, layout = row.config, row.layout
        assert layout.world <= 8
        assert config.num_heads % layout.tp == 0
        assert config.num_layers >= layout.pp
        assert row.seq_len % layout.tp == 0
        assert global_batch(row, 0)["positions"].max() < config.max_positions


@pytest.mark.parametrize("row", [row for row in ROWS if row.layout.dp > 1], ids=lambda row: row.name)
def test_data_ranks_split_the_global_batch_into_contiguous_blocks(row: Row) -> None:
    whole = global_batch(row, 1)
    split = [micro for rank in range(row.layout.dp) for micro in micro_batches(row, 1, rank)]
    for key, value in whole.items():
        assert torch.equal(torch.cat([micro[key] for micro in split]), value)
    assert not torch.equal(whole["tokens"], global_batch(row, 2)["tokens"])


def test_masks_are_what_their_names_say() -> None:
    counted = {name: [int(m["mask"].sum()) for m in micro_batches(row_named(f"dp2-{row}"), 0, 0)] for name, row in
               {"rank": "masked-rank", "micro": "masked-micro", "one": "one-token"}.items()}  # fmt: skip
    assert counted["rank"] == [0]
    assert counted["micro"][1] == 0 < counted["micro"][0]
    assert counted["one"] == [0]
    assert int(global_batch(row_named("dp2-one-token"), 0)["mask"].sum()) == 1
    uneven = global_batch(row_named("dp2"), 0)["mask"].view(2, -1).sum(1)
    assert uneven[0] != uneven[1]


# The command


def arguments(**given: object) -> argparse.Namespace:
    standard = {
        "model": "all",
        "trainer": "pretrain",
        "layout": None,
        "layouts": None,
        "seed": 0,
        "break_name": None,
        "device": "cpu",
        "json": None,
        "list": False,
    }
    return argparse.Namespace(**(standard | given))


def test_the_command_reports_rows_and_exits_by_their_outcome(tmp_path: Path) -> None:
    said: list[str] = []
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    assert run.main(arguments(layout="tp=2,pp=2,sp=1", json=str(good)), said.append) == 0
    assert run.main(arguments(layout="dp=2", break_name="grads.data", json=str(bad)), said.append) == 70
    (row,) = json.loads(good.read_text())["rows"]
    assert row["pass"] is True
    assert row["layout"] == "tp=2,pp=2,sp=1"
    assert max(row["loss"], row["grad_norm"], row["weights"], *row["grads"].values()) <= 1e-9
    assert "layers.1.attention.kv.weight" in row["grads"]
    (row,) = json.loads(bad.read_text())["rows"]
    assert row["pass"] is False
    assert max(row["grads"].values()) > 1e-9
    assert "FAIL" in "".join(said)
    assert "0 of 1 rows equal the reference with the reduction grads.data left out." in "".join(said)


def test_list_names_rows_and_reductions(tmp_path: Path) -> None:
    said: list[str] = []
    assert run.main(arguments(list=True, json=str(tmp_path / "list.json")), said.append) == 0
    listing = json.loads((tmp_path / "list.json").read_text())
    assert [row["name"] for row in listing["rows"]] == [row.name for row in ROWS]
    assert listing["reductions"] == BREAKS
    assert all(name in "".join(said) for name in [*BREAKS, *(row.name for row in ROWS)])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": "mamba"}, "--model mamba is not known; it takes all, gqa, moe, mla, encoder"),
        ({"break_name": "grads.dta"}, "grads.dta is no reduction; the names are tp.enter"),
        ({"layout": "tp=two"}, "--layout has 'tp=two'"),
        ({"layout": "tp=2,sp=3"}, "'sp=3'"),
        ({"layout": "tp=0"}, "layout.tp is 0"),
        ({"layout": "tp=4,pp=4"}, "needs 16 ranks; the oracle runs at most 8"),
        ({"layouts": 0}, "at least 1"),
        ({"layout": "tp=2", "layouts": 3}, "one of the two"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_sentence(given: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        run.main(arguments(**given), lambda text: None)


@pytest.mark.parametrize("kind", run.TYPICAL)
def test_a_kind_of_model_selects_its_rows(kind: str) -> None:
    """The kinds divide the table up, and each has a model for any layout and for random ones."""
    rows = run.select_rows(arguments(model=kind))
    assert {run.kind_of(row.config) for row in rows} == {kind} and len(rows) >= 10
    assert sum(len(run.rows_of(other)) for other in run.TYPICAL) == len(ROWS)
    drawn = run.select_rows(arguments(model=kind, layouts=3, seed=4))
    assert [run.kind_of(row.config) for row in drawn] == [kind] * 3
    assert drawn[:2] == run.select_rows(arguments(model=kind, layouts=2, seed=4))
    (row,) = run.select_rows(arguments(model=kind, layout="tp=3,pp=2"))
    assert run.kind_of(row.config) == kind and row.config.num_heads % 3 == 0
    assert_passed(run_row(pool(), row))


def test_a_report_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite):
        run.main(arguments(list=True, json=str(tmp_path / "absent" / "list.json")), lambda text: None)


def test_layouts_from_the_command_line_get_a_model_that_fits() -> None:
    for text in ("tp=8", "tp=3,sp=1", "pp=8", "dp=2,tp=2,pp=2,sp=true", "tp=7"):
        row = table.row_for_layout(text)
        assert row.config.num_heads % row.layout.tp == 0
        assert row.config.num_layers >= row.layout.pp
        assert row.seq_len % row.layout.tp == 0
