"""A tiny model to start from, files of preferences, and runs of the trainers on them at any layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallm.base.config import replace
from megallm.checkpoint import store
from megallm.checkpoint.reader import CheckpointReader, step_name
from megallm.convert.convert import imported_meta
from megallm.engine.config import EngineConfig
from megallm.engine.engine import Engine
from megallm.models.compute import ComputeConfig
from megallm.models.config import ModelConfig
from megallm.parallel.layout import Layout
from megallm.parallel.mesh import Mesh
from megallm.training.kinds import KINDS
from megallm.training.kto import KtoRun
from megallm.training.offline import OfflineRun
from megallm.training.preference import DpoRun
from megallm.training.reward import RewardRun
from megallm.training.supervised import run_supervised
from megallm.training.validate import check

MODEL = ModelConfig(
    family="llama", num_layers=2, hidden_size=16, num_heads=4, num_kv_heads=2, vocab_size=257, max_positions=512,
    init_std=0.2,
).resolve()  # fmt: skip
RUNS = {"dpo": DpoRun, "kto": KtoRun, "reward": RewardRun, "offline": OfflineRun}
LENGTH = 24  # of the longest sequence


def write_start(folder: Path, model: ModelConfig = MODEL, seed: int = 3) -> str:
    """A run folder with the weights of a fresh model in float64."""
    mesh = Mesh.single()
    engine = Engine.build(EngineConfig(model, compute=ComputeConfig("fp64"), seed=seed), mesh)
    meta = imported_meta(model, torch.float64, "bytes")
    store.save(folder / "checkpoints", 0, list(engine.parts()), meta, mesh)
    return str(folder)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """A JSONL file; its name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count: int = 12) -> list[dict[str, Any]]:
    """Sums with right and wrong answers of several lengths."""
    return [
        {"prompt": f"{i * i}+{i}=", "chosen": f"{i * i + i}.", "rejected": f"{i * i + 10 * i + 1}!" + "?" * (i % 3)}
        for i in range(count)
    ]


def config_of(verb: str, folder: Path, start: str, source: str, **values: Any):
    """A checked configuration of a small run in float64 whose updates are not clipped."""
    base = {
        "run.dir": str(folder), "train.steps": 3, "train.global_batch": 4, "train.micro_batch": 2,
        "train.precision": "fp64", "optim.warmup_steps": 0, "optim.lr": 1e-2, "model.init": start,
        "data.tokenizer": "bytes", "data.sources": {source: None}, "data.seq_len": LENGTH,
        "checkpoint.every": 0, "log.plot": False, "eval.batches": 0,
    }  # fmt: skip
    if verb == "reward":
        base["model.head"] = "value"
    layout = Layout(**{axis: values.get(f"layout.{axis}", 1) for axis in ("pp", "dp", "cp", "tp")})
    return check(replace(KINDS[verb].config(), base | values), layout.world)


def train(verb: str, *args: Any, **values: Any) -> Path:
    """Run it at the layout that it says, on this rank; the run folder."""
    config = config_of(verb, *args, **values)
    grid = config.layout.grid()
    mesh = Mesh.single() if grid.world == 1 else Mesh.start(grid)
    run_supervised(RUNS[verb](config), mesh, "auto", False, ())
    return Path(config.run.dir)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what depends on the machine, or on rounding at a tie."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    gone = ("perf/", "mem/", "consumed_tokens", "rewards/accuracies")
    return [{k: v for k, v in row.items() if not k.startswith(gone) and v is not None} for row in rows]


def weights(folder: Path, step: int) -> dict[str, Tensor]:
    """Everything that the checkpoint of a step holds."""
    with CheckpointReader(folder / "checkpoints" / step_name(step)) as reader:
        return {name: reader.read(name) for name in reader.names()}


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of any tensor, beside its largest number."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - x).abs().max() / x.abs().max().clamp(min=1e-12)) for n, x in theirs.items())
