"""Keys of config.json about layers: which have a window, which have rotary positions, and the
numbers of rotary embeddings. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megallm.base.errors import UsageError
from megallm.convert.family import Family, LayerKeys
from megallm.convert.moe_keys import Raw
from megallm.models.config import ModelConfig
from megallm.models.layer_plan import letters_of, pattern_of
from megallm.models.presets import FAMILIES
from megallm.models.rope_scaling import ROPE_OPTIONS

KINDS = {"full_attention": "f", "sliding_attention": "w"}
MOST_LAYERS = 10_000

INTEGERS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads", "head_size", "vocab_size",
             "max_positions", "rope_positions", "token_types", "num_labels", "moe.num_experts", "moe.top_k",
             "moe.ffn_hidden_size", "moe.shared_ffn_hidden_size", "moe.num_groups", "moe.top_groups",
             "mla.kv_lora_dim", "mla.nope_head_size", "mla.rope_head_size", "mla.value_head_size")  # fmt: skip
LARGEST = 2**31 - 1


def typed(field: str, key: str, value: Any, problems: list[str]) -> Any:
    """Returns the value when it has the type and range of the field, else None with a sentence
    added.
    """
    if field in ("rope_short_factors", "rope_long_factors"):
        numbers = isinstance(value, list) and value and all(type(n) in (int, float) and n > 0 for n in value)
        good, words = numbers, "a list of positive numbers"
        value = tuple(map(float, value)) if numbers else value
    elif field in INTEGERS:
        good, words = type(value) is int and 1 <= value <= LARGEST, f"a whole number from 1 to {LARGEST}"
    elif field in ("tie_embeddings", "moe.norm_topk_prob", "rope_truncate"):
        good, words = type(value) is bool, "true or false"
    else:
        good, words = type(value) in (int, float) and 0 < value < 1e30, "a positive number"
    if good:
        return value
    problems.append(f"{key} is {str(value)[:40]!r}; it must be {words}")
    return None



# Which layers have a window.


def read_layers(raw: Raw, family: Family, problems: list[str]) -> dict[str, Any]:
    """Returns `sliding_window` and `layer_pattern` of a config.json."""
    layers, keys = raw.get(family.keys["num_layers"]), family.layers
    window = raw[keys.window] if keys.window in raw else family.defaults.get(keys.window)
    kinds = raw.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and kinds):
        problems.append(f"layer_types is {str(kinds)[:40]!r}; it must be a list of words")
        return {}
    if keys.use and not raw.get("use_sliding_window"):
        window = None
    if window is not None and (type(window) is not int or window < 1):
        problems.append(f"{keys.window} is {str(window)[:40]!r}; it must be a whole number of at least 1, or null")
        return {}
    count = layers if type(layers) is int and 1 <= layers <= MOST_LAYERS else 1
    letters = _letters(raw, keys, window, count)
    if kinds is not None:
        if strange := [kind for kind in kinds if kind not in KINDS]:
            problems.append(f"layer_types is {str(strange[0])[:40]!r} somewhere; megallm computes {', '.join(KINDS)}")
            return {}
        letters = [KINDS[kind] for kind in kinds][:count]
        if "w" in letters and window is None and not keys.use:
            problems.append("layer_types has 'sliding_attention' with sliding_window None; it takes a window")
            return {}
    letters = ["f" if window is None else letter for letter in letters]
    if len(set(letters)) > 1 and "layer_pattern" in family.switches:
        problems.append("layer_types (or max_window_layers) mixes full and sliding attention; all layers must be alike")
    if "w" not in letters:
        window = None
    if window is not None and keys.halved:
        window = window // 2 + 1
    word = pattern_of(letters)
    if word is None and FAMILIES[family.name].get("layer_pattern"):
        word = letters[0]  # said, or the family's own would count
    return {"sliding_window": window, "layer_pattern": word}


def _letters(raw: Raw, keys: LayerKeys, window: int | None, count: int) -> list[str]:
    """Those of layers without `layer_types`."""
    if keys.use and keys.pattern is None:
        first = raw.get("max_window_layers", 28)
        return ["f" if type(first) is int and n < first else "w" for n in range(count)]
    pattern = keys.pattern
    if keys.period and type(raw.get(keys.period)) is int and 1 <= raw[keys.period] <= MOST_LAYERS:
        near = "w" * (raw[keys.period] - 1)
        pattern = f"f{near}" if keys.first_whole else f"{near}f"
    return list(letters_of(pattern, window, count))


def write_layers(model: ModelConfig, family: Family) -> dict[str, Any]:
    """Returns the keys of what `read_layers` reads."""
    keys, letters = family.layers, letters_of(model.layer_pattern, model.sliding_window, model.num_layers)
    windowed = [letter in "wm" for letter in letters]
    window = model.sliding_window
    content: dict[str, Any] = {}
    if keys.halved and window is not None:
        window = (window - 1) * 2
    if "layer_pattern" not in family.switches and window is None:
        window = family.defaults.get(keys.window)  # no layer has it, but transformers wants a number
    if "sliding_window" not in family.switches or keys.use:
        content[keys.window] = window
    if keys.use:
        full = windowed.index(True) if True in windowed else model.num_layers
        content |= {"use_sliding_window": True in windowed}
        if keys.pattern is None:
            content |= {"max_window_layers": full}
    if "layer_pattern" not in family.switches:
        words = {"w": "sliding_attention", "m": "sliding_attention"}
        content["layer_types"] = [words.get(letter, "full_attention") for letter in letters]
    return content


def layers_problem(model: ModelConfig, family: Family) -> list[str]:
    """Returns why layers of this model cannot be said in the family's keys."""
    found, keys = [], family.layers
    count = min(model.num_layers, MOST_LAYERS)  # checked against the tensors later
    letters = set(letters_of(model.layer_pattern, model.sliding_window, count))
    if "layer_pattern" not in family.switches and not letters <= set(keys.letters):
        found.append(f"model.layer_pattern is {model.layer_pattern}, {family.name} has layers of {keys.letters} alone")
    turned = model.window_rope_theta is not None
    if keys.window_theta and "w" in letters and model.rope_scaling and not turned:
        found.append(
            f"model.window_rope_theta is null, {family.name} does not stretch the rotary embedding of layers with a "
            "window"
        )
    return found


