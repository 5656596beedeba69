"""Rows 16-19 and 21-23 of the fault matrix: a run that is asked to stop, in any phase of any trainer, loses no step."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megallm.base.stopping import JOB_END
from megallm.run.signals import TimeLimit
from tests.chaos.signalling import SEEN
from tests.system.commands import make_corpus, megallm, rows_of, start, wait_for

STEPS, REACTION_SECONDS = 26, 60.0
MODEL = {"family": "llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_heads": 4,
         "num_kv_heads": 2, "vocab_size": 257, "max_positions": 512, "tie_embeddings": True}  # fmt: skip
# The phases of a step, in the order in which a run is stopped in them: (phase, the how-many-th time, signal, who).
COMMON = (
    ("read", 1, "SIGTERM", "all"), ("build", 2, "SIGUSR1", "all"), ("forward", 1, "SIGTERM", "all"),
    ("update", 1, "SIGINT", "all"), ("evaluate", 2, "SIGTERM", "all"), ("save", 1, "SIGUSR1", "all"),
    ("commit", 1, "SIGTERM", "all"), ("forward", 2, "SIGTERM", "1"),
)  # fmt: skip
EARLY = ("read", "build")  # there is nothing to save
CODES = {"SIGTERM": 75, "SIGUSR1": 75, "SIGINT": 130}


def rows(verb: str) -> list[dict[str, Any]]:
    draw = random.Random(1)
    made = []
    for number in range(24):
        a, b = draw.randrange(100), draw.randrange(100)
        talk = [{"role": "user", "content": f"{a}+{b}?"}]
        right, wrong = ([{"role": "assistant", "content": str(sum_)}] for sum_ in (a + b, a - b))
        made.append({
            "sft": {"messages": talk + right},
            "dpo": {"prompt": talk, "chosen": right, "rejected": wrong},
            "grpo": {"prompt": f"{a}+{b}=", "answer": "1", "number": number},
        }[verb])  # fmt: skip
    return made


def prepared(folder: Path, verb: str) -> Path:
    """A configuration whose files lie in `folder`."""
    config: dict[str, Any] = {
        "run": {"dir": "run", "seed": 3}, "model": MODEL, "layout": {"dp": 2},
        "train": {"steps": STEPS, "global_batch": 4, "micro_batch": 1}, "optim": {"lr": 0.003},
        "checkpoint": {"every": 2, "keep": 2}, "eval": {"every": 3, "batches": 3}, "log": {"plot": False},
    }  # fmt: skip
    if verb == "pretrain":
        config["data"] = {"sources": {make_corpus(folder): 1.0}, "split": "80,20,0", "seq_len": 32}
    else:
        for name in ("train", "valid"):
            (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows(verb)))
        train, valid = str(folder / "train.jsonl"), str(folder / "valid.jsonl")
        config["data"] = {"sources": {train: 1}, "valid_sources": {valid: 1}, "tokenizer": "bytes", "seq_len": 128}
    if verb == "dpo":
        config["model"] = {"init": str(folder / "policy")}
        data = {"sources": {str(folder / "policy.jsonl"): 1}, "tokenizer": "bytes", "seq_len": 128}
        policy = {"run": {"dir": "policy", "seed": 1}, "model": MODEL, "train": {"steps": 1, "global_batch": 4},
                  "log": {"plot": False}, "eval": {"batches": 0}, "data": data}  # fmt: skip
        (folder / "policy.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows("sft")))
        (folder / "policy.yaml").write_text(yaml.safe_dump(policy))
        done = megallm("sft", folder / "policy.yaml", cwd=folder)
        assert done.code == 0, done.err
    if verb == "grpo":
        (folder / "rewards.py").write_text(
            "def odd(completions, **rest):\n    return [float(sum(map(ord, text)) % 2) for text in completions]\n"
        )
        config |= {"reward": {"functions": {f"{folder}/rewards.py:odd": 1.0}},
                   "sampling": {"group": 4, "max_new_tokens": 5}}  # fmt: skip
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    return folder / "c.yaml"


def figures(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in rows_of(run)]


def newest(run: Path) -> int:
    names = [path.name for path in (run / "checkpoints").glob("step-*")]
    return max((int(name[5:]) for name in names if "." not in name), default=0)


def stopped_in(phase: str, count: int, name: str, who: str, verb: str, folder: Path) -> tuple[int, str, float]:
    """Run until the signal in that phase has ended the run: (exit code, what it said, seconds after the signal)."""
    (folder / SEEN).unlink(missing_ok=True)
    running = start(
        verb, folder / "c.yaml", cwd=folder, imported=True, MEGALLM_TEST_HOOK="tests.chaos.signalling:install",
        MEGALLM_SIGNAL=f"{phase} {count} {name} {who}",
    )  # fmt: skip
    try:
        done = running.wait()
    finally:
        running.kill_all()
    assert (folder / SEEN).exists(), f"the run never came to {phase}: {done.out}"
    return done.code, done.out, time.time() - float((folder / SEEN).read_text())


SWEEPS = {
    "pretrain": COMMON[:3] + COMMON[5:],
    "sft": (*COMMON[:1], ("build", 3, "SIGTERM", "1"), *COMMON[3:6]),
    "dpo": (*COMMON[:1], ("reference", 2, "SIGTERM", "all"), COMMON[4], COMMON[5]),
    "grpo": (
        *COMMON[:1], ("rollout", 20, "SIGTERM", "all"), ("rollout", 30, "SIGTERM", "1"),
        ("reward", 2, "SIGUSR1", "all"), COMMON[3], ("save", 1, "SIGTERM", "all"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("verb", SWEEPS)
def test_rows_16_17_18_stopped_in_every_phase_ends_as_the_quiet_run(tmp_path, verb):
    """Each stop leaves a checkpoint of the last step that has a row, and the whole has the losses of a quiet run."""
    config, run, before = prepared(tmp_path, verb), tmp_path / "run", 0
    for phase, count, name, who in SWEEPS[verb]:
        code, said, seconds = stopped_in(phase, count, name, who, verb, tmp_path)
        where = f"{verb}, {phase}: {said}"
        assert code == CODES[name], where
        assert seconds < REACTION_SECONDS, where
        steps = [step for step, _ in figures(run)]
        assert steps == list(range(1, newest(run) + 1)), f"{newest(run)} is saved, the rows are {steps}; {where}"
        assert newest(run) == before if phase in EARLY else newest(run) >= before, where
        before = newest(run)
        assert not (run / "LOCK").exists() and not list((run / "checkpoints").glob("*.tmp-*")), where
    assert 0 < before < STEPS
    done = megallm(verb, config, "--resume", "must", cwd=tmp_path)
    assert done.code == 0, done.err
    quiet = megallm(verb, config, "run.dir=quiet", cwd=tmp_path)
    assert quiet.code == 0, quiet.err
    assert figures(run) == figures(tmp_path / "quiet") and len(figures(run)) == STEPS
    lost = [row for row in _events(run) if row.get("lost_steps")]
    assert not lost


def test_row_18_a_rollout_and_its_rewards_are_given_up_at_once(tmp_path):
    """Answers that take a minute, and a reward of an hour: the run leaves in seconds, and makes the step again."""
    config, run = prepared(tmp_path, "grpo"), tmp_path / "run"
    slow = "import time\ndef odd(completions, **rest):\n    time.sleep(3600)\n    return [0.0] * len(completions)\n"
    (tmp_path / "rewards.py").write_text(slow)
    code, said, seconds = stopped_in("reward", 1, "SIGTERM", "all", "grpo", tmp_path)
    assert code == 75 and seconds < REACTION_SECONDS and "before step 1" in said, said
    assert [row["step"] for row in _events(run) if row["event"] == "abandoned"] == [1]
    (tmp_path / "rewards.py").write_text(slow.replace("3600", "0"))
    long = ("sampling.max_new_tokens=8000", "model.max_positions=8192", "data.seq_len=16")
    running = start("grpo", config, *long, "run.dir=long", "sampling.stop=[]", cwd=tmp_path, imported=True)
    try:
        assert wait_for(lambda: running.output.exists() and "rollout" in running.output.read_text(), running)
        time.sleep(0.2)
        begin = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        done = running.wait()
    finally:
        running.kill_all()
    assert done.code == 75 and time.monotonic() - begin < REACTION_SECONDS, done.out
    assert [row["step"] for row in _events(tmp_path / "long") if row["event"] == "abandoned"] == [1]


def test_row_19_three_sigterms_then_sigkill_before_the_save_ends(tmp_path):
    """A slow disk: asking again changes nothing, and the checkpoint before stays the newest valid one."""
    config, run = prepared(tmp_path, "pretrain"), tmp_path / "run"
    running = start("pretrain", config, cwd=tmp_path, imported=True, MEGALLM_TEST_HOOK="tests.chaos.signalling:install",
                    MEGALLM_SLOW_DISK="2")  # fmt: skip
    try:
        assert wait_for(lambda: newest(run) >= 2 and len(rows_of(run)) >= 3, running)
        for _ in range(3):
            running.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        assert wait_for(lambda: list((run / "checkpoints").glob("*.tmp-*")), running)
        before = newest(run)
        running.kill_all()
        done = running.wait()
    finally:
        running.kill_all()
    assert done.code < 0 and newest(run) == before >= 2, done
    assert done.out.count("SIGTERM: stopping") == 1, done.out
    verified = megallm("ckpt", "verify", run, cwd=tmp_path)
    assert verified.code == 0, verified.err
    again = megallm("pretrain", config, "--resume", "must", cwd=tmp_path)
    quiet = megallm("pretrain", config, "run.dir=quiet", cwd=tmp_path)
    assert again.code == quiet.code == 0, again.err
    assert figures(run) == figures(tmp_path / "quiet") and not list((run / "checkpoints").glob("*.tmp-*"))


@pytest.mark.chaos
def test_row_21_the_end_of_the_time_is_foreseen(tmp_path):
    """The variables of a batch job whose time is nearly over; no signal is sent."""
    config, run = prepared(tmp_path, "pretrain"), tmp_path / "run"
    end = int(time.time()) + 20
    words = ("train.steps=100000", "checkpoint.every=0", "eval.batches=0", "layout.dp=1")
    running = start("pretrain", config, *words, cwd=tmp_path, imported=True, SLURM_JOB_ID="7",
                    SLURM_JOB_END_TIME=str(end))  # fmt: skip
    try:
        done = running.wait()
    finally:
        running.kill_all()
    assert done.code == 75 and "Stopped by the time limit after step" in done.out, done.out
    assert time.time() < end, "it was too late"
    assert newest(run) == len(rows_of(run)) > 0


def test_row_21_what_is_left_for_stopping_follows_from_steps_and_saves(monkeypatch):
    monkeypatch.setattr(JOB_END, "began", 0.0)
    monkeypatch.setattr(JOB_END, "at", 3600.0)
    now = [0.0]
    limit = TimeLimit(None, lambda: now[0])

    def first_second() -> int:
        return next(second for second in range(4000) if now.__setitem__(0, second) or limit.near)

    assert first_second() == 3600 - 70  # 10 s, and a save that nobody has seen
    limit.step(60.0)
    assert first_second() == 3600 - 250
    limit.saved(5.0)
    limit.step(1.0)  # the longest counts
    assert first_second() == 3600 - 205
    limit.step(2000.0)
    assert first_second() == 3600 - 900, "at most a quarter"
    assert TimeLimit(10.0, lambda: 599.0).near and not TimeLimit(10.0, lambda: 400.0).near
    monkeypatch.setattr(JOB_END, "at", None)
    assert not TimeLimit(None, lambda: 1e12).near


def _events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
