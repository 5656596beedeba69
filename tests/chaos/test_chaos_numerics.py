"""FAULTS.md, rows 55 to 61: numbers that go wrong. Each row has a test that breaks something in real ranks or in a
real run, and its negative control: the same without the fault is quiet.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megallm.base.config import load
from megallm.base.errors import BadStep, Diverged, InternalError
from megallm.cli.main import main
from megallm.engine.digest import ReplicaCheck, bits_hash, checksum, compare_hashes, weights_digest
from megallm.engine.engine import Engine
from megallm.engine.fault import find_fault
from megallm.losses.language import NextToken
from megallm.models.mlp import Mlp
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.parallel.recompute import runs_again
from megallm.parallel.shard import Box
from megallm.run.divergence import SpikeDetector
from megallm.training import pretrain
from megallm.training.config import PretrainConfig
from megallm.training.data_ledger import DataLedger
from megallm.training.guard import run_guarded
from megallm.training.rerun import replay, saved_batch
from megallm.training.rl_config import GrpoConfig
from megallm.training.rules.grpo import going_back
from megallm.training.validate import check
from tests.engine.tiny import batches, engine_of, equal, share, state_of
from tests.ranks import run_ranks
from tests.system.commands import make_corpus, rows_of, write_config

MICROS = 2  # of a data rank
LAYER = "layers.1.mlp"


# Faults


def module_of(engine: Engine, name: str) -> torch.nn.Module | None:
    """The module on this rank, None where another stage has it."""
    named = {key: module for stage in engine.model.stages.values() for key, module in stage.named_modules()}
    return named.get(name)


@contextmanager
def poisoned(target: torch.nn.Module | None, micro: int, backward: bool = False) -> Iterator[None]:
    """The mlp `target` makes a NaN in one microbatch of each step: in its output, or in the gradient of its input."""
    real, calls = Mlp.forward, [0]

    def forward(self: Mlp, x: torch.Tensor) -> torch.Tensor:
        if self is not target:
            return real(self, x)
        if not runs_again():
            calls[0] += 1
        now = (calls[0] - 1) % MICROS == micro
        if now and backward and x.requires_grad:
            x = x.view_as(x)
            x.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), math.nan))
        y = real(self, x)
        return y.index_fill(1, torch.tensor([1]), math.nan) if now and not backward else y

    Mlp.forward = forward
    try:
        yield
    finally:
        Mlp.forward = real


LAYOUTS = {
    "dp2 zero3 recompute": (Layout(dp=2), {"zero": 3, "recompute": "full"}, 1),
    "tp2 sp selective": (Layout(tp=2), {"sp": True, "recompute": "selective"}, 1),
    "pp2": (Layout(pp=2), {}, 1),
    "pp2 zb-h1": (Layout(pp=2), {"schedule": "zb-h1"}, 1),
    "dp2 tp2 tree": (Layout(dp=2, tp=2), {"tree": True}, 3),
}


def faults_on_a_rank(layout: Layout, options: dict, guilty: int) -> list[tuple]:
    """(skipped, state as before, what is found) of a forward NaN, a backward NaN and a NaN in one rank's batch."""
    mesh = Mesh.start(layout)
    engine = engine_of(mesh, **options)
    target = module_of(engine, LAYER) if mesh.rank == guilty else None
    found = []
    for kind in ("forward", "backward", "data", "quiet"):
        mine = share(batches(MICROS * mesh.data.size), mesh)
        if kind == "data" and mesh.coords["dp"] == layout.coords(guilty)["dp"]:  # a replica has one batch
            mine[1]["mask"] = mine[1]["mask"] * torch.tensor(math.nan)
        examined = []
        engine.examine = lambda given, loss, seen=examined: seen.append(find_fault(engine, given, loss))
        before = state_of(engine)
        with poisoned(target if kind in ("forward", "backward") else None, micro=1, backward=kind == "backward"):
            stats = engine.train_step(mine, NextToken(), 0.01)
        found.append((kind, stats.skipped, equal(before, state_of(engine)), examined))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_56_57_58_the_first_layer_microbatch_and_rank_are_named_and_all_ranks_skip(name):
    layout, options, guilty = LAYOUTS[name]
    told = run_ranks(layout.world, faults_on_a_rank, layout, options, guilty)
    data_rank = layout.coords(guilty)["dp"]
    for rows in zip(*told, strict=True):
        kinds, skipped, untouched, found = zip(*rows, strict=True)
        kind = kinds[0]
        assert len(set(skipped)) == 1 and skipped[0] == (kind != "quiet"), (kind, "one decision")
        assert all(untouched) == (kind != "quiet"), (kind, "weights, moments and counters stay as they are")
        assert all(each == found[0] for each in found), "all ranks know the same"
        if kind == "quiet":
            assert found[0] == []
            continue
        (fault,) = found[0]
        assert fault.phase == kind and guilty in fault.ranks, str(fault)
        assert len(fault.ranks) == (layout.world // layout.dp if kind == "data" else 1), str(fault)
        assert fault.micro == data_rank * MICROS + 1, str(fault)
        assert fault.layer.startswith(LAYER) or (kind == "data" and fault.layer == "mask"), str(fault)
        if kind != "data":
            assert f"rank {guilty} (pp={layout.coords(guilty)['pp']}" in str(fault)


class OneRankLoss(NextToken):
    """Its value is not finite on one rank; the gradients of all are."""

    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.bad = bad

    def __call__(self, outputs, batch):
        terms = super().__call__(outputs, batch)
        if self.bad:
            terms.losses["loss"] = terms.losses["loss"] + torch.tensor(math.inf)
        return terms


def loss_on_a_rank() -> tuple:
    mesh = Mesh.start(Layout(tp=2))
    engine = engine_of(mesh)
    before, loss = state_of(engine), OneRankLoss(mesh.rank == 1)
    stats = engine.train_step(batches(2), loss, 0.01)
    return stats.skipped, math.isfinite(stats.grad_norm), equal(before, state_of(engine)), find_fault(
        engine, batches(2), loss
    )


def test_row_58_a_loss_that_only_one_rank_sees_is_skipped_by_all():
    (first, second) = run_ranks(2, loss_on_a_rank)
    assert first[:3] == second[:3] == (True, True, True), "the gradients were finite: the loss alone decides"
    assert first[3] == second[3] and (first[3].phase, first[3].ranks, first[3].micro) == ("loss", (1,), 0)


def test_row_56_a_weight_that_is_not_finite_is_named_and_a_fault_that_does_not_repeat_is_called_so():
    engine = engine_of()
    assert find_fault(engine, batches(2), NextToken()).phase == "none"
    with torch.no_grad():
        engine.parameters.views["layers.0.mlp_norm.weight"][3] = math.inf
    fault = find_fault(engine, batches(2), NextToken())
    assert (fault.phase, fault.layer) == ("weights", "layers.0.mlp_norm.weight")


# Whole runs, one rank


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(tmp_path, corpus) -> Path:
    return write_config(tmp_path / "c.yaml", corpus, run={"dir": str(tmp_path / "run")}, data={"log_samples": True})


def train(path: Path, *overrides: str, mesh: Mesh | None = None) -> None:
    settings = check(load(PretrainConfig, str(path), list(overrides)), None, None)
    run_guarded(pretrain.run, settings, mesh or Mesh.single(), "auto")


def events(path: Path, *kinds: str) -> list[dict]:
    lines = (path.parent / "run/events.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] in kinds]


@contextmanager
def faulty_batch(monkeypatch, number: int, scale: float = math.nan) -> Iterator[list[int]]:
    """The batch of this number, known by its tokens, scales what the head is given; yields the batches."""
    real, seen = Engine.train_step, []
    first = {}

    def train_step(self, given, loss, lr):
        key = given[0]["tokens"].sum().item(), given[-1]["tokens"].sum().item()
        first.setdefault(key, len(first) + 1)
        seen.append(first[key])
        norm = module_of(self, "final_norm")
        handle = None
        if first[key] == number:
            handle = norm.register_forward_hook(lambda module, inputs, out: out * scale)
        try:
            return real(self, given, loss, lr)
        finally:
            if handle is not None:
                handle.remove()

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "train_step", train_step)
        yield seen


def rows_read(path: Path) -> list[tuple[int, int]]:
    """(step, batch) of samples.jsonl."""
    lines = map(json.loads, (path.parent / "run/samples.jsonl").read_text().splitlines())
    return sorted({(row["step"], row.get("batch", row["step"])) for row in lines})


def test_row_57_skip_goes_on_saves_the_batch_and_replay_names_the_layer(config, monkeypatch, capsys):
    with faulty_batch(monkeypatch, 6):
        train(config)
    rows = rows_of(config.parent / "run")
    assert len(rows) == 12 and rows[-1]["train/skipped_steps"] == 1 and rows[5]["train/loss"] is None
    assert [row["train/lr"] for row in rows[4:8]] == sorted((row["train/lr"] for row in rows[4:8]), reverse=True)
    assert rows[5]["train/lr"] > rows[6]["train/lr"], "the schedule goes on"
    (event,) = events(config, "not_finite")
    assert (event["layer"], event["micro"], event["ranks"]) == ("final_norm", 0, [0])
    assert event["rows"] and all(row["step"] == 6 and row["micro"] == 0 for row in event["rows"])
    assert "final_norm, in the forward pass of microbatch 0 on rank 0" in capsys.readouterr().out
    run = str(config.parent / "run")
    batch = saved_batch(run, 6, None)
    quiet = replay(batch, run, "fp64")
    assert quiet.exact and quiet.layer is None, "the weights and the batch are sound"
    with poisoned_norm():
        found = replay(batch, run, "fp64")
    assert (found.phase, found.layer) == ("forward", "layers.1.mlp_norm")


def test_row_56_an_overflow_is_named_again_by_the_replay_and_is_none_in_float64(config, capsys):
    """Nothing is patched: weights so large that the first block overflows fp32 in the first step."""
    with pytest.raises(BadStep, match=r"is that of layers\.0\.[\w.]+, in the forward pass of microbatch 0 on rank 0"):
        train(config, "model.init_std=2e18", "guard.non_finite=stop")
    layer = events(config, "not_finite")[0]["layer"]
    run = str(config.parent / "run")
    capsys.readouterr()
    assert main(["replay", run, "--step", "1", "--precision", "fp32"]) == 0
    assert f"the first that is not finite: forward {layer}." in capsys.readouterr().out
    assert main(["replay", run, "--step", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layer"] is None and found["exact"] and found["about"]["fault"]["layer"] == layer
    assert max(found["largest"].values()) > 1e36, "where the large numbers are"
    assert main(["replay", run, "--step", "2"]) == 2 and "step-1-rank-0.safetensors" in capsys.readouterr().err


@contextmanager
def poisoned_norm() -> Iterator[None]:
    """The norm before the second mlp is called through its module's hooks: the third norm of the model."""
    from megallm.parallel.tensor import Norm

    real, calls = Norm.forward, [0]

    def forward(self, x):
        calls[0] += 1
        return real(self, x) * (math.nan if calls[0] == 4 else 1.0)

    Norm.forward = forward
    try:
        yield
    finally:
        Norm.forward = real


def test_row_56_stop_leaves_the_state_before_and_says_where(config, monkeypatch):
    stops = pytest.raises(BadStep, match=r"step 6 is not finite.*final_norm.*replay")
    with faulty_batch(monkeypatch, 6), stops as told:
        train(config, "guard.non_finite=stop")
    assert told.value.exit_code == 77
    assert rows_of(config.parent / "run")[-1]["step"] == 5
    train(config)  # the fault is gone: nothing was set aside, and the run goes on
    assert [row["step"] for row in rows_of(config.parent / "run")] == list(range(1, 13))
    assert not events(config, "diverged")


def test_row_59_going_back_leaves_batches_out_and_a_later_start_leaves_out_the_same(config, monkeypatch):
    with faulty_batch(monkeypatch, 8) as seen:
        train(config, "guard.non_finite=rollback", "guard.skip_batches=1", "train.stop_at=9")
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12][:8] + seen[8:] and len(seen) == 11
    expected = [(step, step if step <= 6 else step + 3) for step in range(1, 10)]  # 7, 8 and one more are left out
    assert rows_read(config) == expected
    (event,) = events(config, "rollback")
    assert (event["step"], event["to"], event["batches"]) == (8, 6, [7, 9])
    assert DataLedger(**json.loads((config.parent / "run/data_ledger.json").read_text())).number(7) == 10
    train(config)
    rows = rows_of(config.parent / "run")
    assert rows_read(config) == [(step, step if step <= 6 else step + 3) for step in range(1, 13)]
    assert [row["step"] for row in rows] == list(range(1, 13))


def test_row_59_a_run_that_goes_back_too_often_stops(config, monkeypatch):
    real = Engine.train_step

    def train_step(self, given, loss, lr):
        if self.optimizer.updates >= 4:
            given = [batch | {"mask": batch["mask"] * math.nan} for batch in given]
        return real(self, given, loss, lr)

    monkeypatch.setattr(Engine, "train_step", train_step)
    with pytest.raises(BadStep, match="went back 2 times"):
        train(config, "guard.non_finite=rollback", "guard.max_rollbacks=2")
    assert len(events(config, "rollback")) == 2


def rolled_back(path: str) -> str:
    """Two data ranks, of which the second one's eighth batch is bad: both go back."""
    real, seen = Engine.train_step, set()

    def train_step(self, given, loss, lr):
        seen.add(given[0]["tokens"].sum().item())
        if len(seen) == 8 and self.mesh.rank == 1 and lr > 0:
            given = [batch | {"mask": batch["mask"] * math.nan} for batch in given]
        return real(self, given, loss, lr)

    Engine.train_step = train_step
    try:
        mesh = Mesh.start(Layout(dp=2))
        train(Path(path), "layout.dp=2", "train.stop_at=9", "guard.non_finite=rollback", mesh=mesh)
    finally:
        Engine.train_step = real
    return "ended"


def test_rows_58_59_what_one_rank_sees_takes_all_ranks_back(config):
    assert run_ranks(2, rolled_back, str(config)) == ["ended", "ended"]
    (found,) = events(config, "not_finite")
    assert (found["phase"], found["layer"], found["ranks"], found["micro"]) == ("data", "mask", [1], 2)
    assert {row["micro"] for row in found["rows"]} == {2}, "the rows that this rank read"
    assert (config.parent / "run/replay/step-8-rank-1.safetensors").is_file()
    assert [(e["to"], e["batches"]) for e in events(config, "rollback")] == [(6, [7, 8])]
    assert [row["step"] for row in rows_of(config.parent / "run")] == list(range(1, 10))


def test_row_59_answers_that_are_sampled_have_no_batches_to_leave_out():
    config = load(GrpoConfig, None, ["guard.spike=rollback"])
    assert [str(problem) for problem in going_back(config)][0].startswith("guard.spike rollback leaves out")
    assert not list(going_back(load(GrpoConfig, None, ["guard.spike=skip"])))


# Spikes


def test_row_59_a_wild_rate_is_told_by_default_and_off_is_silent(config, capsys):
    wild = ("optim.lr=3", "optim.min_lr=3", "train.steps=8", "checkpoint.every=0")
    train(config, *wild)
    (event,) = events(config, "spike")
    assert event["action"] == "warn" and event["loss"] > event["loss_limit"]
    assert "are a spike" in capsys.readouterr().out and len(rows_of(config.parent / "run")) == 8
    train(config, *wild, f"run.dir={config.parent / 'off'}", "guard.spike=off")
    assert "are a spike" not in capsys.readouterr().out
    assert [r["train/loss"] for r in rows_of(config.parent / "off")] == [
        r["train/loss"] for r in rows_of(config.parent / "run")
    ]


def test_row_59_skip_leaves_a_bad_batch_out(config, monkeypatch):
    with faulty_batch(monkeypatch, 6, scale=-30.0):
        train(config, "guard.spike=skip", "guard.digest_every=1", "train.stop_at=8")
    rows = rows_of(config.parent / "run")
    assert rows[4]["guard/weights_digest"] == rows[5]["guard/weights_digest"] != rows[6]["guard/weights_digest"]
    assert rows[-1]["train/skipped_steps"] == 1 and events(config, "spike")[0]["step"] == 6


def test_row_59_rollback_goes_back_for_a_spike(config, monkeypatch):
    with faulty_batch(monkeypatch, 6, scale=-30.0):
        train(config, "guard.spike=rollback", "train.stop_at=8")
    assert [(e["to"], e["batches"]) for e in events(config, "rollback")] == [(3, [4, 6])]
    assert not any("train/loss" in row and row["train/loss"] > 7 for row in rows_of(config.parent / "run"))


def test_row_59_quiet_runs_are_quiet(tmp_path, corpus):
    """A toy run of one document a step, over seeds and past the first window: no false alarm."""
    for seed in range(3):
        path = write_config(
            tmp_path / "c.yaml", corpus, run={"dir": str(tmp_path / "run"), "seed": seed},
            train={"steps": 90, "global_batch": 2, "micro_batch": 2}, checkpoint={"every": 0},
            log={"plot": False, "every": 1000}, guard={"spike_window": 32},
        )  # fmt: skip
        train(path)
        assert not events(path, "spike", "discontinuity"), seed
        for file in ("events.jsonl", "metrics.jsonl"):
            (tmp_path / "run" / file).unlink()
        for folder in sorted((tmp_path / "run/checkpoints").iterdir()):
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()


def test_the_rule_of_spikes():
    rule = SpikeDetector(window=16, sigma=6.0)
    assert rule.norm_limit() == math.inf and rule.loss_limit() == math.inf
    for step in range(200):
        noise = ((step * 7919) % 101 / 101 - 0.5) * 0.1
        assert 5 - 0.01 * step + noise < rule.loss_limit() and 1 + noise < rule.norm_limit(), step
        rule.see(5 - 0.01 * step + noise, 1 + noise)
    assert 3.2 < rule.loss_limit() < 3.7 and 3.5 < rule.norm_limit() < 4.5
    rule.see(140.0, 1.0)
    assert rule.loss_limit() < 4, "a spike does not hide the next"
    for numbers in ((0.0, 0.0), (None, None), (math.nan, math.inf)):
        rule.see(*numbers)
    assert rule.loss_limit() > 3, "an empty step says nothing"
    for _ in range(40):
        rule.see(6.0, 1.0)
    assert rule.loss_limit() > 6, "a level that stays becomes the usual one"


# Resuming


def test_row_55_a_resume_with_other_moments_is_told(config, monkeypatch):
    slow = ("optim.schedule=constant", "train.steps=20")
    train(config, *slow, "train.stop_at=12")
    train(config, *slow, "train.stop_at=15")
    assert not events(config, "discontinuity"), "a sound resume"
    real = Engine._load_optimizer

    def corrupted(self, reader):
        real(self, reader)
        for flat in self.optimizer.states["exp_avg"].values():
            flat.mul_(-1000.0)

    monkeypatch.setattr(Engine, "_load_optimizer", corrupted)
    train(config, *slow, "train.stop_at=18", "guard.spike_sigma=4")
    (event,) = events(config, "discontinuity")
    assert 16 <= event["step"] <= 18 and event["loss"] > event["limit"]


# Replicas


def flip(tensor: torch.Tensor, at: int = 5) -> None:
    """One bit of one element."""
    bits = tensor.detach().view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    bits[at] ^= 1 << 3


def flipped(layout: Layout, options: dict, rank: int, name: str, moments: bool) -> tuple:
    mesh = Mesh.start(layout)
    engine = engine_of(mesh, **options)
    replicas = ReplicaCheck(engine)
    engine.train_step(share(batches(2 * mesh.data.size), mesh), NextToken(), 0.01)
    quiet = replicas.differences()
    if mesh.rank == rank:
        if moments:
            flip(next(x for held in engine.state() if held.name == name for x in [held.tensor]), 0)
        else:
            flip(engine.parameters.views[name])
    return quiet, replicas.differences()


@pytest.mark.parametrize(
    ("layout", "options", "rank", "name", "ranks", "others"),
    [
        (Layout(dp=3), {}, 1, "layers.1.mlp.down.weight", (1,), (0, 2)),
        (Layout(dp=3), {"zero": 1}, 2, "layers.0.attention.q.weight", (2,), (0, 1)),
        (Layout(dp=3), {"precision": "bf16"}, 0, "optim.exp_avg.final_norm.weight", (0,), (1, 2)),
        (Layout(tp=2), {"sp": True}, 1, "layers.0.mlp_norm.weight", (0, 1), ()),
        (Layout(pp=2), {}, 1, "embedding.weight", (0, 1), ()),
        (Layout(dp=2, tp=2), {"zero": 3, "shard_size": 1}, 3, "layers.1.mlp.down.weight", (1, 3), ()),
    ],
    ids=["dp3", "dp3-zero1", "moments", "tp2-sp", "tied", "dp2-tp2-hsdp"],
)
def test_row_60_a_flipped_bit_is_found_with_its_rank_and_tensor(layout, options, rank, name, ranks, others):
    told = run_ranks(layout.world, flipped, layout, options, rank, name, name.startswith("optim."))
    assert all(each == told[0] for each in told)
    quiet, found = told[0]
    assert quiet == [], "nothing differs before"
    assert found and {(each.ranks, each.others) for each in found} == {(ranks, others)}
    assert all(name.removeprefix("optim.exp_avg.") in each.name for each in found), found


def run_with_a_flip(path: str, step: int) -> str:
    """A whole run in which the third rank's memory loses a bit after a step; how it ended."""
    real = Engine.train_step

    def train_step(self, given, loss, lr):
        stats = real(self, given, loss, lr)
        if self.mesh.rank == 2 and self.optimizer.updates == step:
            flip(self.parameters.views["layers.0.mlp.down.weight"])
        return stats

    Engine.train_step = train_step
    try:
        settings = ("layout.dp=3", "train.global_batch=3", "guard.replica_check_every=4")
        train(Path(path), *settings, mesh=Mesh.start(Layout(dp=3)))
    except InternalError as error:
        return str(error)
    finally:
        Engine.train_step = real
    return ""


def test_row_60_a_run_stops_and_saves_no_state_that_only_one_rank_has(config):
    told = run_ranks(3, run_with_a_flip, str(config), 5)
    sentence = "After step 6 rank 2 (pp=0 dp=2 cp=0 tp=0) differs from its replicas (ranks 0, 1)"
    assert all(sentence in one for one in told)
    assert "layers.0.mlp.down.weight" in told[0] and InternalError.exit_code == 70
    assert sorted(path.name for path in (config.parent / "run/checkpoints").iterdir()) == ["step-00000003"]
    assert events(config, "replica_mismatch")[0]["step"] == 6, "before the save of step 6, not at 8 alone"
    assert run_ranks(3, run_with_a_flip, str(config), 99) == ["", "", ""], "a sound run goes on and ends"


def test_a_hash_sees_every_bit_and_a_checksum_adds_up_over_boxes():
    draw = torch.Generator().manual_seed(1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(6, 5, 7, generator=draw, dtype=torch.float64).to(dtype)
        whole, seen = int(checksum(x)), bits_hash(x)
        for at in range(0, x.numel(), 13):
            flip(x, at)
            assert int(checksum(x)) != whole and bits_hash(x) != seen
            flip(x, at)
        boxes = [Box((0, 0, 0), (6, 2, 7)), Box((0, 2, 0), (6, 3, 4)), Box((0, 2, 4), (6, 3, 3))]
        parts = [checksum(x[box.slices()], box, tuple(x.shape)) for box in boxes]
        assert int(sum(parts)) == whole and int(parts[0] + parts[1]) != whole
        swapped = x.clone()
        swapped[0], swapped[1] = x[1], x[0]
        assert int(checksum(swapped)) != whole
    assert compare_hashes([["a"], ["a"], ["a"], ["a"]], [[1], [1], [2], [2]])[0].others == (), "no majority"


# fp16


def test_row_61_a_loss_scale_that_collapses_stops_with_advice(config, monkeypatch):
    real = Engine.train_step

    def train_step(self, given, loss, lr):
        bad = [batch | {"mask": batch["mask"] * math.nan} for batch in given]
        return real(self, bad if self.optimizer.updates >= 3 else given, loss, lr)

    monkeypatch.setattr(Engine, "train_step", train_step)
    scale = ("train.precision=fp16", "train.loss_scale.initial=4", "train.loss_scale.overflows=3", "train.steps=20")
    with pytest.raises(Diverged, match=r"overflowed 3 times in a row there.*precision bf16"):
        train(config, *scale)
    scales = [row["train/loss_scale"] for row in rows_of(config.parent / "run")]
    assert scales == [4, 4, 4, 4, 2, 1, 1], "three steps, two halvings, and the third overflow at the minimum stops"


# Determinism


def digest_of(layout: Layout, options: dict) -> list[str]:
    mesh = Mesh.start(layout)
    engine = engine_of(mesh, **options)
    found = [weights_digest(engine)]
    engine.train_step(share(batches(4), mesh), NextToken(), 0.01)
    return [*found, weights_digest(engine)]


def test_the_digest_is_that_of_the_logical_weights():
    engine = engine_of(tree=True)
    start = weights_digest(engine)
    engine.train_step(batches(4), NextToken(), 0.01)
    after = weights_digest(engine)
    assert start != after
    for layout, options in ((Layout(dp=2), {"tree": True, "zero": 1}), (Layout(tp=2), {}), (Layout(pp=2), {})):
        told = run_ranks(2, digest_of, layout, options)
        assert told[0] == told[1] and told[0][0] == start
        assert (told[0][1] == after) or "tree" not in options, "dp with a tree of sums: the same bits"


STRICT = ("train.determinism=strict", "guard.digest_every=1", "checkpoint.every=5", "train.steps=9")


class Killed(Exception):
    """What ends a run without a last save."""


def train_until(config: Path, monkeypatch, step: int) -> None:
    real = Engine.train_step

    def train_step(self, given, loss, lr):
        assert torch.are_deterministic_algorithms_enabled()
        if self.optimizer.updates == step:
            raise Killed
        return real(self, given, loss, lr)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Engine, "train_step", train_step)
        train(config, *STRICT)
    assert not torch.are_deterministic_algorithms_enabled()


def digests(config: Path) -> list[str]:
    return [row["guard/weights_digest"] for row in rows_of(config.parent / "run")]


def test_strict_steps_that_are_made_again_are_the_same(config, monkeypatch):
    """Restart replay: steps 6 and 7 were made before the kill, and are asserted when they are made again."""
    train_until(config, monkeypatch, 7)
    before = digests(config)
    assert len(before) == 7 and len(set(before)) == 7
    train(config, *STRICT)
    again = digests(config)
    assert again[:7] == before and len(again) == 9
    train(config, f"run.dir={config.parent / 'plain'}", "guard.digest_every=1", "train.steps=9", "checkpoint.every=0")
    plain = [row["guard/weights_digest"] for row in rows_of(config.parent / "plain")]
    assert plain == again, "equivalence: the run without the contract computes the same"


def test_strict_a_step_that_comes_out_otherwise_stops_with_a_sentence(config, monkeypatch):
    train_until(config, monkeypatch, 7)
    real = Engine.load

    def loaded(self, reader, optimizer=True):
        real(self, reader, optimizer)
        flip(self.parameters.views["layers.0.mlp.down.weight"])

    with monkeypatch.context() as patch, pytest.raises(InternalError, match=r"does not repeat itself: step 6") as told:
        patch.setattr(Engine, "load", loaded)
        train(config, *STRICT)
    assert told.value.exit_code == 70 and events(config, "digest_mismatch")[0]["step"] == 6


def test_strict_says_nothing_where_something_was_changed_on_purpose(config, monkeypatch):
    train_until(config, monkeypatch, 7)
    before = digests(config)
    train(config, *STRICT, "optim.lr=0.001")
    assert digests(config)[5] != before[5]