# Rotary embeddings.


def read_rope(raw: Raw, family: Family, problems: list[str]) -> dict[str, Any]:
    """Returns bases, scaling and the rotated fraction, from whichever key they stand in."""
    keys = family.layers
    found: dict[str, dict[str, Any]] = {"theta": {}, "window_theta": {}, "fraction": {}}
    values: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        table = raw.get(key)
        if table is None:
            continue
        if not isinstance(table, dict):
            problems.append(f"{key} is {str(table)[:40]!r}; it must be an object")
            continue
        if keys.window_theta and ("full_attention" in table or "sliding_attention" in table):
            windowed = table.get("sliding_attention") or {}
            if windowed.get("rope_type", "default") != "default":
                problems.append(f"{key} stretches layers with a window too; megallm has them as they are")
            found["window_theta"][f"{key}.sliding_attention.rope_theta"] = windowed.get("rope_theta")
            table, key = table.get("full_attention") or {}, f"{key}.full_attention"
        values |= read_stretch(key, table, raw, family, problems)
        found["theta"][f"{key}.rope_theta"] = table.get("rope_theta")
        found["fraction"][f"{key}.partial_rotary_factor"] = table.get("partial_rotary_factor")
    found["theta"][keys.theta] = raw.get(keys.theta)
    if keys.window_theta:
        found["window_theta"][keys.window_theta] = raw.get(keys.window_theta)
    if keys.fraction:
        found["fraction"][keys.fraction] = raw.get(keys.fraction)
    chosen = {name: _agreed(given, problems) for name, given in found.items()}
    if keys.fraction is None and chosen["fraction"] not in (None, 1):
        problems.append(f"partial_rotary_factor is {chosen['fraction']}; it must be 1")
    return values | _bases(chosen, values, family, problems)


def _agreed(given: Mapping[str, Any], problems: list[str]) -> Any:
    """Returns the one value of several keys."""
    given = {key: value for key, value in given.items() if value is not None}
    if len({str(float(v)) if type(v) in (int, float) else str(v) for v in given.values()}) > 1:
        problems.append(" and ".join(f"{key} is {value}" for key, value in given.items()) + ": they must agree")
    return next(iter(given.values()), None)


