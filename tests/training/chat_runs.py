"""Small runs on conversations for the tests of trainers: files, a configuration, and training in this process."""

from __future__ import annotations

import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

from megallm.base.config import replace
from megallm.models.config import ModelConfig
from megallm.parallel.mesh import Mesh
from megallm.training import sft
from megallm.training.finetune import SftConfig
from megallm.training.validate import check

MODEL = ModelConfig(
    family="llama", num_layers=2, hidden_size=32, ffn_hidden_size=48, num_heads=4, num_kv_heads=2, vocab_size=257,
    max_positions=4096, tie_embeddings=True,
)  # fmt: skip
TIMED = ("perf/", "mem/")  # of metrics.jsonl: what differs between two runs that are the same


def conversations(path: Path, count: int, seed: int = 0) -> str:
    """Sums of different lengths as messages; the name of the file."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = draw.randrange(10 ** draw.randint(1, 6)), draw.randrange(100)
        talk = [("user", f"{a}+{b}?"), ("assistant", str(a + b))]
        rows.append({"messages": [{"role": role, "content": text} for role, text in talk]})
    return write_rows(path, rows)


def write_rows(path: Path, rows: list[Any]) -> str:
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    if not path.exists() or path.read_text() != text:  # ranks that run at once find it there
        path.write_text(text)
    return str(path)


def config_of(folder: Path, **values: Any) -> SftConfig:
    """An unchecked configuration of a run in `folder`/run; dotted keys have `__` for the dot."""
    train, valid = folder / "train.jsonl", folder / "valid.jsonl"
    if not train.exists():
        conversations(train, 16)
        conversations(valid, 5, seed=1)
    usual = {
        "run.dir": str(folder / "run"), "run.seed": 3, "data.sources": {str(train): None},
        "data.valid_sources": {str(valid): None}, "data.tokenizer": "bytes", "data.seq_len": 128, "train.steps": 4,
        "train.global_batch": 4, "train.micro_batch": 2, "train.precision": "fp64", "optim.lr": 0.01,
        "log.plot": False, "checkpoint.every": 0,
    }  # fmt: skip
    given = {key.replace("__", "."): value for key, value in values.items()}
    return replace(SftConfig(model=MODEL), usual | given)


def train(config: SftConfig, resume: str = "auto", allowed: tuple[str, ...] = ()) -> Path:
    """`megallm sft` on one rank, in this process, or on the ranks of the caller's pool; the run folder."""
    checked = check(config)
    with contextlib.redirect_stdout(io.StringIO()):
        mesh = Mesh.start(checked.layout.grid()) if checked.layout.grid().world > 1 else Mesh.single()
        sft.run(checked, mesh, resume, allowed=allowed)
    return Path(checked.run.dir)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or a machine says."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(TIMED)} for row in rows]


def numbers_of(run: Path) -> list[float]:
    """Losses, gradient norms and held-out losses."""
    wanted = ("train/loss", "train/grad_norm", "val/loss")
    return [row[key] for row in rows_of(run) for key in wanted if key in row]


def worst(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference."""
    assert len(ours) == len(theirs) and ours
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
