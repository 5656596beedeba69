"""The command line: help without torch in half a second, one sentence and one exit code for every mistake."""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megallm.base.config import to_dict
from megallm.base.errors import (
    CannotWrite,
    CheckpointError,
    DataError,
    Diverged,
    Hang,
    InternalError,
    PeerLost,
    Requeue,
    UsageError,
)
from megallm.base.version import VERSION
from megallm.cli import main as cli
from megallm.cli.generate import parse_layout, read_prompts
from megallm.cli.table import VERBS, Command, Verb
from megallm.inference.request import GenerateRequest
from megallm.training.config import PretrainConfig

ROOT = Path(__file__).parents[2]
GOOD = """
run: {dir: RUN}
model: {family: llama, num_layers: 2, hidden_size: 32, num_heads: 4, vocab_size: 300}
layout: {tp: 2}
data: {sources: {nowhere_text_document: 1}, seq_len: 16}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(GOOD.replace("RUN", str(tmp_path / "run")))
    return path


def call(capsys, *argv) -> tuple[int, str, str]:
    code = cli.main([str(arg) for arg in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def without_torch(code: str, **kwargs) -> subprocess.CompletedProcess:
    code = "import sys; sys.modules['torch'] = None\n" + code
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, **kwargs
    )


def test_help_without_torch_and_fast():
    code = "from megallm.cli.main import main; raise SystemExit(main(['--help']))"
    help_seconds, plain = [], []
    for _ in range(3):
        before = child_seconds()
        done = without_torch(code)
        help_seconds.append(child_seconds() - before)
        assert done.returncode == 0, done.stderr
        assert all(verb in done.stdout for verb in VERBS)
        before = child_seconds()
        without_torch("import numpy, yaml")
        plain.append(child_seconds() - before)
    assert min(help_seconds) < 2 * min(plain), "less than two imports, on any machine"


def child_seconds() -> float:
    """CPU time of all ended children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("words", VERBS)
def test_help_of_every_verb_without_torch(words):
    done = without_torch(f"from megallm.cli.main import main; raise SystemExit(main({[*words.split(), '--help']!r}))")
    assert done.returncode == 0, done.stderr
    assert f"usage: megallm {words}" in done.stdout


def test_every_row_of_the_table_has_its_command():
    for words, verb in VERBS.items():
        assert words in importlib.import_module(verb.module).COMMANDS


def test_python_m_megallm(tmp_path):
    done = subprocess.run([sys.executable, "-m", "megallm", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"megallm {VERSION}\n")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["pretran"], "'pretran' is not a verb. Did you mean 'pretrain'?"),
        (["ckpt"], "'megallm ckpt' is not a verb; there are: ckpt ls, ckpt show"),
        (["ckpt", "lst"], "'megallm ckpt lst' is not a verb"),
        (["pretrain"], "the following arguments are required: CONFIG"),
        (["pretrain", "c.yaml", "--nporc", "2"], "Did you mean '--nproc'?"),
        (["pretrain", "c.yaml", "--resume", "maybe"], "invalid choice: 'maybe'"),
        (["pretrain", "c.yaml", "--res", "auto"], "unrecognized arguments: --res"),
        (["config"], "needs a CONFIG file, or --schema"),
        (["config", "/nowhere.yaml"], "/nowhere.yaml: the configuration file cannot be read"),
        (["generate", "--model", "x"], "Give either --prompts F.jsonl or --prompt TEXT."),
        (["generate", "--model", "x", "--prompt", "a", "--top-p", "0"], "--top-p is 0.0; it must be greater than 0"),
        (["generate", "--model", "x", "--prompt", "a", "--layout", "tq=2"], "Did you mean 'tp'?"),
        (["oracle", "--break", "nothing"], "--break nothing is no reduction"),
        (["ckpt", "dump", "x", "--output", "y.bin"], "must end in .safetensors"),
    ],
)
def test_usage_errors_exit_2_with_a_sentence(capsys, argv, sentence):
    code, out, err = call(capsys, *argv)
    assert code == 2 and out == ""
    assert err.startswith("megallm: error: ") and sentence in err and "Traceback" not in err


def test_config_prints_the_resolved_configuration(capsys, config):
    code, out, _ = call(capsys, "config", config, "--no-files", "--json", "--world", "4", "train.global_batch=8")
    found = json.loads(out)
    assert code == 0 and found["layout"]["dp"] == 2 and found["model"]["ffn_hidden_size"] == 128
    assert found.keys() == to_dict(PretrainConfig()).keys()
    code, out, _ = call(capsys, "config", config, "--no-files")
    assert code == 0 and "global_batch: 8" in out
    again = config.parent / "again.yaml"
    again.write_text(out)
    assert call(capsys, "config", again, "--no-files")[1] == out


