"""`megallm sft` as a command: killed and gone on with adapters, bad rows, and what the other verbs make of its run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.system.commands import megallm, rows_of, start, wait_for
from tests.training.chat_runs import TIMED, conversations

CONFIG = {
    "run": {"dir": "base", "seed": 3},
    "model": {
        "family": "llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_heads": 4,
        "num_kv_heads": 2, "tie_embeddings": True,
    },
    "data": {"sources": {"train.jsonl": None}, "valid_sources": {"valid.jsonl": None}, "tokenizer": "bytes",
             "seq_len": 128},
    "train": {"steps": 3, "global_batch": 4, "micro_batch": 1},
    "optim": {"lr": 0.01},
    "log": {"plot": False},
}  # fmt: skip
PROMPT = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with conversations, a base model in `base`, and a configuration of adapters beside it, `lora.yaml`."""
    folder = tmp_path_factory.mktemp("sft")
    conversations(folder / "train.jsonl", 16)
    conversations(folder / "valid.jsonl", 5, seed=1)
    (folder / "base.yaml").write_text(yaml.safe_dump(CONFIG))
    done = megallm("sft", "base.yaml", cwd=folder)
    assert done.code == 0 and "train.jsonl: messages rows" in done.out, done.err
    data = {key: value for key, value in CONFIG["data"].items() if key != "tokenizer"}
    lora = CONFIG | {"model": {"init": "base"}, "data": data, "peft": {"method": "lora", "dim": 4, "dropout": 0.1}}
    lora |= {"layout": {"tp": 2}, "checkpoint": {"every": 2}, "train": CONFIG["train"] | {"steps": 40}}
    (folder / "lora.yaml").write_text(yaml.safe_dump(lora))
    return folder


@pytest.fixture(scope="module")
def quiet(place) -> Path:
    """The run with adapters that nobody disturbs."""
    done = megallm("sft", "lora.yaml", "run.dir=quiet", cwd=place)
    assert done.code == 0, done.err
    assert "with new adapters (lora)" in done.out and " 4.00 bytes each; trained: " in done.out
    return place / "quiet"


def told(run: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.startswith(TIMED)} for row in rows_of(run)]


def test_killed_it_goes_on_bit_for_bit(place, quiet):
    running = start("sft", "lora.yaml", "run.dir=killed", cwd=place, imported=True)
    assert wait_for(lambda: len(rows_of(place / "killed")) >= 7, running), running.output.read_text()
    running.kill_all()
    assert running.wait().code != 0
    assert len(rows_of(place / "killed")) < 40
    done = megallm("sft", "lora.yaml", "run.dir=killed", "--resume", "must", cwd=place)
    assert done.code == 0 and "resumed at step" in done.out, done.err
    assert told(place / "killed") == told(quiet)
    weights = "adapter/adapter_model.safetensors"
    assert (place / "killed" / weights).read_bytes() == (quiet / weights).read_bytes()


def test_generate_and_merge_take_the_run(place, quiet):
    """The run itself, its adapter beside the base, and the merged folder answer alike; the base does not."""
    done = megallm("merge", "--model", quiet, "--output", "merged", cwd=place)
    assert done.code == 0, done.err
    found = {}
    named = {"run": ["quiet"], "beside": ["base", "--adapter", "quiet"], "merged": ["merged"], "base": ["base"]}
    for name, words in named.items():
        done = megallm("generate", "--model", *words, "--prompt", PROMPT, "--max-new-tokens", "6", "--json",
                       f"{name}.jsonl", "--layout", "tp=2" if name == "run" else "", cwd=place)  # fmt: skip
        assert done.code == 0, done.err
        found[name] = json.loads((place / f"{name}.jsonl").read_text())
    assert found["run"]["logprobs"] == pytest.approx(found["beside"]["logprobs"], abs=1e-5)
    assert found["run"]["logprobs"] == pytest.approx(found["merged"]["logprobs"], abs=1e-5)
    assert found["run"]["logprobs"] != pytest.approx(found["base"]["logprobs"], abs=1e-2)
    done = megallm("convert", "--to", "hf", "--input", "quiet", "--output", "hf", cwd=place)
    assert done.code == 2 and "`megallm merge --model quiet --output DIR`" in done.err


def test_a_bad_row_ends_with_65_on_every_layout(place):
    text = (place / "train.jsonl").read_text().splitlines()
    text[9] = '{"messages": [{"role": "robot", "content": "1"}]}'
    (place / "bad.jsonl").write_text("\n".join(text))
    words = ["sft", "base.yaml", "run.dir=bad", "data.sources={bad.jsonl: null}", "layout.tp=2"]
    done = megallm(*words, cwd=place)
    assert done.code == 65 and "bad.jsonl:10: " in done.err, done.err
    assert not (place / "bad" / "metrics.jsonl").exists() and not list((place / "bad" / "checkpoints").iterdir())
    done = megallm(*words[:2], "data.sources={none.jsonl: 1}", cwd=place)
    assert done.code == 65 and "none.jsonl" in done.err, "before any rank begins"