def _bases(chosen: Mapping[str, Any], values: Raw, family: Family, problems: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    defaults, keys = family.defaults, family.layers
    theta = defaults["rope_theta"] if chosen["theta"] is None else chosen["theta"]
    theta = typed("rope_theta", keys.theta, theta, problems)
    result["rope_theta"] = None if theta is None else float(theta)
    if keys.fraction:
        absent = defaults.get("rope_fraction")
        fraction = absent or 1 if chosen["fraction"] is None else chosen["fraction"]
        fraction = typed("rope_fraction", keys.fraction, fraction, problems)
        result["rope_fraction"] = float(fraction) if fraction and (absent or fraction != 1) else None
    if keys.window_theta:
        absent, windowed = defaults.get("window_rope_theta"), chosen["window_theta"]
        windowed = absent or theta if windowed is None else windowed
        windowed = typed("rope_theta", keys.window_theta, windowed, problems)
        same = absent is None and windowed == theta and "rope_scaling" not in values
        result["window_rope_theta"] = None if same or windowed is None else float(windowed)
    return result


# Their rope types -> our fields and where their numbers stand.
STRETCHES: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "linear": {"rope_factor": "factor"},
    "llama3": {
        "rope_factor": "factor",
        "rope_low_factor": "low_freq_factor",
        "rope_high_factor": "high_freq_factor",
        "rope_positions": "original_max_position_embeddings",
    },
    "dynamic": {"rope_factor": "factor", "rope_positions": "max_position_embeddings"},
    "yarn": {
        "rope_factor": "factor",
        "rope_positions": "original_max_position_embeddings",
        "rope_beta_fast": "beta_fast",
        "rope_beta_slow": "beta_slow",
        "rope_attention_factor": "attention_factor",
        "rope_mscale": "mscale",
        "rope_mscale_all_dim": "mscale_all_dim",
        "rope_truncate": "truncate",
    },
    "longrope": {
        "rope_factor": "factor",
        "rope_positions": "original_max_position_embeddings",
        "rope_short_factors": "short_factor",
        "rope_long_factors": "long_factor",
        "rope_attention_factor": "attention_factor",
    },
}


def read_stretch(key: str, table: Raw, raw: Raw, family: Family, problems: list[str]) -> dict[str, Any]:
    """Returns the fields of a stretched rotary embedding; others than STRETCHES are refused by
    name.
    """
    kind = table.get("rope_type", table.get("type", "default"))
    kind = family.layers.stretches.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in STRETCHES:
        problems.append(f"{key} asks for rope type {str(kind)[:40]!r}; megallm computes {', '.join(STRETCHES)}")
        return {}
    if kind == "default":
        return {}
    values: dict[str, Any] = {"rope_scaling": kind}
    for field, name in STRETCHES[kind].items():
        value = table.get(name, raw.get(name, family.defaults.get(name)))
        value = None if name.startswith("mscale") and value == 0 else value  # 0 is their way of saying none
        if field == "rope_factor" and kind == "longrope" and value is None:
            value = _grown(table, raw, family)
        if value is None and field not in ROPE_OPTIONS.get(kind, ()):
            problems.append(f"{key} of type {kind} lacks {name}")
        elif value is not None:
            value = typed(field, f"{key}.{name}", value, problems)
            values[field] = float(value) if type(value) is int and field != "rope_positions" else value
    return values


def _grown(table: Raw, raw: Raw, family: Family) -> float | None:
    """How many times longer than the old context the new one is: LongRoPE's factor where it is not said."""
    name = "original_max_position_embeddings"
    known = table.get(name, raw.get(name, family.defaults.get(name)))
    longest = raw.get("max_position_embeddings", family.defaults["max_position_embeddings"])
    good = all(type(n) is int and n > 0 for n in (known, longest))
    return longest / known if good else None


def write_rope(model: ModelConfig, family: Family) -> dict[str, Any]:
    """Returns the base and, when stretched, `rope_scaling` for transformers 4; `rope_parameters` for
    5.
    """
    keys, kind, theta = family.layers, model.rope_scaling or "default", model.rope_theta
    if kind == "ntk":  # a larger theta and nothing else
        kind, theta = "default", theta * model.rope_factor ** (model.rope_size / (model.rope_size - 2))
    if kind == "dynamic" and model.rope_positions != model.max_positions:
        raise UsageError(
            f"model.rope_scaling dynamic has model.rope_positions {model.rope_positions}, for which transformers takes "
            f"max_position_embeddings, here {model.max_positions}: the model has no Hugging Face form."
        )
    numbers = {name: getattr(model, field) for field, name in STRETCHES[kind].items()}
    table = {"rope_type": kind} | {
        name: list(value) if isinstance(value, tuple) else value for name, value in numbers.items() if value is not None
    }
    if kind == "dynamic":
        del table["max_position_embeddings"]  # which stands outside
    old, content = dict(table), {keys.theta: theta}
    whole = table | {"rope_theta": theta}
    if kind == "longrope":  # three keys and the old context outside, as Phi-3's own code has it
        content["original_max_position_embeddings"] = model.rope_positions
        old = {name: old[name] for name in ("short_factor", "long_factor")} | {"type": "longrope"}
    if keys.fraction:
        content[keys.fraction] = whole["partial_rotary_factor"] = model.rope_fraction or 1.0
    if keys.window_theta:
        windowed = model.window_rope_theta or theta
        content[keys.window_theta] = windowed
        whole = {"full_attention": whole, "sliding_attention": {"rope_type": "default", "rope_theta": windowed}}
    content["rope_parameters"] = whole
    return content | ({} if kind == "default" else {"rope_scaling": old})
