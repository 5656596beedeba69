"""Whole runs of dpo, orpo, kto and reward: the same at every layout, packed or padded, and with every kind of reference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megallm.base.errors import InternalError
from megallm.losses.reduce import per_sequence
from megallm.training import reference_run
from megallm.training.kto import KtoRun
from megallm.training.references import AdapterOff, Frozen
from tests.ranks import run_ranks
from tests.training.preference_cases import (
    RUNS,
    config_of,
    metrics,
    pairs,
    train,
    weights,
    worst,
    write_rows,
    write_start,
)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {"dpo.rpo_alpha": 0.5, "reference.kind": "frozen"}),
    "orpo": ("dpo", {"dpo.loss": "orpo"}),
    "kto": ("kto", {"kto.desirable_weight": 1.3}),
    "reward": ("reward", {"reward.center": 0.01}),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-pp2": {"layout.tp": 2, "layout.pp": 2},
    "dp2-zero3": {"layout.dp": 2, "zero.stage": 3, "train.micro_batch": 1},
    "cp2": {"layout.cp": 2},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> tuple[Path, str, str]:
    """A folder for runs, a model to start from, and a file of pairs."""
    folder = tmp_path_factory.mktemp("preference")
    return folder, write_start(folder / "start"), write_rows(folder / "pairs.jsonl", pairs())


@pytest.fixture(scope="module")
def whole(place):
    """name -> the run of one process, made once."""
    folder, start, source = place
    made = {}

    def run(name: str) -> Path:
        if name not in made:
            verb, values = CASES[name]
            made[name] = train(verb, folder / name, start, source, **values)
        return made[name]

    return run


def all_of_them(folder: Path, start: str, source: str, layout: str, values: dict[str, Any]) -> None:
    """Every case at one layout, on this rank."""
    for name, (verb, own) in CASES.items():
        train(verb, folder / f"{name}-{layout}", start, source, **own | values)


def same(ours: Path, theirs: Path, steps: int = 3, within: float = 1e-9) -> None:
    for mine, other in zip(metrics(ours), metrics(theirs), strict=True):
        assert mine == pytest.approx(other, rel=within, abs=within)
    assert worst(weights(ours, steps), weights(theirs, steps)) < within


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(place, whole, layout):
    values = LAYOUTS[layout]
    world = math.prod(value for key, value in values.items() if key.startswith("layout."))
    run_ranks(world, all_of_them, *place, layout, values)
    for name in CASES:
        same(place[0] / f"{name}-{layout}", whole(name))


ALL = {"dpo": 12, "kto": 24, "reward": 12}  # rows of the file


def packed(verb: str, folder: Path, start: str, source: str, **values: Any) -> Path:
    """Every row of the file in one packed row."""
    room = 256 if verb == "kto" else 128  # a row of pairs has twice as many places
    one = {"data.packing": True, "data.seq_len": room, "train.global_batch": 1, "train.micro_batch": 1, "train.steps": 2}
    return train(verb, folder, start, source, **one | values)


def packed_on_cp(folder: Path, start: str, source: str) -> None:
    packed("dpo", folder / "dpo-packed-cp2", start, source, **CASES["dpo"][1], **{"layout.cp": 2})
    packed("kto", folder / "kto-packed-cp2", start, source, **CASES["kto"][1], **{"layout.cp": 2})


def test_packed_equals_padded(place):
    """Several pairs, or answers, in one row, also where context parallelism cuts it."""
    folder, start, source = place
    run_ranks(2, packed_on_cp, folder, start, source)
    for name, (verb, values) in CASES.items():
        count = {"train.global_batch": ALL[verb], "train.micro_batch": ALL[verb] // 2, "train.steps": 2}
        padded = train(verb, folder / f"{name}-all", start, source, **values, **count)
        same(packed(verb, folder / f"{name}-packed", start, source, **values), padded, 2)
        if name in ("dpo", "kto"):
            same(folder / f"{name}-packed-cp2", padded, 2)


KINDS = {
    "precomputed": {},
    "frozen": {},
    "synced": {"reference.every": 100},
    "adapter_off": {"peft.method": "lora", "peft.dim": 4},
    "adapters, precomputed": {"peft.method": "lora", "peft.dim": 4},
    "adapters, frozen": {"peft.method": "lora", "peft.dim": 4},
}


@pytest.mark.parametrize("verb", ["dpo", "kto"])
def test_all_kinds_of_reference_agree(place, verb):
    folder, start, source = place
    valid = {"data.valid_sources": {source: None}, "eval.batches": 2}
    made = {}
    for name, values in KINDS.items():
        kind = {"reference.kind": name.rpartition(" ")[2]}
        made[name] = train(verb, folder / f"{verb}-{name}", start, source, **values, **kind, **valid)
    for name, run in made.items():
        other = made["adapter_off" if "adapter" in name else "precomputed"]
        for mine, theirs in zip(metrics(run), metrics(other), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-9), name
    last = metrics(made["frozen"])[-1]
    assert last["val/loss"] != pytest.approx(metrics(made["adapter_off"])[-1]["val/loss"])


def test_a_synced_reference_follows_the_policy(place):
    folder, start, source = place
    kind = {"reference.kind": "synced", "reference.alpha": 1.0, "reference.every": 2, "train.steps": 4}
    rows = metrics(train("dpo", folder / "synced", start, source, **kind))
    assert rows[0]["train/loss"] == pytest.approx(math.log(2)) == rows[2]["train/loss"] != rows[1]["train/loss"]
    stopped = folder / "synced-stopped"
    for stop in (3, 4):
        train("dpo", stopped, start, source, **kind, **{"train.stop_at": stop})
    assert metrics(stopped) == rows and worst(weights(stopped, 4), weights(folder / "synced", 4)) == 0


def test_a_stored_reference_survives_the_end_of_a_run(place, monkeypatch):
    """It is read again, bit for bit; where the file is gone it is made again from where the run began."""
    folder, start, source = place
    whole = train("dpo", folder / "stored", start, source)
    stopped = train("dpo", folder / "stored-stopped", start, source, **{"train.stop_at": 1})
    (stored,) = (stopped / "cache/reference").iterdir()
    before = stored.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(reference_run, "compute_table", None)
        train("dpo", stopped, start, source, **{"train.stop_at": 2})
    stored.unlink()
    train("dpo", stopped, start, source)
    assert metrics(stopped) == metrics(whole) and stored.read_bytes() == before
    assert worst(weights(stopped, 3), weights(whole, 3)) == 0


# Negative controls


def test_a_reference_with_its_adapter_on_is_noticed(place, monkeypatch):
    folder, start, source = place
    lora = {"peft.method": "lora", "peft.dim": 4}
    right = metrics(train("dpo", folder / "off", start, source, **lora))
    monkeypatch.setattr(AdapterOff, "log_probs", Frozen.log_probs)
    wrong = metrics(train("dpo", folder / "on", start, source, **lora))
    assert right[0]["train/loss"] == wrong[0]["train/loss"] and wrong[1]["rewards/margins"] == 0 != right[1]["rewards/margins"]


def test_another_reference_is_noticed_in_the_first_step(place, monkeypatch):
    folder, start, source = place
    other = write_start(folder / "other", seed=4)
    rows = metrics(train("dpo", folder / "given", start, source, **{"reference.model": other}))
    assert rows[0]["train/loss"] != pytest.approx(math.log(2), rel=1e-3), "a reference that was asked for is fine"
    monkeypatch.setattr(RUNS["dpo"], "frozen", lambda self, mesh: reference_run.Engine.build(self.config.engine, mesh))
    with pytest.raises(InternalError, match=r"The first loss is .* while the policy is the reference it must be 0\.693147"):
        values = {"reference.kind": "frozen", "run.seed": 99}
        train("dpo", folder / "wrong", start, source, **values)


def local_points(folder: Path, start: str, source: str) -> None:
    """The mean of a rank's own mismatched pairs instead of that of all."""
    original = KtoRun.complete

    def local(self, engine, batches):
        made = original(self, engine, batches)
        others = self.with_reference([self.named(batch)[1] for batch in batches])
        ratios = [
            per_sequence(log_prob.masked_fill(~batch["mask"], 0), batch) - batch["ref_log_probs"]
            for batch, log_prob in zip(others, engine.log_probs(others), strict=True)
        ]
        point = float(torch.cat(ratios).mean().clamp(min=0))
        return [batch | {"reference_point": torch.full_like(batch["reference_point"], point)} for batch in made]

    KtoRun.complete = local
    try:
        train("kto", folder / "kto-local", start, source, **CASES["kto"][1], **LAYOUTS["dp2-zero3"])
    finally:
        KtoRun.complete = original


def test_a_reference_point_of_one_rank_is_noticed(place, whole):
    run_ranks(2, local_points, *place)
    with pytest.raises(AssertionError):
        same(place[0] / "kto-local", whole("kto"))


def test_a_pair_that_is_split_is_refused(place, monkeypatch):
    """A microbatch with one answer of a pair would compare answers to different prompts."""
    folder, start, source = place
    run = RUNS["dpo"](config_of("dpo", folder / "split", start, source))
    whole_of = RUNS["dpo"].complete

    def split(self, engine, batches):
        halves = [{k: x[i : i + 1] for k, x in b.items()} for b in whole_of(self, engine, batches) for i in range(4)]
        return halves

    monkeypatch.setattr(RUNS["dpo"], "complete", split)
    with pytest.raises(ValueError, match="belong into the same microbatch"):
        train("dpo", Path(run.config.run.dir), start, source)
