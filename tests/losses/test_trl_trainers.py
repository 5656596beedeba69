"""Losses and gradients of all weights equal to those of TRL 1.16's SFT and reward trainers on their own batches.

`tests/peers/trl_trainers.py` has written tests/peers/trl_trainers.json in an environment of its own; with
MEGALLM_PEERS=PYTHON, the interpreter of such an environment, it is written anew and compared.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megallm.engine.engine import Engine
from megallm.losses.language import NextToken
from megallm.losses.reward import BradleyTerry
from megallm.models.config import ModelConfig
from megallm.optim.config import OptimConfig
from megallm.parallel.mesh import Mesh
from tests.engine.tiny import config_of
from tests.losses.test_trl import flat

PEERS = Path(__file__).parents[1] / "peers"
GOLDEN = json.loads((PEERS / "trl_trainers.json").read_text(encoding="utf-8"))
LAYER = "model.layers.0."
# Ours, and theirs of which it is a stack.
NAMES = {
    "embedding.weight": ["model.embed_tokens.weight"],
    "layers.0.attention.q.weight": [LAYER + "self_attn.q_proj.weight"],
    "layers.0.attention.kv.weight": [LAYER + "self_attn.k_proj.weight", LAYER + "self_attn.v_proj.weight"],
    "layers.0.attention.o.weight": [LAYER + "self_attn.o_proj.weight"],
    "layers.0.mlp.gate_up.weight": [LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"],
    "layers.0.mlp.down.weight": [LAYER + "mlp.down_proj.weight"],
    "layers.0.attention_norm.weight": [LAYER + "input_layernorm.weight"],
    "layers.0.mlp_norm.weight": [LAYER + "post_attention_layernorm.weight"],
    "final_norm.weight": ["model.norm.weight"],
}


def model(head: str) -> ModelConfig:
    sizes = GOLDEN["sizes"]
    return ModelConfig(
        family="llama", num_layers=sizes["num_hidden_layers"], hidden_size=sizes["hidden_size"],
        ffn_hidden_size=sizes["intermediate_size"], num_heads=sizes["num_attention_heads"], head=head,
        num_kv_heads=sizes["num_key_value_heads"], vocab_size=sizes["vocab_size"], max_positions=64, norm_eps=1e-6,
    ).resolve()  # fmt: skip


def stacked(theirs: dict[str, Tensor], head: str) -> dict[str, Tensor]:
    """Tensors under the names of transformers as tensors under ours."""
    names = NAMES | {"head.weight": [head]}
    return {
        ours: torch.stack([theirs[name] for name in parts]) if len(parts) > 1 else theirs[parts[0]]
        for ours, parts in names.items()
    }


def values(case: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of trl_trainers.weights, by their names."""
    made = {}
    for number, (name, gradient) in enumerate(sorted(case["gradients"].items())):
        shape = torch.tensor(gradient).shape
        places = torch.arange(shape.numel(), dtype=torch.float64)
        made[name] = (0.4 * torch.sin(places * (1.3 + 0.1 * number) + number)).view(shape) + (len(shape) == 1)
    return made


def compare(case: dict[str, Any], config: ModelConfig, batches: list[dict[str, Tensor]], loss: Any) -> None:
    head = "score.weight" if config.head == "value" else "lm_head.weight"
    engine = Engine.build(config_of(config, OptimConfig(clip=0.0)), Mesh.single())
    start = stacked(values(case), head)
    masters = {piece.name: piece.tensor for piece in engine.masters()}
    assert masters.keys() == start.keys()
    for name, tensor in masters.items():
        tensor.copy_(start[name])
    engine.parameters.publish()
    stats = engine.train_step(batches, loss, 0.0)
    assert stats.loss == pytest.approx(case["loss"], rel=1e-5)
    want = stacked({name: torch.tensor(x, dtype=torch.float64) for name, x in case["gradients"].items()}, head)
    found = {piece.name: piece.tensor for piece in engine.gradients()}
    for name, gradient in want.items():
        assert gradient.abs().max() > 1e-4, name
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def micro(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """A microbatch of rows `[B, T + 1]` whose next tokens count where `mask` `[B, T]` is True."""
    positions = torch.arange(mask.shape[1]).expand(mask.shape)
    return {"tokens": ids[:, : mask.shape[1]], "labels": ids.roll(-1, 1)[:, : mask.shape[1]],
            "positions": positions, "mask": mask}  # fmt: skip


def sft_batches(case: dict[str, Any]) -> list[dict[str, Tensor]]:
    made = []
    for batch in case["batches"]:
        ids, labels = torch.tensor(batch["input_ids"]), torch.tensor(batch["labels"])
        made.append(micro(ids, labels[:, 1:] != -100))
    return made


@pytest.mark.parametrize("name", GOLDEN["sft"])
def test_sft(name):
    case = GOLDEN["sft"][name]
    compare(case, model("lm"), sft_batches(case), NextToken(dft=name == "dft"))


@pytest.mark.parametrize("name", GOLDEN["reward"])
def test_reward(name):
    case = GOLDEN["reward"][name]
    (batch,) = case["batches"]
    pairs = len(batch["input_ids"]) // 2
    order = torch.arange(2 * pairs).view(2, pairs).T.flatten()  # theirs: all chosen ones first
    ids, seen = (torch.tensor(batch[key])[order] for key in ("input_ids", "attention_mask"))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[torch.arange(len(ids)), seen.sum(1) - 1] = True
    given = micro(ids, mask)
    if "margin" in batch:
        margin = torch.tensor(batch["margin"], dtype=torch.float64)
        given["margin"] = torch.stack((margin, torch.zeros_like(margin)), 1).flatten()
    halves = [{key: x[:4] for key, x in given.items()}, {key: x[4:] for key, x in given.items()}]
    for batches in ([given], halves):
        compare(case, model("value"), batches, BradleyTerry(case["center"]))


def test_another_batch_is_noticed():
    """Negative controls: one label more, answers in the wrong order."""
    case = GOLDEN["sft"]["completion"]
    batches = sft_batches(case)
    batches[0]["mask"] = batches[0]["mask"].clone()
    batches[0]["mask"][1, 0] = True
    with pytest.raises(AssertionError):
        compare(case, model("lm"), batches, NextToken())
    batches = [{key: x[:2] for key, x in batch.items()} for batch in sft_batches(case)]
    with pytest.raises(AssertionError):
        compare(case, model("lm"), batches, NextToken())


@pytest.mark.skipif("MEGALLM_PEERS" not in os.environ, reason="MEGALLM_PEERS names no interpreter that has TRL")
def test_the_file_is_what_trl_says(tmp_path):
    output = tmp_path / "trainers.json"
    command = [os.environ["MEGALLM_PEERS"], str(PEERS / "trl_trainers.py"), "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    fresh = json.loads(output.read_text(encoding="utf-8"))
    assert fresh.keys() == GOLDEN.keys()
    for section in ("sft", "reward"):
        assert flat(fresh[section]) == pytest.approx(flat(GOLDEN[section]), rel=1e-5, abs=1e-7), section