def test_schema(capsys):
    code, out, _ = call(capsys, "config", "--schema")
    layout = json.loads(out)["properties"]["layout"]["properties"]
    assert code == 0 and layout["tp"]["description"] == "tensor-parallel ranks"


def test_an_undocumented_key_of_the_training_tree_is_noticed(capsys):
    sections = json.loads(call(capsys, "config", "--schema")[1])["properties"]
    for name in ("run", "layout", "zero", "data", "train", "checkpoint", "eval", "log"):
        for key, entry in sections[name]["properties"].items():
            assert entry.get("description"), f"{name}.{key} has no comment beside it"


def test_an_impossible_layout_exits_2_before_anything_is_written(capsys, config, tmp_path):
    code, _, err = call(capsys, "pretrain", config, "layout.tp=3", "layout.pp=7", "train.micro_batch=5")
    assert code == 2
    for key in ("layout.tp 3", "layout.pp 7", "train.global_batch 8"):
        assert key in err
    assert not (tmp_path / "run").exists()


def test_nproc_that_does_not_fit(capsys, config):
    code, _, err = call(capsys, "pretrain", config, "--nproc", "3")
    assert code == 2 and "3 processes are not a multiple of layout" in err
    assert call(capsys, "pretrain", config, "--nproc", "0")[0] == 2


def test_missing_data_exits_65_before_any_rank(capsys, config, tmp_path):
    code, _, err = call(capsys, "pretrain", config)
    assert code == 65 and "nowhere_text_document" in err
    assert not (tmp_path / "run").exists()


def test_usage_under_torchrun(capsys, config, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call(capsys, "pretrain", config)
    assert code == 2 and "MASTER_ADDR and MASTER_PORT not" in err
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    code, _, err = call(capsys, "pretrain", config, "--nproc", "4")
    assert code == 2 and "torchrun started 2 ranks" in err


class Raises:
    """A module-like holder of one verb that raises."""

    def __init__(self, error: BaseException) -> None:
        def run(args):
            raise error

        self.COMMANDS = {"raise": Command(lambda parser: None, run)}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("a sentence."), 2),
        (DataError("a sentence."), 65),
        (PeerLost("a sentence."), 69),
        (InternalError("a sentence."), 70),
        (CannotWrite("a sentence."), 73),
        (CheckpointError("a sentence."), 74),
        (Requeue("a sentence."), 75),
        (Hang("a sentence."), 76),
        (Diverged("a sentence."), 77),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 0),
        (PermissionError(13, "Permission denied", "/a/file"), 73),
        (OSError(28, "No space left on device", "/a/file"), 73),
        (FileNotFoundError(2, "No such file", "/a/file"), 70),
        (ValueError("boom"), 70),
    ],
)
def test_one_exit_code_for_each_kind_of_error(capsys, monkeypatch, error, code):
    monkeypatch.setitem(sys.modules, "raising", Raises(error))
    monkeypatch.setitem(VERBS, "raise", Verb("raise", "raising", "x"))
    if isinstance(error, BrokenPipeError):
        monkeypatch.setattr(os, "dup2", lambda *fds: None)
    found, _, err = call(capsys, "raise")
    assert found == code
    unexpected = code == 70 and not isinstance(error, InternalError)
    assert ("Traceback" in err) == unexpected and ("please report" in err) == unexpected
    if "a sentence." in str(error):
        assert err == "megallm: error: a sentence.\n"


def test_a_closed_pipe_is_quiet():
    code = "from megallm.cli.main import main; raise SystemExit(main(['config', '--schema']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.wait(20) == 0
    assert process.stderr.read() == ""


def test_ctrl_c_is_130_without_a_traceback(tmp_path):
    fifo = tmp_path / "c.yaml"
    os.mkfifo(fifo)
    process = subprocess.Popen(
        [sys.executable, "-m", "megallm", "config", str(fifo)], cwd=ROOT, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert process.stderr.read() == b"megallm: error: interrupted.\n"


def test_generate_reads_layouts_and_prompts(tmp_path):
    assert parse_layout("tp=2,pp=2").world == 4
    assert parse_layout("").world == 1
    with pytest.raises(UsageError, match="only tp, pp, dp and ep"):
        parse_layout("cp=2")
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert read_prompts(path) == ["a", "b"]
    for text, sentence in [("x", ":1: not JSON"), ('{"prompt": 3}', ":1: expected"), ("\n", "holds no prompt")]:
        path.write_text(text)
        with pytest.raises(DataError, match=sentence):
            read_prompts(path)
    with pytest.raises(UsageError, match="--max-new-tokens is 0"):
        GenerateRequest("m", ("a",), max_new_tokens=0).check()
