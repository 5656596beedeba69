"""Independent float64 attention in ordinary torch, grouped and latent, beside the decoder of
`reference`.

It imports nothing of megallm. Weights are a plain dict of logical tensors, named and shaped as in
docs/architecture.md; the configuration is a plain mapping with the fields of a resolved model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Config = Mapping[str, Any]
Weights = Mapping[str, Tensor]
PREFIX = "prefix.adapter.default."  # keys and values that every token sees (arXiv 2101.00190)


def attention(
    config: Config, weights: Weights, at: str, x: Tensor, positions: Tensor, documents: Tensor | None
) -> Tensor:
    """Of x [B, T, D] at positions [B, T], inside `documents` [B, T]; `config` is that of the layer
    (`of_layer`).
    """
    if config["mla"]["kv_lora_dim"]:
        return _latent(config, weights, at, x, positions, documents)
    batch, length, _ = x.shape
    size, heads, kv_heads = config["head_size"], config["num_heads"], config["num_kv_heads"]
    q = linear(weights, at + "q", x).view(batch, length, heads, size)
    k = linear(weights, at + "kv", x, 0).view(batch, length, kv_heads, size)
    v = linear(weights, at + "kv", x, 1).view(batch, length, kv_heads, size)
    if config["qk_norm"]:
        unit = 1.0 if config["norm"] == "rmsnorm_unit" else 0.0
        together = 2 if config["qk_norm_span"] == "all" else 1  # dims that a norm goes over
        q, k = (
            rms(z.flatten(-together), weights[at + name] + unit, config["norm_eps"]).view_as(z)
            for z, name in ((q, "q_norm.weight"), (k, "k_norm.weight"))
        )
    if config["positions"] == "rope":
        q, k = (_rotate(z, positions, config, documents) for z in (q, k))
    k, v = (z.repeat_interleave(heads // kv_heads, dim=2) for z in (k, v))
    scale = config["attention_scale"] or size**-0.5
    ahead = None
    if at + PREFIX + "keys" in weights:
        keys, values = (
            weights[at + PREFIX + name].unflatten(-1, (kv_heads, size)).repeat_interleave(heads // kv_heads, dim=1)
            for name in ("keys", "values")
        )
        ahead = _capped(torch.einsum("bihe,phe->bhip", q, keys) * scale, config), values
    scores = _capped(torch.einsum("bihe,bjhe->bhij", q, k) * scale, config)
    return linear(weights, at + "o", _mix(config, scores, v, documents, weights.get(at + "sinks"), ahead))


def of_layer(config: Config, layer: int) -> Config:
    """Returns the configuration of one layer: without the window, or rotary positions, that it lacks.
    """
    word = config["layer_pattern"]
    if word is None:
        turned = config["sliding_window"] is not None
        letter = "w" if turned else "f"
    else:
        letter = word[layer % len(word)]
        turned = letter in "wm"
    own = dict(config)
    if letter in "fn":
        own["sliding_window"] = None
    if letter in "nm":
        own["positions"] = "none"
    if turned and config["window_rope_theta"] is not None:
        own |= {"rope_theta": config["window_rope_theta"], "rope_scaling": None}
    return own


def _capped(scores: Tensor, config: Config) -> Tensor:
    cap = config["attention_cap"]
    return scores if cap is None else cap * torch.tanh(scores / cap)


def _latent(
    config: Config, weights: Weights, at: str, x: Tensor, positions: Tensor, documents: Tensor | None
) -> Tensor:
    """DeepSeek-V2 (arXiv 2405.04434), equations 9 to 19, head by head."""
    mla, heads = config["mla"], config["num_heads"]
    plain, rotated, size = mla["nope_head_size"], mla["rope_head_size"], mla["value_head_size"]
    source, eps = x, mla["norm_eps"] or config["norm_eps"]
    if mla["q_lora_dim"]:
        source = rms(linear(weights, at + "q_down", x), weights[at + "q_latent_norm.weight"], eps)
    latent = rms(linear(weights, at + "kv_down", x), weights[at + "kv_latent_norm.weight"], eps)
    shared = _rotate(linear(weights, at + "k_rope", x)[:, :, None], positions, config, documents)[:, :, 0]
    scale = (plain + rotated) ** -0.5
    if config["rope_scaling"] == "yarn" and config["rope_mscale_all_dim"]:
        scale *= (0.1 * config["rope_mscale_all_dim"] * math.log(config["rope_factor"]) + 1) ** 2
    queries = linear(weights, at + "q", source).unflatten(-1, (heads, plain + rotated))
    keys = linear(weights, at + "k_up", latent).unflatten(-1, (heads, plain))
    values = linear(weights, at + "v_up", latent).unflatten(-1, (heads, size))
    scores = []
    for head in range(heads):
        q = queries[:, :, head]
        turned = _rotate(q[:, :, None, plain:], positions, config, documents)[:, :, 0]
        scores.append((q[..., :plain] @ keys[:, :, head].mT + turned @ shared.mT) * scale)
    sinks = weights.get(at + "sinks")
    return linear(weights, at + "o", _mix(config, torch.stack(scores, 1), values, documents, sinks))


def _mix(
    config: Config,
    scores: Tensor,
    v: Tensor,
    documents: Tensor | None,
    sinks: Tensor | None,
    ahead: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Softmax of the visible scores [B, H, T, T] over values [B, T, H, E], heads side by side [B,
    T, H E]. Every token also sees what is `ahead`: scores [B, H, T, P] and values [P, H, E].
    """
    length = scores.shape[-1]
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    reach = config["sliding_window"] or length
    visible = (j <= i) & (j > i - reach)
    if not config["causal"]:
        visible = (i - j).abs() < reach
    if documents is not None:
        visible = visible & (documents[:, None, :, None] == documents[:, None, None, :])
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:  # one more column, whose value is nothing
        scores = torch.cat((scores, sinks[:, None, None].expand(*scores.shape[:3], 1)), dim=-1)
    if ahead is not None:
        scores = torch.cat((scores, ahead[0]), dim=-1)
    shares = scores.softmax(-1)
    mixed = torch.einsum("bhij,bjhe->bihe", shares[..., :length], v)
    if ahead is not None:
        mixed = mixed + torch.einsum("bhip,phe->bihe", shares[..., -len(ahead[1]) :], ahead[1])
    return mixed.flatten(2)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def linear(weights: Weights, name: str, x: Tensor, part: int | None = None) -> Tensor:
    """x @ W.T + b; `part` picks one of a stacked weight (K or V, gate or up)."""
    weight, bias = weights[name + ".weight"], weights.get(name + ".bias")
    if part is not None:
        weight, bias = weight[part], None if bias is None else bias[part]
    y = x @ weight.T
    return y if bias is None else y + bias


