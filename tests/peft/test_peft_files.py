"""Adapters travel to PEFT's folders and back: the same logits, the same bits, the same counts."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megallm.base.errors import CheckpointError, UsageError
from megallm.convert.weights import HfReader
from megallm.engine.engine import Engine
from megallm.models.config import ModelConfig
from megallm.parallel.mesh import Mesh
from megallm.peft import lora
from megallm.peft.config import PeftConfig
from megallm.peft.files import adapter_shapes, write_folder
from megallm.peft.inject import prepare_adapters
from megallm.peft.reading import AdapterFolder
from megallm.peft.sources import Joined, read_whole
from tests.engine.tiny import config_of
from tests.peft.hf import ADAPTERS, Saved, hf_log_probs, log_probs, save


def ours(saved: Saved) -> float:
    """The largest difference of log-probabilities when the folders are read here."""
    with HfReader(saved.base) as base:
        adapter = AdapterFolder(saved.adapter, base.model)
        prepared = prepare_adapters(adapter.config, base.model)
        engine = Engine(config_of(base.model), Mesh.single(), prepared)
        engine.fill(Joined(adapter, base))
    trained = sum(b.plan.numel for b in engine.parameters.trainable)
    assert trained >= saved.trainable > 0
    return float((log_probs(engine, saved.text) - saved.log_probs).abs().max())


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_folder_of_peft_is_read_and_written_again(name, tmp_path):
    saved = save(name, tmp_path)
    assert ours(saved) < 1e-5
    (tmp_path / "out").mkdir()
    with HfReader(saved.base) as base:
        adapter = AdapterFolder(saved.adapter, base.model)
        shapes = adapter_shapes(adapter.config, base.model)
        write_folder(tmp_path / "out", adapter, adapter.config, base.model, str(saved.base))
        again = AdapterFolder(tmp_path / "out", base.model)
    assert again.config == adapter.config
    assert all(torch.equal(read_whole(again, n), read_whole(adapter, n)) for n in shapes)
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert set(written) <= set(peft.LoraConfig().to_dict())
    plain = transformers.AutoModelForCausalLM.from_pretrained(saved.base, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    assert float((hf_log_probs(loaded, saved.text) - saved.log_probs).abs().max()) < 1e-5


def test_a_wrong_factor_is_seen(tmp_path, monkeypatch):
    saved = save("two of a stack", tmp_path)
    monkeypatch.setattr(lora.LowRankOptions, "of", staticmethod(
        lambda config, target, dropout: lora.LowRankOptions(config.dim, 1.0, dropout)
    ))  # fmt: skip
    assert ours(saved) > 1e-3


COUNTS = {"r4 q,v": ({}, 1792), "dora": ({"dora": True}, 1984)}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_those_of_peft(name):
    changes, expected = COUNTS[name]
    model = ModelConfig(
        family="llama", num_layers=2, hidden_size=64, ffn_hidden_size=96, num_heads=4, num_kv_heads=2, vocab_size=61
    ).resolve()  # fmt: skip
    config = PeftConfig("lora", ("q_proj", "v_proj"), dim=4, **changes)
    shapes = adapter_shapes(config, model)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == expected


def changed(folder: Path, **keys) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
    ],
)
def test_what_would_be_another_model_is_refused(keys, words, tmp_path):
    saved = save("two of a stack", tmp_path)
    changed(saved.adapter, **keys)
    with HfReader(saved.base) as base, pytest.raises(UsageError, match=words):
        AdapterFolder(saved.adapter, base.model)


def test_damaged_folders_are_told(tmp_path):
    saved = save("two of a stack", tmp_path)
    path = saved.adapter / "adapter_model.safetensors"
    whole = load_file(path)
    key = next(name for name in whole if "lora_B" in name)
    for broken, words in (
        ({name: x for name, x in whole.items() if name != key}, f"lacks {key}"),
        (whole | {key: whole[key][:-1].contiguous()}, "has the shape"),
        (whole | {"base_model.model.model.layers.9.x.lora_A.weight": whole[key].clone()}, "layers.9.x"),
        (whole | {"more.lora_C": whole[key].clone()}, "more"),
    ):
        save_file(broken, path, {"format": "pt"})
        with HfReader(saved.base) as base, pytest.raises((CheckpointError, UsageError), match=words):
            AdapterFolder(saved.adapter, base.model)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (PeftConfig("lora", ("q_porj",)), "Did you mean 'q_proj'"),
        (PeftConfig("lora", ("/[/",)), "no regular expression"),
        (PeftConfig("lora", dim=0), "must be at least 1"),
        (PeftConfig("lora", ("embed_tokens",), dora=True), "peft.dora does not work on"),
        (PeftConfig("lora", modules_to_save=("lm_haed",)), "Did you mean 'lm_head'"),
    ],
)
def test_a_configuration_that_cannot_be_is_told(config, words):
    model = ModelConfig(family="llama", num_layers=1, hidden_size=8, num_heads=2, vocab_size=9, ffn_hidden_size=8)
    with pytest.raises(UsageError, match=words):
        prepare_adapters(config, model.resolve())
