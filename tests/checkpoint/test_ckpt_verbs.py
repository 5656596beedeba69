"""`megallm ckpt pin|unpin|diff|reshard`, and FAULTS row 46: what another process reads or pins is not deleted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from megallm.checkpoint import store, tools
from megallm.checkpoint.reader import CheckpointReader, load_manifest, step_folders
from megallm.cli.main import main
from megallm.convert import reshard
from megallm.losses.language import NextToken
from megallm.models.config import ModelConfig
from megallm.models.sections import MoeConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from tests.engine import tiny
from tests.ranks import run_ranks

EXPERTS = ModelConfig(
    family="qwen3", num_layers=3, hidden_size=16, ffn_hidden_size=24, num_heads=4, num_kv_heads=2, vocab_size=61,
    max_positions=64, tie_embeddings=True, moe=MoeConfig(num_experts=4, top_k=2),
).resolve()  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run folder with steps 1 to 3 of a small engine that has trained, by one rank."""
    engine = tiny.engine_of(zero=1)
    for step in range(1, 4):
        engine.train_step(tiny.batches(2, seed=step), NextToken(), 0.01)
        save(engine, tmp_path / "run", step, tiny.MODEL)
    return tmp_path / "run"


def save(engine, run, step: int, model: ModelConfig):
    """The engine's own parts, as a trainer saves them."""
    meta = {"ledger": {"step": step}, "engine": engine.counters(), "model": asdict(model), "kind": "pretrain"}
    return store.save(run / "checkpoints", step, list(engine.parts()), meta, engine.mesh)