def _rotate(x: Tensor, positions: Tensor, config: Config, documents: Tensor | None) -> Tensor:
    """Rotary embedding, Su et al. 2021 (arXiv 2104.09864), halves paired as in Llama; x [B, T,
    heads, E].
    """
    if config["rope_fraction"] is not None:
        part = int(config["rope_fraction"] * x.shape[-1])
        whole = config | {"rope_fraction": None}
        return torch.cat((_rotate(x[..., :part], positions, whole, documents), x[..., part:]), dim=-1)
    size, kind, base, height = x.shape[-1], config["rope_scaling"], config["rope_theta"], 1.0
    if kind == "ntk":
        base = base * config["rope_factor"] ** (size / (size - 2))
    speed = base ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
    if kind in ("linear", "llama3"):
        speed = torch.stack([_slower(one, config) for one in speed])
    elif kind == "yarn":
        speed, height = _yarn(speed, config)
    elif kind == "dynamic":
        speed = torch.stack([_dynamic(row, size, config) for row in _longest(positions, documents)])[:, None]
    elif kind == "longrope":
        speed, height = _longrope(speed, max(_longest(positions, documents)), config)
    angle = (positions[..., None].to(x.dtype) * speed)[:, :, None, :]
    cos, sin, (low, high) = angle.cos() * height, angle.sin() * height, x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def _longest(positions: Tensor, documents: Tensor | None) -> list[int]:
    """Returns the number of tokens of the longest document of each row."""
    if documents is None:
        return [positions.shape[1]] * positions.shape[0]
    return [int(row.bincount().max()) for row in documents]


def _dynamic(longest: int, size: int, config: Config) -> Tensor:
    """Frequencies [E/2] of the base that grows with the longest text."""
    known, factor, base = config["rope_positions"], config["rope_factor"], config["rope_theta"]
    if longest > known:
        base = base * (factor * longest / known - (factor - 1)) ** (size / (size - 2))
    return base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)


def _longrope(speeds: Tensor, longest: int, config: Config) -> tuple[Tensor, float]:
    """LongRoPE (arXiv 2402.13753): a divisor for each frequency [E/2], and the height of the tables."""
    known = config["rope_positions"]
    divisors = config["rope_long_factors" if longest > known else "rope_short_factors"]
    height = config["rope_attention_factor"]
    if height is None:
        height = math.sqrt(1 + math.log(config["rope_factor"]) / math.log(known))
    return speeds / torch.tensor(divisors, dtype=speeds.dtype), height


def _slower(speed: Tensor, config: Config) -> Tensor:
    """One frequency after linear or llama3 stretching, case by case on its wavelength."""
    factor = config["rope_factor"]
    if config["rope_scaling"] == "linear":
        return speed / factor
    wavelength, old = 2 * torch.pi / speed, config["rope_positions"]
    if wavelength > old / config["rope_low_factor"]:
        return speed / factor
    if wavelength < old / config["rope_high_factor"]:
        return speed
    smooth = (old / wavelength - config["rope_low_factor"]) / (config["rope_high_factor"] - config["rope_low_factor"])
    return (1 - smooth) * speed / factor + smooth * speed


def _yarn(speeds: Tensor, config: Config) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): frequencies [E/2] blended over a ramp of features, and the height of
    the tables.
    """
    count, known, factor = len(speeds), config["rope_positions"], config["rope_factor"]
    ends = [
        count * math.log(known / (2 * math.pi * turns)) / math.log(config["rope_theta"])
        for turns in (config["rope_beta_fast"] or 32, config["rope_beta_slow"] or 1)
    ]
    if config["rope_truncate"] is not False:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    first, last = max(ends[0], 0), min(ends[1], 2 * count - 1)
    slow = [min(max((i - first) / ((last - first) or 0.001), 0.0), 1.0) for i in range(count)]
    blended = torch.stack([s * (1 - part) + s / factor * part for s, part in zip(speeds, slow, strict=True)])
    height, (over, under) = config["rope_attention_factor"], (config["rope_mscale"], config["rope_mscale_all_dim"])
    if height is None:
        log = 0.1 * math.log(factor)
        height = (log * over + 1) / (log * under + 1) if over and under else log + 1
    return blended, height
