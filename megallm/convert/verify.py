"""The logits of a converted model against `transformers`, in float32. The only place that uses
transformers.

The folder's config.json is reduced to plain values and code of the folder is never trusted; the
weights come from its safetensors files only.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallm.base.errors import UsageError
from megallm.convert.folder import read_json
from megallm.convert.hf_config import CONFIG
from megallm.convert.weights import WeightSource, whole_stage
from megallm.models.build import place_parameters
from megallm.models.config import VOCABULARY_HEADS, ModelConfig
from megallm.models.decoder import Stage
from megallm.models.heads import local_logits
from megallm.models.router import Routers
from megallm.ops.cross_entropy import soft_cap
from megallm.ops.precision import wide_dtype
from megallm.parallel.mesh import Mesh
from megallm.parallel.shard import named_shards

ROWS, TOKENS = 2, 48
TOLERANCE = 1e-5  # of float32 logits against transformers
NUDGE = 2.0**-22  # two units in the last place of a float32
SHAKY = (
    TOLERANCE / 2
)  # a position whose logits move by more when its inputs are nudged says nothing at TOLERANCE
MOST_SHAKY = 0.1  # share of the positions that may be left out


@dataclass(frozen=True)
class Comparison:
    """`max_rel_error` over the positions that were judged, how many of all were left out, and the
    error over all.
    """

    max_rel_error: float
    positions: int
    left_out: int
    max_rel_error_everywhere: float


def check_available() -> Any:
    """Returns transformers, or raises a UsageError that says how to get it."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError(
            f"--verify compares with transformers, which cannot be imported ({error}): pip install "
            "transformers, or leave --verify out."
        ) from error


def compare(
    model: ModelConfig, ours: WeightSource, theirs: Path, round_theirs: torch.dtype | None = None
) -> Comparison:
    """Returns max|a - b| / max|b| of the logits of the same tokens; `a` ours, `b` transformers'
    from the folder `theirs`.

    Every position counts, and only when one is above TOLERANCE is more asked. A trained model has a
    position now and then whose logits move by 1e-4 when the last bit of an input does: there two
    right computations differ. Such positions are found with transformers alone (its own logits,
    inputs nudged) and left out; when they are more than MOST_SHAKY of all, none is. `round_theirs`
    rounds their weights to a dtype first, as the conversion did.
    """
    tokens = sample_tokens(model)
    padding = model.position_offset - 1 if model.position_offset else None
    judge = load_transformers(theirs, model.head, round_theirs, padding)
    expected = transformers_logits(judge, tokens)
    found = our_logits(model, ours, tokens)
    scale = expected.abs().max()
    errors = (found - expected).abs().amax(-1) / scale
    everywhere = float(errors.max())
    steady = torch.ones_like(errors, dtype=torch.bool)
    if not everywhere <= TOLERANCE:
        shaky = (transformers_logits(judge, tokens, NUDGE) - expected).abs().amax(
            -1
        ) > SHAKY * scale
        if shaky.float().mean() <= MOST_SHAKY:
            steady = ~shaky
    return Comparison(float(errors[steady].max()), steady.numel(), int((~steady).sum()), everywhere)


def sample_tokens(model: ModelConfig) -> Tensor:
    """Returns token ids `[ROWS, T]` that go through the whole vocabulary, the same for both sides.
    """
    length = min(TOKENS, model.max_positions)
    generator = torch.Generator().manual_seed(20)
    tokens = torch.randint(0, model.vocab_size, (ROWS, length), generator=generator)
    padding = model.position_offset - 1
    return torch.where(tokens == padding, padding + 1, tokens) if padding >= 0 else tokens


def loaded_stage(model: ModelConfig, source: WeightSource, mesh: Mesh) -> Stage:
    """Returns the whole model on one rank in float32, with the weights of the source."""
    stage = whole_stage(model, mesh)
    storage = {}
    for name, parameter, _ in named_shards(stage):
        storage[name] = torch.empty(parameter.shape, dtype=torch.float32)
        source.read_into(name, (0,) * parameter.dim(), storage[name])
    for name, bias in Routers(model, mesh, {0: stage}).biases():
        source.read_into(name, (0,), bias)
    place_parameters(stage, storage)
    return stage


