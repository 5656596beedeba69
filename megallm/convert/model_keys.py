"""Keys of config.json of families with scales, layers without rotary positions, or an offset of
positions, that do not go over one by one. Pure.
"""

from __future__ import annotations

from typing import Any

from megallm.convert.moe_keys import LARGEST_LAYERS, ConfigExtension, Raw, whole
from megallm.models.config import ModelConfig
from megallm.models.layer_plan import letters_of, pattern_of

# Gemma: the embedding's scale follows from the hidden size, that of scores from a number.


def _read_gemma(raw: Raw, problems: list[str]) -> dict[str, Any]:
    hidden = whole(raw, "hidden_size", 2304, problems)
    features = whole(raw, "query_pre_attn_scalar", 256, problems)
    return {"embedding_scale": hidden**0.5, "attention_scale": features**-0.5}


def _features(model: ModelConfig) -> float:
    return model.head_size if model.attention_scale is None else model.attention_scale**-2


def _write_gemma(model: ModelConfig) -> dict[str, Any]:
    return {"query_pre_attn_scalar": round(_features(model))}


def _not_gemma(model: ModelConfig) -> list[str]:
    found = []
    if model.embedding_scale != model.hidden_size**0.5:
        found.append("model.embedding_scale is not the square root of model.hidden_size")
    if abs(_features(model) / round(_features(model)) - 1) > 1e-12:
        found.append("model.attention_scale is not 1 over the square root of a whole number")
    return found


GEMMA = ConfigExtension(
    frozenset(("query_pre_attn_scalar",)), _read_gemma, _write_gemma, _not_gemma
)


# SmolLM3: a list of ones and zeros, where 0 is a layer without rotary positions.

_LETTERS = {(False, 1): "f", (True, 1): "w", (False, 0): "n", (True, 0): "m"}


def _read_unrotated(raw: Raw, problems: list[str]) -> dict[str, Any]:
    count = min(whole(raw, "num_hidden_layers", 36, problems), LARGEST_LAYERS)
    every = whole(raw, "no_rope_layer_interval", 4, problems)
    rotated = raw.get("no_rope_layers")
    if rotated is None:
        rotated = [int((n + 1) % every != 0) for n in range(count)]
    if not isinstance(rotated, list) or len(rotated) < count or set(map(str, rotated)) - {"0", "1"}:
        problems.append(
            f"no_rope_layers is {str(rotated)[:40]}; it must be a list of 0 and 1 for each layer"
        )
        return {}
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    kinds = raw.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) < count:
        kinds = ["full_attention" if turned else "sliding_attention" for turned in rotated]
    letters = [
        _LETTERS[window is not None and kind == "sliding_attention", turned]
        for kind, turned in zip(kinds[:count], rotated, strict=False)
    ]
    windowed = any(letter in "wm" for letter in letters)
    return {
        "layer_pattern": pattern_of(letters),
        "sliding_window": window if windowed else None,
    }


def _write_unrotated(model: ModelConfig) -> dict[str, Any]:
    letters = letters_of(model.layer_pattern, model.sliding_window, model.num_layers)
    return {"no_rope_layers": [int(letter in "fw") for letter in letters]}


def _nothing(_: ModelConfig) -> list[str]:
    return []


UNROTATED = ConfigExtension(
    frozenset(("no_rope_layers", "no_rope_layer_interval")),
    _read_unrotated,
    _write_unrotated,
    _nothing,
)

# ModernBERT: keys that say what the family always is.

_MODERNBERT = {"norm_bias": False, "classifier_bias": False, "decoder_bias": True}
_MODERNBERT |= {"attention_bias": False, "mlp_bias": False, "classifier_activation": "gelu"}
_BESIDE = ("initializer_cutoff_factor", "sparse_pred_ignore_index", "classifier_pooling",
           "cls_token_id", "embedding_dropout", "mlp_dropout", "deterministic_flash_attn",
           "reference_compile", "repad_logits_with_grad")  # fmt: skip
MODERNBERT = ConfigExtension(
    frozenset(_BESIDE), lambda *_: {}, lambda _: dict(_MODERNBERT), _nothing
)


# RoBERTa: the first rows of the table of positions belong to padding.


def _read_roberta(raw: Raw, problems: list[str]) -> dict[str, Any]:
    rows = whole(raw, "max_position_embeddings", 512, problems)
    offset = whole(raw, "pad_token_id", 1, problems, least=0) + 1
    if rows <= offset:
        problems.append(f"max_position_embeddings is {rows}, pad_token_id alone takes {offset}")
    return {"max_positions": rows - offset, "position_offset": offset}


def _write_roberta(model: ModelConfig) -> dict[str, Any]:
    rows, padding = model.max_positions + model.position_offset, model.position_offset - 1
    return {"max_position_embeddings": rows, "pad_token_id": padding}


def _not_roberta(model: ModelConfig) -> list[str]:
    return [] if model.position_offset else ["model.position_offset is 0, roberta has one"]


ROBERTA = ConfigExtension(
    frozenset(("max_position_embeddings", "pad_token_id")),
    _read_roberta,
    _write_roberta,
    _not_roberta,
)