def call(capsys, *words) -> tuple[int, str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_a_pinned_step_stays_until_it_is_unpinned(run, capsys):
    first = run / "checkpoints" / "step-00000001"
    assert call(capsys, "ckpt", "pin", first)[0] == 0
    code, out = call(capsys, "ckpt", "ls", run)
    assert code == 0 and [("pinned" in line) for line in out.splitlines()] == [True, False, False]
    parts = [store.Part("w", (4,), (0,), torch.ones(4))]
    store.save(run / "checkpoints", 4, parts, {}, Mesh.single(), 1)
    assert [step for step, _ in step_folders(run / "checkpoints")] == [4, 1]
    code, out = call(capsys, "ckpt", "unpin", first, "--json")
    assert code == 0 and json.loads(out) == {"step": 1, "path": str(first), "pinned": False}
    store.save(run / "checkpoints", 5, parts, {}, Mesh.single(), 1)
    assert [step for step, _ in step_folders(run / "checkpoints")] == [5]


def test_pinning_what_is_not_there_is_an_error(tmp_path, capsys):
    code, out = call(capsys, "ckpt", "pin", tmp_path)
    assert code == 74 and "no valid checkpoint" in out and os.listdir(tmp_path) == []


def test_a_step_that_another_process_reads_is_not_deleted(run):
    """Row 46: the reader is a real process; when it is killed with -9 the step may go."""
    code = (
        "import sys, time\nfrom megallm.checkpoint.reader import CheckpointReader\n"
        f"reader = CheckpointReader({str(run / 'checkpoints' / 'step-00000001')!r})\n"
        "print('open', flush=True)\nsys.stdin.readline()\n"
        "print(sum(reader.read(name).double().sum().item() for name in reader.names()), flush=True)\ntime.sleep(60)"
    )
    parts = [store.Part("w", (4,), (0,), torch.ones(4))]
    with CheckpointReader(run / "checkpoints" / "step-00000001") as reader:
        expected = sum(reader.read(name).double().sum().item() for name in reader.names())
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
    try:
        assert other.stdout.readline() == "open\n"
        store.save(run / "checkpoints", 4, parts, {}, Mesh.single(), 1)
        assert [step for step, _ in step_folders(run / "checkpoints")] == [4, 1]
        other.stdin.write("\n")
        other.stdin.flush()
        assert float(other.stdout.readline()) == expected, "and it can be read to its end"
        other.send_signal(signal.SIGKILL)
        other.wait(20)
        store.save(run / "checkpoints", 5, parts, {}, Mesh.single(), 1)
        assert [step for step, _ in step_folders(run / "checkpoints")] == [5]
    finally:
        other.kill()
        other.wait()
        other.stdin.close()
        other.stdout.close()


def test_diff_shows_tensors_with_their_error_and_metadata(run, capsys):
    steps = [run / "checkpoints" / f"step-0000000{step}" for step in (1, 2)]
    code, out = call(capsys, "ckpt", "diff", *steps)
    assert code == 1 and "embedding.weight: values, max error " in out and "meta.ledger.step: 1 -> 2" in out
    assert call(capsys, "ckpt", "diff", steps[0], steps[0]) == (0, "The checkpoints are equal bit for bit.\n")


@pytest.mark.parametrize(
    ("layout", "files"),
    [("tp=2,pp=2", 4), ("dp=3", 3), ("pp=2,dp=2,tp=2", 8), ("tp=4,cp=2", 4), ("stages=Et|tL,pp=2", 2)],
)
def test_reshard_keeps_every_logical_byte(run, tmp_path, capsys, layout, files):
    code, out = call(capsys, "ckpt", "reshard", run, tmp_path / "new", "--layout", layout, "--json")
    assert code == 0, out
    done = json.loads(out)
    assert (done["step"], done["files"]) == (3, files)
    assert tools.diff(run, tmp_path / "new")["same"]
    assert tools.verify_checkpoint(tmp_path / "new")["ok"]
    again = tiny.engine_of(zero=1)
    with CheckpointReader(tmp_path / "new" / "checkpoints" / "step-00000003") as reader:
        again.load(reader)
    assert tiny_equal(again, run)


def tiny_equal(engine, run) -> bool:
    with CheckpointReader(run / "checkpoints" / "step-00000003") as reader:
        return all(
            torch.equal(part.tensor, reader.read(part.name)[part.box.slices()]) for part in engine.parts()
        )


def _save_at(root: str) -> None:
    mesh = Mesh.start(Layout(tp=2, pp=2, ep=2))
    engine = tiny.engine_of(mesh, model=EXPERTS, tp=2, pp=2, ep=2)
    store.save(root, 3, list(engine.parts()), {}, mesh)


def test_the_files_are_those_that_the_ranks_of_that_layout_write(tmp_path):
    """Weights: the same boxes in the files of the same ranks as real ranks save, with experts and a tied embedding."""
    save(tiny.engine_of(model=EXPERTS), tmp_path / "one", 3, EXPERTS)
    layout = reshard.LayoutConfig(tp=2, pp=2, ep=2)
    reshard.reshard(reshard.ReshardRequest(str(tmp_path / "one"), str(tmp_path / "new"), layout))
    run_ranks(4, _save_at, str(tmp_path / "real"))

    def boxes(folder) -> set:
        tensors = load_manifest(folder).tensors
        return {(n, p.file, p.box) for n, t in tensors.items() if not n.startswith("optim.") for p in t.pieces}

    found, real = boxes(tmp_path / "new" / "checkpoints" / "step-00000003"), boxes(tmp_path / "real" / "step-00000003")
    assert any(".experts." in name for name, _, _ in real), "the family has experts"
    assert len({file for _, file, _ in real}) == 4 and found == real


def test_reshard_refuses_what_cannot_be_and_leaves_nothing(run, tmp_path, capsys):
    for layout, words in (("pp=9", "stages need at least 9 layers"), ("tpp=2", "Did you mean 'tp'?"),
                          ("tp=0", "at least 1"), ("ep=3,tp=2", "does not divide")):  # fmt: skip
        code, out = call(capsys, "ckpt", "reshard", run, tmp_path / "new", "--layout", layout)
        assert code == 2 and words in out, out
        assert sorted(os.listdir(tmp_path)) == ["run"]
    path = sorted((run / "checkpoints").glob("*3/weights*"))[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    for step in (1, 2):
        (run / "checkpoints" / f"step-0000000{step}" / "manifest.json").unlink()
    code, out = call(capsys, "ckpt", "reshard", run, tmp_path / "new", "--layout", "tp=2")
    assert code == 74 and sorted(os.listdir(tmp_path)) == ["run"], out
