"""A supervised trainer is what it reads, a loss and an identity: it trains, evaluates, resumes and refuses others."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from megallm.base.config import replace
from megallm.base.errors import CheckpointError, UsageError
from megallm.checkpoint.reader import CheckpointReader as Checkpoint
from megallm.checkpoint.reader import step_name
from megallm.engine.engine import StepStats
from megallm.losses.language import NextToken
from megallm.models.config import ModelConfig
from megallm.parallel.mesh import Mesh
from megallm.run.config import JobConfig
from megallm.training.held_out import HeldOut
from megallm.training.resuming import Identity
from megallm.training.supervised import SupervisedRun, run_supervised, train_losses
from megallm.training.validate import check

MODEL = ModelConfig(family="llama", num_layers=1, hidden_size=16, num_heads=2, vocab_size=32, max_positions=16)


@dataclass(frozen=True)
class CountingData:
    """Rows of numbers that count upwards."""

    seq_len: int = 8  # tokens of a row
    stride: int = 1  # from one token to the next


@dataclass(frozen=True)
class CountingConfig(JobConfig):
    """A trainer's configuration: the sections of every run, and what it reads."""

    data: CountingData = field(default_factory=CountingData)


class CountingReader:
    """Microbatches by step number."""

    def __init__(self, data, share):
        self.data, self.share = data, share

    def batches(self, step):
        made = []
        for micro in self.share.micros((step - 1) * self.share.global_batch):
            rows = np.array(micro)[:, None] + np.arange(self.data.seq_len + 1) * self.data.stride
            tokens, labels = rows[:, :-1] % 32, rows[:, 1:] % 32
            positions = np.tile(np.arange(self.data.seq_len), (len(micro), 1))
            mask = np.ones(tokens.shape, bool)
            made.append({"tokens": tokens, "labels": labels, "positions": positions, "mask": mask})
        return made

    def consumed(self, step):
        return [{"step": step, "row": row} for micro in self.share.micros() for row in micro]

    def state_after(self, step):
        return {"rows": step * self.share.global_batch}


class CountingIdentity(Identity):
    KIND = "counting"

    def own(self):
        return {"data": {"stride": self.config.data.stride}}


class CountingRun(SupervisedRun):
    identity = CountingIdentity
    log_samples = True
    states: list = []

    def reader(self, share, first_step, state):
        self.states.append((first_step, state))
        return CountingReader(self.config.data, share)

    def loss(self):
        return NextToken()

    def evaluation(self, engine, share, ledger):
        return HeldOut(engine, NextToken(), lambda: CountingReader(self.config.data, share), self.config.eval.batches)


class FrozenRun(CountingRun):
    @staticmethod
    def prepare(stage):
        for name, parameter in stage.named_parameters():
            parameter.requires_grad_("embedding" not in name)


@pytest.fixture
def config(tmp_path) -> CountingConfig:
    values = {"run.dir": str(tmp_path / "run"), "train.steps": 4, "train.global_batch": 4, "train.micro_batch": 2}
    values |= {"optim.warmup_steps": 1, "eval.batches": 1, "log.plot": False, "checkpoint.every": 0}
    return check(replace(CountingConfig(model=MODEL), values))


def train(config, kind=CountingRun, resume="auto", **values) -> Path:
    run_supervised(kind(replace(config, values)), Mesh.single(), resume, allowed=())
    return Path(values.get("run.dir", config.run.dir))


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path, step: int, name: str = "embedding.weight"):
    with Checkpoint(folder / "checkpoints" / step_name(step)) as reader:
        return reader.read(name).tolist()


def test_it_trains_and_goes_on_as_if_it_had_not_stopped(config, tmp_path):
    quiet = train(config, **{"run.dir": str(tmp_path / "quiet")})
    CountingRun.states.clear()
    stopped = train(config, **{"train.stop_at": 2})
    assert train(config) == stopped
    assert CountingRun.states == [(1, {}), (3, {"rows": 8})]
    assert weights(stopped, 4) == weights(quiet, 4) != weights(stopped, 2)
    assert [row["train/loss"] for row in rows_of(stopped)] == [row["train/loss"] for row in rows_of(quiet)]
    assert rows_of(quiet)[-1]["val/loss"] == pytest.approx(rows_of(quiet)[-1]["train/loss"], rel=0.5)
    samples = [json.loads(line)["step"] for line in (stopped / "samples.jsonl").read_text().splitlines()]
    assert samples == [step for step in (1, 2, 3, 4) for _ in range(4)]


def test_another_identity_and_another_kind_are_refused(config):
    train(config, **{"train.stop_at": 2})
    with pytest.raises(UsageError, match=r"\* data\.stride: checkpoint 1, configuration 3"):
        train(config, **{"data.stride": 3})
    with pytest.raises(CheckpointError, match="was written by `megallm counting`; `megallm other` does not go on"):
        train(config, type("Run", (CountingRun,), {"identity": type("I", (CountingIdentity,), {"KIND": "other"})}))
    with pytest.raises(UsageError, match="--resume never"):
        train(config, resume="never")


def test_prepare_reaches_the_engine(config):
    folder = train(config, FrozenRun, **{"train.stop_at": 1})
    assert train(config, FrozenRun, **{"train.stop_at": 3}) == folder
    assert weights(folder, 3) == weights(folder, 1), "frozen, and still frozen after it went on"
    assert weights(folder, 3, "head.weight") != weights(folder, 1, "head.weight")


def test_terms_of_a_loss_have_names_of_their_own():
    stats = StepStats({"loss": 2.0, "mtp_1": 1.0}, {"loss": 4}, 1.0, False)
    assert train_losses(stats) == {"train/loss": 2.0}
    stats = StepStats({"chosen": 2.0, "margin": 1.0}, {"chosen": 4, "margin": 4}, 1.0, False)
    assert train_losses(stats) == {"train/loss": 3.0, "train/chosen": 2.0, "train/margin": 1.0}
