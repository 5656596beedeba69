"""Issue R, B.10: a state that has diverged is never the newest checkpoint; a sane rate then goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megallm.base.config import load
from megallm.base.errors import Diverged
from megallm.engine.engine import Engine
from megallm.ops import native
from megallm.parallel.mesh import Mesh
from megallm.run.divergence import DivergenceDetector
from megallm.training import pretrain, saving
from megallm.training.config import PretrainConfig
from megallm.training.validate import check
from tests.system.commands import make_corpus, rows_of, write_config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(tmp_path, corpus) -> Path:
    run = {"dir": str(tmp_path / "run")}
    return write_config(
        tmp_path / "c.yaml", corpus, run=run, train={"steps": 40}, checkpoint={"every": 1, "keep": 1}
    )


def train(path: Path, *overrides: str) -> None:
    settings = check(load(PretrainConfig, str(path), list(overrides)), None, None)
    pretrain.run(settings, Mesh.single(), "auto")


@pytest.fixture(autouse=True)
def attention_of_torch():
    """At scores of 1e20 gradients of torch's attention are NaN; those of csrc/ops are right (test_native.py)."""
    native.use_kernels("reference")
    yield
    native.use_kernels("auto")


def steps(path: Path) -> list[str]:
    return sorted(folder.name for folder in (path.parent / "run/checkpoints").iterdir())


def events(path: Path, kind: str) -> list[dict]:
    lines = (path.parent / "run/events.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == kind]


@pytest.mark.parametrize("clip", ["1.0", "0"])
def test_b10_a_wild_rate_on_a_good_run_leaves_it_good(config, clip):
    """Ten steps, then a rate 10^7 times too high: the last good step is the newest, with `keep` 1 and `every` 1."""
    train(config, "train.stop_at=10")
    with pytest.raises(Diverged, match=r"Renamed as diverged.*goes on from step 10\."):
        train(config, "optim.lr=30000", "optim.min_lr=30000", f"optim.clip={clip}")
    whole = [name for name in steps(config) if "." not in name]
    assert whole and all(int(name[5:]) <= 10 for name in whole), steps(config)
    assert any(name.endswith(".diverged") for name in steps(config))
    before = rows_of(config.parent / "run")[8]["train/loss"]
    train(config, "checkpoint.every=0", "train.stop_at=16")
    after = rows_of(config.parent / "run")
    assert [row["step"] for row in after] == list(range(1, 17)) and after[-1]["train/loss"] < before
    assert events(config, "diverged")[0]["set_aside"]


def test_b10_a_run_that_is_wild_from_its_first_step_starts_afresh(config):
    with pytest.raises(Diverged, match=r"the same command then starts afresh\."):
        train(config, "optim.lr=1e9", "optim.min_lr=1e9", "optim.warmup_steps=0", "optim.clip=0")
    assert not [name for name in steps(config) if "." not in name]
    train(config, "train.stop_at=5")
    assert steps(config)[-1] == "step-00000005" and math.isfinite(rows_of(config.parent / "run")[-1]["train/loss"])


def test_b10_a_folder_that_an_older_version_poisoned_heals_itself(config, monkeypatch):
    """The newest checkpoint already holds numbers that are not finite: the next start sets it aside."""
    train(config, "train.stop_at=4")
    monkeypatch.setattr(saving, "_is_finite", lambda part: True)
    real, poisoned = Engine.parts, []

    def parts(self):
        for part in real(self):
            if "norm" in part.name and not part.name.startswith("optim."):
                part.tensor.fill_(math.nan)
                poisoned.append(part.name)
            yield part

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "parts", parts)
        train(config, "train.stop_at=5")
    assert poisoned and "step-00000005" in steps(config)
    with pytest.raises(Diverged, match=r"goes on from step 4"):
        train(config)
    train(config, "train.stop_at=6")
    assert steps(config)[-1] == "step-00000006"


def test_b10_a_state_that_is_not_finite_is_not_saved(config, monkeypatch):
    """Weights go bad without a bad gradient: the save itself notices, on the way and at the end."""
    train(config, "train.stop_at=3")
    real = Engine.train_step

    def train_step(self, *args):
        stats = real(self, *args)
        for _, _, _, tensor in self.masters():
            tensor.view(-1)[0] = math.inf
            break
        return stats

    monkeypatch.setattr(Engine, "train_step", train_step)
    with pytest.raises(Diverged, match=r"The state after step 4 is not finite, as in .*goes on from step 3"):
        train(config, "train.stop_at=4")
    assert "step-00000003" in steps(config)


def test_b10_a_run_does_not_end_well_on_steps_that_were_all_skipped(config, monkeypatch):
    """Fewer than ten, at the end of the run: neither saved nor called a success."""
    train(config, "train.stop_at=3")
    real = Engine.train_step

    def train_step(self, batches, loss, lr):
        return real(self, [batch | {"mask": batch["mask"] * math.nan} for batch in batches], loss, lr)

    monkeypatch.setattr(Engine, "train_step", train_step)
    with pytest.raises(Diverged, match="were not finite for the last 3 steps, up to 6"):
        train(config, "train.stop_at=6")
    assert [name for name in steps(config) if "." not in name] == ["step-00000002"], "3 gave what is not finite"
    assert [row["step"] for row in events(config, "not_saved")] == [4, 5]


def row(step: int, loss: float | None, norm: float | None = 1.0) -> dict:
    return {"step": step, "train/loss": loss, "train/grad_norm": norm}


def test_which_steps_are_unsound():
    def since(*rows: dict) -> int | None:
        soundness = DivergenceDetector()
        for one in rows:
            soundness.see(one)
        return soundness.bad_since

    good = [row(step, 5.5 - 0.01 * step) for step in range(1, 50)]
    assert since(*good) is None
    assert since(*good, row(50, 5.9)) is None, "noise"
    assert since(*good, row(50, 8.0), row(51, 1e9), row(52, None, None)) == 50
    assert since(*good, row(50, 8.0), row(51, 5.2)) is None, "a spike that is over"
    assert since(*good, row(50, 5.0, None)) == 50
    other = [row(step, 9.0) for step in range(50, 200)]
    assert since(*good, *other) is None, "another text is harder: forgotten after a while"
