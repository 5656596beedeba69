"""The logits of a converted model against `transformers`, in float32. The only place that uses transformers.

The folder's config.json is reduced to plain values and code of the folder is never trusted; the weights come from
its safetensors files only.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.convert.folder import read_json
from megallm.convert.hf_config import CONFIG
from megallm.convert.weights import Source, whole_stage
from megallm.models.build import place_parameters
from megallm.models.config import ModelConfig
from megallm.models.heads import local_logits
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import named_shards

ROWS, TOKENS = 2, 48


def check_available() -> Any:
    """transformers, or a UsageError that says how to get it."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError(
            f"--verify compares with transformers, which cannot be imported ({error}): pip install transformers, or "
            "leave --verify out."
        ) from error


def max_rel_error(model: ModelConfig, ours: Source, theirs: Path, round_theirs: torch.dtype | None = None) -> float:
    """max|a - b| / max|b| of the logits of the same tokens; `a` ours, `b` transformers' from the folder `theirs`.

    `round_theirs` rounds their weights to a dtype first, as the conversion did.
    """
    tokens = sample_tokens(model)
    expected = transformers_logits(theirs, tokens, round_theirs)
    found = our_logits(model, ours, tokens)
    return float((found - expected).abs().max() / expected.abs().max())


def sample_tokens(model: ModelConfig) -> Tensor:
    """Token ids `[ROWS, T]` that go through the whole vocabulary, the same for both sides."""
    length = min(TOKENS, model.max_positions)
    generator = torch.Generator().manual_seed(20)
    return torch.randint(0, model.vocab_size, (ROWS, length), generator=generator)


@torch.no_grad()
def our_logits(model: ModelConfig, source: Source, tokens: Tensor) -> Tensor:
    """Float32 logits `[B, T, V]` of `tokens` `[B, T]`, with the weights of the source."""
    mesh = Mesh.single()
    stage = whole_stage(model, mesh)
    storage = {}
    for name, parameter, _ in named_shards(stage):
        storage[name] = torch.empty(parameter.shape, dtype=torch.float32)
        source.read_into(name, (0,) * parameter.dim(), storage[name])
    place_parameters(stage, storage)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    hidden = stage.blocks(stage.embed(tokens, positions), positions)
    return local_logits(stage.final_norm(hidden), stage.head_weight, mesh, sp=False)


@torch.no_grad()
def transformers_logits(folder: Path, tokens: Tensor, rounded: torch.dtype | None = None) -> Tensor:
    """Float32 logits `[B, T, V]` that transformers computes from the folder."""
    transformers = check_available()
    raw = {key: value for key, value in read_json(folder / CONFIG).items() if key[:1] != "_" and key != "auto_map"}
    config = transformers.AutoConfig.for_model(**raw)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True,
        trust_remote_code=False,
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        if rounded is not None:
            parameter.copy_(parameter.to(rounded))
    return model(tokens, use_cache=False).logits.float()
