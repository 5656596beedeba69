"""Whole runs of dpo, orpo, kto and reward: the same at every layout, packed or padded, with every kind of reference."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megallm.base.config import to_yaml
from megallm.base.errors import CheckpointError, DataError, InternalError, UsageError
from megallm.checkpoint.reader import step_folders
from megallm.losses import preference as losses
from megallm.losses.reduce import per_sequence
from megallm.parallel.mesh import Mesh
from megallm.run.lease import read_holder
from megallm.run.runfolder import RunFolder
from megallm.training import reference_run
from megallm.training.kto import KtoRun
from megallm.training.preference import loss_of
from megallm.training.preference_config import PAIR_LOSSES, SMOOTHED, WITH_MARGIN, DpoOptions
from megallm.training.references import AdapterOff, Frozen, ReferenceTable
from megallm.training.scoring import open_frozen, open_scorer
from tests.ranks import run_ranks
from tests.system.commands import ROOT
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
    "synced": ("dpo", {"dpo.loss": "ipo", "reference.kind": "synced", "reference.every": 1}),
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
    one = {"data.packing": True, "data.seq_len": room, "train.global_batch": 1, "train.micro_batch": 1}
    one |= {"train.steps": 2}
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


def savings(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["perf/shared_prefix_saving"] for row in rows if "perf/shared_prefix_saving" in row]


@pytest.mark.parametrize("name", ["dpo", "orpo", "reward"])
def test_shared_prompts_equal_plain_rows(place, whole, name):
    """Where it is cheaper, which is the default, wherever it can be, and packed."""
    folder, start, source = place
    verb, values = CASES[name]
    plain = train(verb, folder / f"{name}-plain", start, source, **values, **{"data.shared_prefix": "off"})
    assert not savings(plain) and all(saved > 0.1 for saved in savings(whole(name))) and savings(whole(name))
    same(whole(name), plain)
    said = (whole(name) / "log.txt").read_text() if (whole(name) / "log.txt").is_file() else ""
    assert not said or "answers share their prompt where that is cheaper" in said
    if name == "dpo":
        lora = {"peft.method": "lora", "peft.dim": 4, "peft.dropout": 0.1, "reference.kind": "adapter_off"}
        runs = [train(verb, folder / f"dpo-lora-{sharing}", start, source, **lora, **{"data.shared_prefix": sharing})
                for sharing in ("on", "off")]  # fmt: skip
        same(*runs)


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
    rows = metrics(train("dpo", folder / "follows", start, source, **kind))
    assert rows[0]["train/loss"] == pytest.approx(math.log(2)) == rows[2]["train/loss"] != rows[1]["train/loss"]
    stopped = folder / "follows-stopped"
    for stop in (3, 4):
        train("dpo", stopped, start, source, **kind, **{"train.stop_at": stop})
    assert metrics(stopped) == rows and worst(weights(stopped, 4), weights(folder / "follows", 4)) == 0


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


def test_a_run_that_is_killed_goes_on_bit_for_bit(place):
    """Kill -9 between two checkpoints; what the reference said and what was read is the same afterwards."""
    folder, start, source = place
    values = {"train.steps": 60, "checkpoint.every": 5, "dpo.rpo_alpha": 0.5, "data.packing": True, "data.seq_len": 32}
    values |= {"train.global_batch": 1, "train.micro_batch": 1}
    whole = train("dpo", folder / "quiet", start, source, **values)
    config = config_of("dpo", folder / "killed", start, source, **values)
    (folder / "killed.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "megallm", "dpo", str(folder / "killed.yaml")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = folder / "killed" / "metrics.jsonl"
    until = time.monotonic() + 100
    while not (rows.exists() and len(rows.read_bytes().splitlines()) > 8) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(read_holder(RunFolder(folder / "killed").lock).pid, signal.SIGKILL)  # the rank, not its launcher
    assert process.wait() != 0
    assert len(rows.read_bytes().splitlines()) < 60 and step_folders(folder / "killed" / "checkpoints")
    train("dpo", folder / "killed", start, source, **values)
    assert metrics(folder / "killed") == metrics(whole)
    assert worst(weights(folder / "killed", 60), weights(whole, 60)) == 0


def test_falling_chosen_answers_are_warned_of_once(place):
    """apo_down makes chosen answers less likely by itself, however small the model."""
    folder, start, source = place
    values = {"train.steps": 24, "dpo.watch_steps": 6, "dpo.beta": 1.0, "dpo.loss": "apo_down"}
    run = train("dpo", folder / "falls", start, source, **values)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (warned,) = [event for event in events if event["event"] == "likelihood_displacement"]
    assert "less likely" in warned["reason"] and "dpo.rpo_alpha" in warned["reason"] and warned["step"] >= 12
    run = train("dpo", folder / "kept", start, source, **values, **{"dpo.rpo_alpha": 10.0})
    assert "likelihood_displacement" not in (run / "events.jsonl").read_text()


def test_rows_that_cannot_be_compared(place):
    """Equal answers and odd numbers of pairs train nothing of their own; the rest is refused with its line."""
    folder, start, source = place
    equal = write_rows(folder / "equal.jsonl", [{"prompt": "1=", "chosen": "2", "rejected": "2"}] * 3)
    rows = metrics(train("dpo", folder / "equal", start, equal, **{"train.global_batch": 2}))
    assert [row["train/loss"] for row in rows] == pytest.approx([math.log(2)] * 3)
    assert rows[-1]["train/grad_norm"] < 1e-12
    odd = write_rows(folder / "odd.jsonl", pairs(5))
    held = {"data.valid_sources": {odd: None}, "eval.batches": 9, "train.steps": 1, "optim.lr": 1e-30}
    whole = held | {"train.global_batch": 10, "train.micro_batch": 10}
    some, at_once = (
        metrics(train("dpo", folder / name, start, source, **values))[-1]
        for name, values in (("odd", held), ("odd-whole", whole))
    )
    assert some["val/logps/chosen"] == pytest.approx(at_once["val/logps/chosen"], rel=1e-9)
    for row, words in (
        ({"prompt": "1=", "chosen": " ", "rejected": "2"}, r"2: chosen is empty"),
        ({"prompt": "1=", "chosen": "3"}, r"2: the column rejected is missing"),
        ({"prompt": "1=" * 20, "chosen": "3", "rejected": "4"}, r"2: the row has 42 tokens, more than data.seq_len"),
    ):
        bad = write_rows(folder / "bad.jsonl", [pairs(1)[0], row])
        with pytest.raises(DataError, match=rf"bad\.jsonl:{words}"):
            train("dpo", folder / "bad", start, bad, **{"data.too_long": "error"})
    rows = [{"prompt": "1=", "chosen": "3", "rejected": str(i)} for i in range(4)]
    same_prompt = write_rows(folder / "one.jsonl", rows)
    with pytest.raises(DataError, match="all 8 rows have the same prompt"):
        train("kto", folder / "one", start, same_prompt)
    train("kto", folder / "one-apo", start, same_prompt, **{"kto.loss": "apo_zero_unpaired"})
    margins = write_rows(folder / "margins.jsonl", [row | {"margin": 0.5} for row in pairs(4)])
    with pytest.raises(UsageError, match="The rows have margins, which dpo.loss ipo cannot use"):
        train("dpo", folder / "margins", start, margins, **{"dpo.loss": "ipo"})
    train("dpo", folder / "margins-fine", start, margins)


REFUSED = {
    "dpo.loss names 'dpo'; it must be one of": {"dpo.loss": "dpo"},
    "dpo.mixture has one of orpo, simpo, cpo, which stand alone": {"dpo.mixture": {"orpo": 1.0, "ipo": 1.0}},
    "dpo.mixture weighs sigmoid with -1.0": {"dpo.mixture": {"sigmoid": -1.0}},
    "dpo.mixture weighs sigmoid with nan": {"dpo.mixture": {"sigmoid": math.nan}},
    "dpo.gamma is nan": {"dpo.gamma": math.nan},
    "dpo.label_smoothing has no effect on sigmoid": {"dpo.label_smoothing": 0.1},
    "exo_pair needs a dpo.label_smoothing above 0": {"dpo.loss": "exo_pair"},
    "dpo.gamma has no effect on ipo": {"dpo.loss": "ipo", "dpo.gamma": 1.0},
    "dpo.loss simpo has no reference": {"dpo.loss": "simpo", "reference.kind": "frozen"},
    "give model.hf or model.init": {"model.init": None, "model.vocab_size": 257, "model.hidden_size": 8,
                                    "model.num_layers": 1, "model.num_heads": 1},
    "there is no adapter to switch off": {"reference.kind": "adapter_off"},
    "dpo.discopop_tau has no effect on sigmoid": {"dpo.discopop_tau": 0.1},
    "reference.every is 7, which moves a reference of the kind synced": {"reference.every": 7},
    "reference.alpha is 1.0, .* reference.kind is frozen": {"reference.kind": "frozen", "reference.alpha": 1.0},
    "synced takes the run's own model": {"reference.kind": "synced", "reference.model": "x"},
    "preferences are learned by causal language models": {"model.head": "value"},
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_go_together_is_refused(place, words):
    folder, start, source = place
    with pytest.raises(UsageError, match=words):
        config_of("dpo", folder / "never", start, source, **REFUSED[words])


def test_a_reference_that_is_not_there_is_named_by_its_key(place):
    folder, start, source = place
    for gone, why in (("nowhere", "is not there"), (str(folder), "holds no model")):
        with pytest.raises(UsageError, match=f"^reference.model {gone}: this folder {why}. Give"):
            train("dpo", folder / "gone", start, source, **{"reference.kind": "frozen", "reference.model": gone})
    frozen = Mesh.single(), "fp64"
    with pytest.raises(UsageError, match="^judge.model nowhere: this folder is not there"):
        open_frozen("nowhere", *frozen)
    with pytest.raises(UsageError, match="^reward_model.model nowhere: this folder is not there"):
        open_scorer("nowhere", *frozen)


def test_the_tables_of_the_configuration_are_those_of_the_losses():
    """The configuration is read without torch; so it has names of its own."""
    known = {*losses.KINDS, "simpo", "cpo"}
    assert set(PAIR_LOSSES) == known and set(SMOOTHED) == losses.SMOOTHED
    assert set(WITH_MARGIN) == losses.WITH_MARGIN | {"simpo", "cpo"}
    for name in PAIR_LOSSES:
        smoothing = 0.01 if name == "exo_pair" else 0.0
        made = loss_of(DpoOptions(loss=name, label_smoothing=smoothing))
        assert made.reference_free == (name in ("orpo", "simpo", "cpo")), name
    assert loss_of(DpoOptions(loss="simpo")) == losses.simpo_loss()
    assert loss_of(DpoOptions(loss="orpo")) == losses.orpo_loss()
    assert loss_of(DpoOptions(loss="cpo")) == losses.cpo_loss()
    mixed = loss_of(DpoOptions(mixture={"ipo": 0.5, "sigmoid": 2.0}, rpo_alpha=0.3))
    assert (mixed.kinds, mixed.weights, mixed.nll) == (("ipo", "sigmoid"), (0.5, 2.0), 0.3)


# Negative controls


def test_a_reference_with_its_adapter_on_is_noticed(place, monkeypatch):
    folder, start, source = place
    lora = {"peft.method": "lora", "peft.dim": 4}
    right = metrics(train("dpo", folder / "off", start, source, **lora))
    monkeypatch.setattr(AdapterOff, "log_probs", Frozen.log_probs)
    wrong = metrics(train("dpo", folder / "on", start, source, **lora))
    assert right[0]["train/loss"] == wrong[0]["train/loss"]
    assert wrong[1]["rewards/margins"] == 0 != right[1]["rewards/margins"]


def test_another_reference_is_noticed_in_the_first_step(place, monkeypatch):
    folder, start, source = place
    other = write_start(folder / "other", seed=4)
    rows = metrics(train("dpo", folder / "given", start, source, **{"reference.model": other}))
    assert rows[0]["train/loss"] != pytest.approx(math.log(2), rel=1e-3), "a reference that was asked for is fine"
    monkeypatch.setattr(RUNS["dpo"], "frozen", lambda self, mesh: reference_run.Engine.build(self.config.engine, mesh))
    words = r"The first loss is .* while the policy is the reference it must be 0\.693147"
    with pytest.raises(InternalError, match=words):
        values = {"reference.kind": "frozen", "run.seed": 99}
        train("dpo", folder / "wrong", start, source, **values)


def test_an_adapter_with_dropout_begins_as_no_reference(place):
    """Its B is not 0, so the first step, with inputs dropped, has another loss than ln 2, and rightly so."""
    folder, start, source = place
    lora = {"peft.method": "lora", "peft.dim": 4, "train.steps": 2}
    begun = train("dpo", folder / "begun", start, source, **lora)
    lora |= {"peft.adapter": str(begun / "adapter"), "train.steps": 1}
    assert metrics(train("dpo", folder / "dry", start, source, **lora))[0]["train/loss"] == pytest.approx(math.log(2))
    dropped = metrics(train("dpo", folder / "dropped", start, source, **lora, **{"peft.dropout": 0.3}))
    assert dropped[0]["train/loss"] != pytest.approx(math.log(2), rel=1e-4)


def test_a_damaged_table_of_the_reference_is_named(tmp_path):
    path = tmp_path / "table.npz"
    ReferenceTable.of([(3, 0, -1.0)]).save(path)
    whole = path.read_bytes()
    for piece in (whole[: len(whole) // 2], b"", b"no archive"):
        path.write_bytes(piece)
        with pytest.raises(CheckpointError, match=r"table\.npz cannot be read .*: remove it"):
            ReferenceTable.load(path)


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
    plain = {"data.shared_prefix": "off"}  # rows of which one can be taken
    run = RUNS["dpo"](config_of("dpo", folder / "split", start, source))
    whole_of = RUNS["dpo"].complete

    def split(self, engine, batches):
        halves = [{k: x[i : i + 1] for k, x in b.items()} for b in whole_of(self, engine, batches) for i in range(4)]
        return halves

    monkeypatch.setattr(RUNS["dpo"], "complete", split)
    with pytest.raises(ValueError, match="belong into the same microbatch"):
        train("dpo", Path(run.config.run.dir), start, source, **plain)
