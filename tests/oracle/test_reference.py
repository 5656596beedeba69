"""The referee itself: against transformers, against torch's own optimizer, and against its own weights."""

from __future__ import annotations

import ast
import dataclasses
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megallm.models.config import ModelConfig
from megallm.oracle import reference, reference_mla, reference_mtp, reference_rules
from tests.models.test_mla import SIZES as LATENT
from tests.models.test_mla import YARN, latent_weights

transformers = pytest.importorskip("transformers", reason="the reference is compared with transformers' models")

SIZES = {"vocab_size": 61, "num_layers": 2, "hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "max_positions": 32}
TWO_MSCALES = YARN | {"rope_mscale": 0.7, "rope_mscale_all_dim": 1.2}
FAMILIES = {
    "llama": {"family": "llama", "ffn_hidden_size": 24},
    "llama-tied": {"family": "llama", "ffn_hidden_size": 24, "tie_embeddings": True},
    "qwen2": {"family": "qwen2", "ffn_hidden_size": 24},
    "qwen3": {"family": "qwen3", "ffn_hidden_size": 24, "head_size": 6},
    "mistral": {"family": "mistral", "ffn_hidden_size": 24, "sliding_window": 3},
    "gpt2": {"family": "gpt2", "num_kv_heads": 4},
    "latent": {"ffn_hidden_size": 24, "num_kv_heads": None, "mla": LATENT, "norm_eps": 1e-6} | TWO_MSCALES,
}


def resolved(name: str) -> dict[str, Any]:
    return dataclasses.asdict(ModelConfig(**(SIZES | FAMILIES[name])).resolve())


def theirs(config: dict[str, Any]) -> Any:
    """The transformers model of the same configuration, float64, random weights everywhere (norms and biases too)."""
    torch.manual_seed(1)
    if config["family"] == "gpt2":
        made = transformers.GPT2Config(
            vocab_size=config["vocab_size"], n_positions=config["max_positions"], n_embd=config["hidden_size"],
            n_layer=config["num_layers"], n_head=config["num_heads"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            attn_implementation="eager",
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(made)
    elif config["mla"]["kv_lora_dim"]:
        made = transformers.DeepseekV3Config(
            vocab_size=config["vocab_size"], hidden_size=config["hidden_size"], num_hidden_layers=config["num_layers"],
            num_attention_heads=config["num_heads"], num_key_value_heads=config["num_heads"], rms_norm_eps=1e-6,
            intermediate_size=config["ffn_hidden_size"], first_k_dense_replace=99, q_lora_rank=10, kv_lora_rank=12,
            qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=10, attn_implementation="eager",
            rope_parameters={"rope_type": "yarn", "rope_theta": config["rope_theta"], "factor": 4.0, "mscale": 0.7,
                             "mscale_all_dim": 1.2, "original_max_position_embeddings": 16},
        )  # fmt: skip
        model = transformers.DeepseekV3ForCausalLM(made)
    else:
        kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}[config["family"]]
        made = getattr(transformers, kind + "Config")(
            vocab_size=config["vocab_size"], hidden_size=config["hidden_size"], num_hidden_layers=config["num_layers"],
            num_attention_heads=config["num_heads"], num_key_value_heads=config["num_kv_heads"],
            head_dim=config["head_size"], intermediate_size=config["ffn_hidden_size"],
            rms_norm_eps=config["norm_eps"], tie_word_embeddings=config["tie_embeddings"],
            max_position_embeddings=config["max_positions"], attn_implementation="eager",
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
            **({"sliding_window": config["sliding_window"]} if kind == "Mistral" else {}),
        )  # fmt: skip
        model = getattr(transformers, kind + "ForCausalLM")(made)
    model = model.double()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=0.1, std=0.4)
    return model


def logical(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their weights under our names and in our shapes."""
    gpt2 = config["family"] == "gpt2"
    ours = {"embedding.weight": state["transformer.wte.weight" if gpt2 else "model.embed_tokens.weight"]}
    if gpt2:
        ours["positions.weight"] = state["transformer.wpe.weight"]
        final, blocks = "transformer.ln_f", "transformer.h"
        names = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
        matrices = {"attention.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    else:
        final, blocks = "model.norm", "model.layers"
        names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
        names |= {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
        names |= {"attention.q": "self_attn.q_proj", "attention.o": "self_attn.o_proj", "mlp.down": "mlp.down_proj"}
        matrices = {}
    for kind in ("weight", "bias"):
        if f"{final}.{kind}" in state:
            ours[f"final_norm.{kind}"] = state[f"{final}.{kind}"]
        for n in range(config["num_layers"]):
            at, to = f"{blocks}.{n}.", f"layers.{n}."
            for mine, other in names.items():
                if f"{at}{other}.{kind}" in state:
                    ours[f"{to}{mine}.{kind}"] = state[f"{at}{other}.{kind}"]
            for mine, other in matrices.items():  # GPT-2 stores [in, out]
                value = state[f"{at}{other}.{kind}"]
                ours[f"{to}{mine}.{kind}"] = value.t() if kind == "weight" else value
            if gpt2:
                q, k, v = (piece.t() for piece in state[f"{at}attn.c_attn.{kind}"].chunk(3, dim=-1))
                ours[f"{to}attention.q.{kind}"], ours[f"{to}attention.kv.{kind}"] = q, torch.stack((k, v))
            elif f"{at}self_attn.k_proj.{kind}" in state:
                pair = [state[f"{at}self_attn.{p}_proj.{kind}"] for p in "kv"]
                ours[f"{to}attention.kv.{kind}"] = torch.stack(pair)
            if not gpt2 and kind == "weight":
                pair = [state[f"{at}mlp.{p}_proj.weight"] for p in ("gate", "up")]
                ours[f"{to}mlp.gate_up.weight"] = torch.stack(pair)
    for n in range(config["num_layers"] if config["mla"]["kv_lora_dim"] else 0):
        at = f"model.layers.{n}.self_attn."
        made = latent_weights({k.removeprefix(at): v for k, v in state.items() if k.startswith(at)}, LATENT, 4)
        ours |= {f"layers.{n}.attention.{k}": v for k, v in made.items()}
    if not config["tie_embeddings"]:
        ours["head.weight"] = state["lm_head.weight"]
    return ours


def batch_of(length: int = 9) -> dict[str, Tensor]:
    torch.manual_seed(2)
    tokens = torch.randint(0, 61, (3, length + 1))
    mask = torch.rand(3, length) < 0.7
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "positions": torch.arange(length).expand(3, length),
        "mask": mask,
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_every_gradient_equal_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers computes norms and rotary angles in float32 whatever the model's dtype: give it float64 there.
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    config, batch = resolved(name), batch_of()
    model = theirs(config)
    labels = batch["labels"].masked_fill(~batch["mask"], -100)
    logits = model(input_ids=batch["tokens"], position_ids=batch["positions"], use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected.backward()
    values = {k: v.detach() for k, v in model.state_dict(keep_vars=True).items()}
    slopes = {k: v.grad for k, v in model.state_dict(keep_vars=True).items() if v.grad is not None}
    weights = logical(config, values)
    used = {k: v.clone().requires_grad_() for k, v in weights.items()}
    loss = reference.masked_loss(config, used, batch)
    loss.backward()
    assert abs(loss.item() - expected.item()) <= 1e-10 * expected.item()
    wanted = logical(config, slopes)
    assert wanted.keys() == used.keys()
    for key, value in wanted.items():
        assert used[key].shape == value.shape
        assert (used[key].grad - value).abs().max() <= 1e-10 * max(value.abs().max(), 1e-3), key


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e6])
def test_three_steps_equal_torch_clipping_and_adamw(clip: float) -> None:
    config, batch = resolved("qwen2"), batch_of()
    start = {k: v.contiguous() for k, v in logical(config, dict(theirs(config).state_dict())).items()}
    adam = reference_rules.Adam((0.8, 0.9), 1e-6, 0.3, clip)
    trainer = reference.Trainer(config, adam, dict(start))
    mine = {k: torch.nn.Parameter(v.clone()) for k, v in start.items()}
    flat = [k for k in mine if "norm" in k or k.endswith("bias")]
    groups = [
        {"params": [mine[k] for k in flat], "weight_decay": 0.0},
        {"params": [mine[k] for k in mine if k not in flat], "weight_decay": 0.3},
    ]
    theirs_optim = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6)
    for lr in (0.01, 0.02, 0.005):
        theirs_optim.zero_grad()
        reference.masked_loss(config, mine, batch).backward()
        expected = torch.nn.utils.clip_grad_norm_(mine.values(), clip if clip else float("inf"))
        for group in theirs_optim.param_groups:
            group["lr"] = lr
        theirs_optim.step()
        _, _, norm = trainer.step(batch, lr)
        assert abs(norm - expected) <= 1e-12 * norm
    for key, value in mine.items():
        assert (trainer.weights[key] - value).abs().max() <= 1e-12 * value.abs().max(), key


def test_masked_labels_do_not_matter_and_unmasked_ones_do() -> None:
    config, batch = resolved("llama"), batch_of()
    weights = logical(config, dict(theirs(config).state_dict()))
    loss = reference.masked_loss(config, weights, batch)
    changed = torch.where(batch["mask"], batch["labels"], (batch["labels"] + 1) % 61)
    assert reference.masked_loss(config, weights, batch | {"labels": changed}) == loss
    changed = torch.where(batch["mask"], (batch["labels"] + 1) % 61, batch["labels"])
    assert reference.masked_loss(config, weights, batch | {"labels": changed}) != loss


@pytest.mark.parametrize("part", [reference, reference_mla, reference_mtp], ids=lambda part: part.__name__)
def test_it_imports_torch_and_the_standard_library_only(part: ModuleType) -> None:
    source = Path(part.__file__).read_text()
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module)
    others = {name for name in names if not name.startswith("megallm.oracle.reference")}
    assert {name.split(".")[0] for name in others} <= {"torch"} | set(sys.stdlib_module_names)
    code = [line for line in source.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(code) <= 205  # with the keys of an adapter in front of attention, and what differs by layer
