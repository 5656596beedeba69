"""What a run really read: killed at random on changing layouts, equal to what `megallm data stream` says, once each."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from megallm.data.indexed.dataset import IndexedDataset
from tests.system.commands import make_corpus, megallm, rows_of, start, wait_for, write_config

LAYOUTS = (("layout.dp=1",), ("layout.dp=2",), ("layout.dp=1", "layout.pp=2"), ("layout.dp=2", "layout.tp=2"))
DATA = {
    "log_samples": True, "window": 16, "split": "100,0,0",
    "segments": [{"until_tokens": 900}, {"until_tokens": 4000, "seq_len": 64, "fim_rate": 0.3}, {"seq_len": 32}],
    "fim": {"tokens": ["257", "258", "259"]}, "tokenizer": "bytes",
}  # fmt: skip
STEPS = 45


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    prefix = make_corpus(folder, documents=25)
    return write_config(
        folder / "c.yaml", prefix, data=DATA, train={"steps": STEPS, "global_batch": 8, "micro_batch": 2},
        model={"vocab_size": 260}, checkpoint={"every": 4, "keep": 2}, optim={"lr": 1e-4},
    )  # fmt: skip


def samples(run: Path) -> list[dict]:
    path = run / "samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def last_step(run: Path) -> int:
    return max((row["step"] for row in rows_of(run)), default=0)


def kill_and_compare(config: Path, name: str, kills: int, seed: int, steps: int = STEPS) -> None:
    """Kill the run `kills` times, each time on another layout; then let it end and compare."""
    chance, run, length = random.Random(seed), config.parent / name, f"train.steps={steps}"
    reached = 0
    for _ in range(kills):
        layout = chance.choice(LAYOUTS)
        running = start("pretrain", config, f"run.dir={name}", length, *layout, cwd=config.parent, imported=True)
        until = min(steps - 2, reached + chance.randint(1, max(2, steps // kills)))
        going = wait_for(lambda until=until: last_step(run) >= until, running)
        assert going, running.output.read_text()
        chance.choice([running.kill_all, running.kill_launcher, lambda r=running: r.kill_rank(0)])()
        running.wait()
        reached = last_step(run)
    done = megallm("pretrain", config, f"run.dir={name}", length, "layout.dp=2", "--resume", "must", cwd=config.parent)
    assert done.code == 0, done.err
    done = megallm("data", "stream", config, "--steps", f"0:{steps}", "--json", f"{name}.jsonl", cwd=config.parent)
    assert done.code == 0, done.err
    wanted = [json.loads(line) for line in (config.parent / f"{name}.jsonl").read_text().splitlines()]
    got = sorted(samples(run), key=lambda row: (row["step"], row["row"]))
    assert len(got) == steps * 8 and got == wanted
    check_once(got)


def check_once(rows: list[dict]) -> None:
    """Plainly read tokens of each finished epoch stand in one row; rearranged documents have no hole."""
    spans = defaultdict(list)
    for row in rows:
        for document, begin, end in row["spans"]:
            spans[row["source"], row["epoch"], document].append((begin, end))
    newest = max(row["epoch"] for row in rows)
    assert newest >= 1, "the check needs a finished epoch"
    (source,) = {row["source"] for row in rows}
    data = IndexedDataset(source)
    for epoch in range(newest):
        for document in range(data.num_documents):
            found, length = sorted(spans[source, epoch, document]), len(data.document(document))
            ends = [end for _, end in found]
            assert [begin for begin, _ in found] == [0, *ends[:-1]]
            assert ends[-1] in (length, length + 3)  # three tokens more where it was rearranged


def test_killed_runs_read_what_the_plan_says(config):
    kill_and_compare(config, "run", kills=2, seed=2)


@pytest.mark.chaos
def test_fifty_kills(config):
    kill_and_compare(config, "chaos", kills=50, seed=11, steps=150)


def test_a_lost_state_would_be_noticed(config):
    """The control of the comparison: a stream begun anew in the middle reads other rows."""
    done = megallm("data", "stream", config, "--steps", "0:6", cwd=config.parent)
    rows = [json.loads(line) for line in done.out.splitlines()]
    again = [row | {"step": row["step"] + 3} for row in rows if row["step"] <= 3]
    assert again != [row for row in rows if row["step"] > 3]
    with pytest.raises(AssertionError):
        check_once([row | {"epoch": 0} for row in rows] + [row | {"epoch": 1} for row in again])


def test_a_dataset_that_changed_under_the_run_is_refused(tmp_path):
    """FAULTS row 69, with a real run."""
    prefix = make_corpus(tmp_path, documents=20)
    path = write_config(tmp_path / "c.yaml", prefix, train={"steps": 8})
    assert megallm("pretrain", path, "train.stop_at=2", cwd=tmp_path).code == 0
    make_corpus(tmp_path, documents=21)
    done = megallm("pretrain", path, cwd=tmp_path)
    assert done.code == 2 and "data.content of d_text_document" in done.err.replace(f"{tmp_path}/", "")


def test_trace_names_the_raw_lines(tmp_path):
    """From a row of a step through preprocessing and curation to the lines of the raw files."""
    raw = [f"Line number {i} of the raw text, which says something about the number {i * i}." for i in range(40)]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in raw))
    kept = [{"id": f"doc{i}", "text": raw[i], "file": "raw.jsonl", "line": i + 1} for i in range(40) if i % 3]
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    common = {"file": "raw.jsonl", "step": "", "reason": "", "spans": []}
    actions = ["keep" if i % 3 else "drop" for i in range(40)]
    ledger = [common | {"id": f"doc{i}", "line": i + 1, "action": action} for i, action in enumerate(actions)]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ledger))
    done = megallm("preprocess", "--input", "kept.jsonl", "--output", "d", "--tokenizer", "bytes", cwd=tmp_path)
    assert done.code == 0, done.err
    path = write_config(tmp_path / "c.yaml", "d_text_document", data={"split": "100", "seq_len": 256})
    done = megallm(
        "data", "trace", path, "--step", "2", "--row", "1", "--ledger", "ledger.jsonl", "--json", cwd=tmp_path
    )
    found = json.loads(done.out)
    assert done.code == 0 and found["documents"]
    data = IndexedDataset(tmp_path / "d_text_document")
    for entry in found["documents"]:
        text = bytes(data.document(entry["document"]).astype(np.uint8).tolist()).decode()
        assert raw[entry["raw"]["line"] - 1] == text and entry["origin"]["file"] == "kept.jsonl"
        assert entry["raw"]["file"] == "raw.jsonl" and entry["raw"]["action"] == "keep"
    done = megallm("data", "trace", path, "--step", "2", "--row", "99", cwd=tmp_path)
    assert done.code == 2 and "rows from 0 to 3" in done.err