@torch.no_grad()
def our_logits(model: ModelConfig, source: WeightSource, tokens: Tensor) -> Tensor:
    """Returns float32 logits `[B, T, V]` of `tokens` `[B, T]`, with the weights of the source.

    Of a classification or value head those of each sequence `[B, 1, C]`: of the last token, or the
    first of an encoder. Of a body alone the hidden states, and after them the pooled first one.
    """
    mesh = Mesh.single()
    stage = loaded_stage(model, source, mesh)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    embedded = stage.embed(tokens, positions)
    mask_spec = stage.context.mask_spec(
        {"positions": positions}, model.sliding_window, model.causal
    )
    hidden = stage.blocks(
        embedded, stage.attention_inputs(positions, wide_dtype(embedded.dtype), mask_spec)
    )
    features = stage.features(hidden)
    if model.head in VOCABULARY_HEADS:
        operands = stage.head_operands(features)
        logits = local_logits(*operands, mesh, sp=False, bias=stage.head_bias)
        return soft_cap(logits, model.logit_cap)
    if model.head == "none":
        return torch.cat((hidden, features[:, :1]), 1) if model.pooler else features
    return stage.head.logits(features[:, -1:] if model.causal else features[:, :1])


# Keys that say nothing about a forward pass, which transformers would nevertheless act upon or
# stumble over.
SILENT = frozenset((
    "auto_map", "dtype", "torch_dtype", "torchscript", "return_dict", "use_cache", "output_attentions",
    "output_hidden_states", "bos_token_id", "eos_token_id", "pad_token_id", "problem_type", "task_specific_params",
    "initializer_range", "attention_dropout", "transformers_version", "name_or_path",
))  # fmt: skip


def _counts(key: str) -> bool:
    """Returns whether transformers gets to see a key; what chooses implementations (kernels of
    others) it never does.
    """
    return key not in SILENT and key[:1] != "_" and not key.endswith("_implementation")


AUTO = {
    "lm": "AutoModelForCausalLM", "mlm": "AutoModelForMaskedLM", "none": "AutoModel",
    "classification": "AutoModelForSequenceClassification", "value": "AutoModelForSequenceClassification",
}  # fmt: skip


@torch.no_grad()
def load_transformers(
    folder: Path,
    head: str = "lm",
    rounded: torch.dtype | None = None,
    padding: int | None = None,
) -> Any:
    """Returns transformers' float32 model of the folder, its weights rounded to a dtype first when
    one is given. `padding` is the id that positions are counted from.
    """
    transformers = check_available()
    transformers.utils.logging.disable_progress_bar()
    raw = {key: value for key, value in read_json(folder / CONFIG).items() if _counts(key)}
    try:
        config = transformers.AutoConfig.for_model(**raw)
        config._attn_implementation, config.use_cache = "eager", False
        config.pad_token_id = padding  # with one, some tokens of the sample would not count
        model = (
            getattr(transformers, AUTO[head])
            .from_pretrained(
                str(folder),
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
            .eval()
        )
    except Exception as error:  # transformers raises whatever a strange config.json leads it to
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UsageError(
            f"--verify: transformers cannot load {folder} ({reason}). Mend its {CONFIG}, or leave "
            "--verify out."
        ) from error
    for parameter in model.parameters():
        if rounded is not None:
            parameter.copy_(parameter.to(rounded))
    return model


@torch.no_grad()
def transformers_logits(model: Any, tokens: Tensor, nudge: float = 0.0) -> Tensor:
    """Returns float32 logits `[B, T, V]` of `tokens` `[B, T]`; `nudge` scales the noise that its
    inputs are multiplied with.
    """
    given = [{"input_ids": row[None]} for row in tokens]
    if nudge:
        inputs = model.get_input_embeddings()(tokens)
        noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))
        given = [{"inputs_embeds": row[None]} for row in inputs * (1 + nudge * noise)]
    return torch.cat([_scores(model(**row)) for row in given]).float()


def _scores(output: Any) -> Tensor:
    """Returns what `our_logits` gives of the same row, from what transformers returns."""
    if "logits" in output:
        return output.logits if output.logits.dim() == 3 else output.logits[:, None]
    pooled = [output.pooler_output[:, None]] if output.get("pooler_output") is not None else []
    return torch.cat((output.last_hidden_state, *pooled), 1)
