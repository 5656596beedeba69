"""Runs with experts: a real command, stopped and resumed bit for bit, resumed with experts elsewhere, upcycled."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

from megallm.base.errors import UsageError
from megallm.checkpoint.reader import CheckpointReader
from megallm.checkpoint.tools import resolve_step
from megallm.convert import upcycle
from megallm.convert.upcycle import UpcycleRequest
from megallm.convert.verify import our_logits
from megallm.convert.weights import Cast, stored_model
from megallm.parallel.mesh import Mesh
from megallm.training import pretrain
from tests.ranks import run_ranks
from tests.system.commands import dump, losses_of, make_corpus, megallm, rows_of, write_config
from tests.system.test_resume import resolved

EXPERTS = {"num_experts": 4, "ffn_hidden_size": 24, "first_dense": 1, "shared_ffn_hidden_size": 16}
EXPERTS |= {"score": "sigmoid", "selection_bias": True, "z_coef": 0.001}
SHORT = {"train": {"steps": 1}, "optim": {"warmup_steps": 0}}
BIAS = "layers.1.moe.router.bias"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("experts"), documents=25)


def write(path: Path, corpus: Path, run: str, **sections) -> Path:
    """A configuration of a model with experts."""
    sections = {"train": {"steps": 8}, "model": {"moe": EXPERTS}, "checkpoint": {"every": 4}} | sections
    sections["optim"] = {"warmup_steps": 0}
    return write_config(path, corpus, run={"dir": str(path.parent / run)}, **sections)


def train_on_ranks(path: str, overrides: list[str]) -> None:
    """`megallm pretrain` on the ranks of the pool."""
    config = resolved(Path(path), *overrides)
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain.run(config, Mesh.start(config.layout.grid()), "auto")


def train(path: Path, world: int, *overrides: str) -> None:
    run_ranks(world, train_on_ranks, str(path), list(overrides), timeout=100)


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], x) for name, x in theirs.items())


def test_the_command_trains_with_experts_on_four_ranks(tmp_path, corpus):
    config = write(tmp_path / "c.yaml", corpus, "run")
    done = megallm("pretrain", config, "layout.dp=2", "layout.tp=2", "layout.ep=2", "train.steps=3", cwd=tmp_path)
    assert done.code == 0, done.err
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 3 and all(row["moe/load_balance"] >= 1 and row["train/moe_balance"] > 0 for row in rows)
    assert all(row["moe/dropped_fraction"] == 0 and row["train/moe_z"] > 0 for row in rows)
    state = dump(tmp_path / "run")
    assert state[BIAS].dtype == torch.float32 and set((state[BIAS] * 1000).round().abs().tolist()) <= {0, 1, 2, 3}
    assert state["layers.1.moe.experts.gate_up.weight"].shape == (4, 2, 24, 32)
    assert "layers.0.mlp.gate_up.weight" in state and "layers.0.moe.router.weight" not in state


@pytest.mark.parametrize("zero", [0, 3])
def test_resumed_bit_for_bit(tmp_path, corpus, zero):
    """8 steps are 4, a save and 4, at dp=2, tp=2, ep=2; the biases are a part of that."""
    layout = ["layout.dp=2", "layout.tp=2", "layout.ep=2", f"zero.stage={zero}"]
    quiet, stopped = (write(tmp_path / f"{name}.yaml", corpus, name) for name in ("quiet", "stopped"))
    train(quiet, 4, *layout)
    train(stopped, 4, *layout, "train.stop_at=4")
    train(stopped, 4, *layout)
    ours, theirs = dump(tmp_path / "stopped"), dump(tmp_path / "quiet")
    assert equal(ours, theirs) and losses_of(tmp_path / "stopped") == losses_of(tmp_path / "quiet")
    assert ours[BIAS].abs().max() > 0
    ours[BIAS] += 0.001
    assert not equal(ours, theirs), "the comparison sees the bias"


def test_resumed_with_experts_divided_otherwise(tmp_path, corpus):
    """ep over tp, then over dp, then a pipeline, then all on one rank with ZeRO, against one quiet process."""
    sections = {"train": {"steps": 8, "precision": "fp64"}}
    quiet, moved = (write(tmp_path / f"{name}.yaml", corpus, name, **sections) for name in ("quiet", "moved"))
    train(quiet, 1)
    legs = [
        (2, ["layout.tp=2", "layout.sp=true", "layout.ep=2"]),
        (4, ["layout.dp=4", "layout.ep=4", "zero.stage=2"]),
        (4, ["layout.pp=2", "layout.tp=2", "layout.ep=2", "layout.schedule=zb-h1"]),
        (2, ["layout.dp=2", "zero.stage=3"]),
    ]
    for number, (world, leg) in enumerate(legs, start=1):
        train(moved, world, f"train.stop_at={2 * number}", *leg)
    ours, theirs = losses_of(tmp_path / "moved"), losses_of(tmp_path / "quiet")
    assert max(abs(a - b) / abs(b) for (_, a), (_, b) in zip(ours, theirs, strict=True)) <= 1e-9
    ours, theirs = dump(tmp_path / "moved"), dump(tmp_path / "quiet")
    assert ours.keys() == theirs.keys() and torch.equal(ours[BIAS], theirs[BIAS])
    for name, tensor in theirs.items():
        floor = 1e-6 if name.startswith("optim.") else 0.0
        assert (ours[name] - tensor).abs().max() <= 1e-9 * max(tensor.abs().max(), floor), name


def logits_of(run: Path, tokens: torch.Tensor) -> torch.Tensor:
    with CheckpointReader(resolve_step(run)) as reader:
        return our_logits(stored_model(reader), Cast(reader), tokens)


def test_an_upcycled_model_computes_what_the_dense_one_did(tmp_path, corpus):
    dense = write_config(
        tmp_path / "c.yaml", corpus, run={"dir": str(tmp_path / "dense")}, **SHORT | {"train": {"steps": 3}}
    )
    train(dense, 2, "layout.tp=2")
    done = megallm(
        "ckpt", "upcycle", "dense", "--output", "grown", "--experts", 4, "--first-dense", 1, "--json", cwd=tmp_path
    )
    assert done.code == 0, done.err
    said, state = json.loads(done.out), dump(tmp_path / "grown")
    assert said["params"] > said["active_params"] > 0
    experts, mlp = state["layers.1.moe.experts.down.weight"], dump(tmp_path / "dense")["layers.1.mlp.down.weight"]
    assert all(torch.equal(expert, mlp) for expert in experts)
    tokens = torch.randint(257, (2, 20), generator=torch.Generator().manual_seed(0))
    before, after = logits_of(tmp_path / "dense", tokens), logits_of(tmp_path / "grown", tokens)
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()
    # It trains on: the run folder it made, at another layout, with its model.
    moe = {"num_experts": 4, "first_dense": 1, "ffn_hidden_size": 48}
    grown = write_config(
        tmp_path / "g.yaml", corpus, run={"dir": str(tmp_path / "grown")}, model={"moe": moe},
        **SHORT | {"train": {"steps": 2}},
    )  # fmt: skip
    train(grown, 2, "layout.dp=2", "layout.ep=2")
    experts = dump(tmp_path / "grown")["layers.1.moe.experts.down.weight"]
    assert len(rows_of(tmp_path / "grown")) == 2 and not torch.equal(experts[0], experts[1]), "copies part"


def test_upcycling_refuses_what_it_cannot_do(tmp_path, corpus):
    dense = write_config(tmp_path / "c.yaml", corpus, run={"dir": str(tmp_path / "dense")}, **SHORT)
    train(dense, 1)
    for words, said in (
        (["--experts", 0], "--experts is 0"),
        (["--experts", 2, "--top-k", 3], "top_k is 3"),
        (["--experts", 2, "--first-dense", 5], "leaves no layer for experts"),
    ):
        done = megallm("ckpt", "upcycle", "dense", "--output", "grown", *words, cwd=tmp_path)
        assert done.code == 2 and said in done.err and not (tmp_path / "grown").exists()
    request = UpcycleRequest(str(tmp_path / "dense"), str(tmp_path / "grown"), 2)
    upcycle.run(request)
    with pytest.raises(UsageError, match="exists"):
        upcycle.run(request)
    again = UpcycleRequest(str(tmp_path / "grown"), str(tmp_path / "more"), 2)
    with pytest.raises(UsageError, match="experts already"):
        upcycle.run(again)


def test_text_is_the_same_with_experts_on_one_rank_and_divided(tmp_path, corpus):
    config = write(tmp_path / "c.yaml", corpus, "run", train={"steps": 3})
    train(config, 1)
    texts = {}
    for layout in ("tp=1", "tp=2,ep=2", "tp=2", "tp=2,pp=2,ep=2"):
        words = ["generate", "--model", "run", "--prompt", "To be", "--max-new-tokens", 8, "--layout", layout]
        done = megallm(*words, "--json", f"{layout}.jsonl", cwd=tmp_path)
        assert done.code == 0, done.err
        texts[layout] = json.loads((tmp_path / f"{layout}.jsonl").read_text().splitlines()[0])["tokens"]
    assert len(set(map(tuple, texts.values()))) == 1, texts
    done = megallm("generate", "--model", "run", "--prompt", "a", "--layout", "tp=1,dp=2,ep=2", cwd=tmp_path)
    assert done.code == 2 and "does not divide tp 1" in done.err
