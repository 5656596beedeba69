"""The batch script of `megallm launch --slurm`: what stands in it, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megallm.base.errors import UsageError
from megallm.cli.main import main
from megallm.launch.slurm import LAUNCHERS, SlurmJob, submit, write_script

ROOT = Path(__file__).parents[2]


def job(folder: Path, **values) -> SlurmJob:
    usual = {"words": ["pretrain", "/c d.yaml", "data.sources={a: 1}"], "folder": folder, "cwd": folder, "python": "py"}
    return SlurmJob(**usual | values)


def directives(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    return dict(line.partition("=")[::2] for line in lines)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_script_that_bash_reads(tmp_path, launcher):
    path = write_script(job(tmp_path / "my run", nodes=4, gpus_per_node=8, ranks_per_node=8, launcher=launcher))
    subprocess.run(["bash", "-n", path], check=True, timeout=30)
    text = path.read_text()
    found = directives(text)
    assert found["nodes"] == "4" and found["ntasks-per-node"] == found["gpus-per-node"] == "8"
    assert found["signal"] == "USR1@180" and {"requeue", "no-kill"} <= found.keys() and "time" not in found
    assert found["output"] == f'"{tmp_path}/my run/logs/slurm-%j.out"' and found["job-name"] == "megallm-my_run"
    assert "words=(pretrain '/c d.yaml' 'data.sources={a: 1}')" in text
    assert not re.search("@[A-Z]+@", text), "a value is missing"
    assert len([line for line in text.splitlines() if line.lstrip().startswith("srun ")]) == 1


def test_an_elastic_job_asks_for_a_range_of_whole_nodes(tmp_path):
    """With a number of tasks Slurm would give the fewest."""
    found = directives(job(tmp_path, nodes=4, least_nodes=2, time="1-12", partition="gpu,big", account="a").script())
    assert found["nodes"] == "2-4" and "exclusive" in found and "ntasks-per-node" not in found
    assert (found["time"], found["partition"], found["account"]) == ("1-12", "gpu,big", "a")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"nodes": 0}, "--nodes is 0; it must be an integer of at least 1"),
        ({"least_nodes": 3, "nodes": 2}, "--min-nodes is 3, more than the 2 of --nodes"),
        ({"gpus_per_node": 4, "ranks_per_node": 8}, "every rank needs a GPU"),
        ({"time": "1h"}, "--time is '1h'; Slurm takes minutes"),
        ({"time": "1:2"}, "--time is '1:2'"),
        ({"partition": "a b"}, "--partition is 'a b'"),
        ({"account": "x;rm"}, "--account is 'x;rm'"),
        ({"signal_seconds": 0}, "--signal-seconds is 0"),
        ({"least_nodes": 1, "nodes": 2, "launcher": "torchrun"}, "--min-nodes goes with --launcher srun"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, values, words):
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        job(tmp_path, **values).script()


def test_without_slurm_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="no sbatch on this machine, so .* is written and not submitted"):
        submit(tmp_path / "launch.sbatch")


def test_the_words_of_slurm_when_it_refuses(tmp_path, monkeypatch):
    """A program of that name, which refuses: what it says is told."""
    program = tmp_path / "sbatch"
    program.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    with pytest.raises(UsageError, match="sbatch refused .*launch.sbatch: error: invalid partition specified: gpu"):
        submit(tmp_path / "launch.sbatch")


def test_the_command_checks_the_configuration_for_all_ranks(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text("model: {preset: tiny-1m}\ndata: {sources: {d: 1}, tokenizer: bytes}\ntrain: {global_batch: 8}\n"
                      f"run: {{dir: {tmp_path}/run}}\n")  # fmt: skip
    words = ["launch", "--slurm", "--dry-run", "pretrain", str(config)]
    assert main([*words, "--nodes", "3"]) == 2
    assert "train.global_batch 8 is not a multiple of train.micro_batch 1 x dp 3" in capsys.readouterr().err
    assert main([*words, "--nodes", "2", "--ranks-per-node", "4", "train.steps=7"]) == 0
    out = capsys.readouterr().out
    assert "train.steps=7" in out and directives(out)["nodes"] == "2" and not (tmp_path / "run").exists()
    assert main(["launch", "--fit", "7", "pretrain", str(config), "layout.dp=8"]) == 0
    assert capsys.readouterr().out == "4 layout.dp=4\n"
    assert main(["launch", "--fit", "3", "--min-ranks", "3", "pretrain", str(config), "layout.dp=8"]) == 2
    assert "Numbers of ranks that fit: 1, 2, 4, 8" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["pretrain", "sft", "grpo"])
def test_the_examples(tmp_path, verb):
    """Their scripts, with files that are there in place of the user's."""
    done = subprocess.run(
        ["bash", "examples/slurm/submit.sh", verb, "--dry-run", "--nodes", "2", "data.tokenizer=bytes",
         "model={preset: tiny-1m, vocab_size: 257, max_positions: 8192, init: null}"],
        cwd=ROOT, env={"PATH": "/bin:/usr/bin", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"words=({verb} {ROOT}/examples/slurm/{verb}.yaml" in done.stdout
    assert directives(done.stdout)["nodes"] == "2", "the last --nodes wins"
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True, timeout=30)
