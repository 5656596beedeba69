"""What a mistyped word was meant to be: the same in another spelling, else another name for it,
else a near one.

`AdamW` means `adamw`, `bfloat16` means `bf16`; only what is neither is guessed by its letters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

# Values that go by other names elsewhere; each counts only where the name on the right is a choice.
VALUE_NAMES: dict[str, tuple[str, ...]] = {
    # precisions
    "bfloat16": ("bf16",), "bf16-mixed": ("bf16",), "bf16-true": ("bf16",), "float16": ("fp16",), "half": ("fp16",),
    "16-mixed": ("fp16",), "float32": ("fp32",), "float": ("fp32",), "single": ("fp32",), "tf32": ("fp32",),
    "32-true": ("fp32",), "float64": ("fp64",), "double": ("fp64",), "float8": ("fp8",), "e4m3": ("fp8",),
    # update rules
    "adamw_torch": ("adamw",), "adamw_torch_fused": ("adamw",), "adamw_hf": ("adamw",), "fused_adamw": ("adamw",),
    "adamw_8bit": ("adamw",), "paged_adamw_8bit": ("adamw",), "adamw_bnb_8bit": ("adamw",), "fusedadam": ("adamw",),
    "paged_adamw_32bit": ("adamw",), "distributed_adam": ("adamw",), "momentum": ("sgd",), "muonclip": ("muon",),
    "lion_8bit": ("lion",), "lion_32bit": ("lion",),
    # schedules of the rate
    "cosine_with_min_lr": ("cosine",), "cosine_with_restarts": ("cosine",), "cosine_annealing": ("cosine",),
    "constant_with_warmup": ("constant",), "none": ("constant",), "warmup_stable_decay": ("wsd",),
    "inverse_square_root": ("inverse_sqrt",), "rsqrt": ("inverse_sqrt",), "noam": ("inverse_sqrt",),
    "trapezoidal": ("wsd",), "polynomial": ("linear",), "minus_sqrt": ("sqrt",), "1-sqrt": ("sqrt",),
    # models
    "rms": ("rmsnorm",), "ln": ("layernorm",), "silu": ("swiglu",), "swish": ("swiglu",), "swi_glu": ("swiglu",),
    "gelu_new": ("gelu_tanh",), "gelu_fast": ("gelu_tanh",), "gelu_pytorch_tanh": ("gelu_tanh",),
    "rotary": ("rope",), "absolute": ("learned",), "learned_absolute": ("learned",), "pre_ln": ("pre",),
    "post_ln": ("post",), "causal_lm": ("lm", "next_token"), "language_model": ("lm",), "reward": ("value",),
    "sequence_classification": ("classification",), "masked_lm": ("mlm",), "clm": ("next_token",),
    "autoregressive": ("next_token",), "gpt": ("next_token", "gpt2"), "ntp": ("next_token",),
    # families under transformers' model_type
    "qwen2_5": ("qwen2",), "llama2": ("llama",), "llama3": ("llama",), "phi": ("phi3",), "phi4": ("phi3",),
    "deepseek_v2": ("deepseek_v3",), "deepseek": ("deepseek_v3",), "roberta": ("bert",),
    # how ranks share work
    "p2p": ("ring",), "a2a": ("ulysses",), "all_gather": ("allgather",), "a2a+p2p": ("hybrid",), "usp": ("hybrid",),
    "zbh1": ("zb-h1",), "zbv": ("zb-v",), "interleaved1f1b": ("interleaved",), "vpp": ("interleaved",),
    "virtual": ("interleaved",), "zero_bubble": ("zb-h1",), "zbvzerobubble": ("zb-v",), "dualpipev": ("zb-v",),
    # recomputation, packing
    "uniform": ("full",), "block": ("full",), "all": ("full",), "op": ("selective",), "off": ("none",), "no": ("none",),
    "greedy": ("best_fit",), "ffd": ("best_fit",), "bfd": ("best_fit",), "wrapped": ("concat",),
    "document_level": ("document",), "router_sigmoid": ("sigmoid",), "probs": ("score",),
}  # fmt: skip

BOOLEANS = dict.fromkeys(("yes", "y", "on", "1", "enable", "enabled"), "true")
BOOLEANS |= dict.fromkeys(("no", "n", "off", "0", "disable", "disabled"), "false")


def plain(word: str) -> str:
    """Returns a word without its case and signs: `ZB_H1` -> `zbh1`."""
    return re.sub(r"[-_ .]", "", word.casefold())


_NAMES = {plain(name): meant for name, meant in VALUE_NAMES.items()}


def nearest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the choice that was meant: spelt otherwise, known by another name, the beginning or
    end of one, or near it.
    """
    known = list(choices)
    by_plain = {plain(choice): choice for choice in reversed(known)}
    wanted = plain(word)
    if wanted in by_plain:
        return by_plain[wanted]
    for meant in _NAMES.get(wanted, ()):
        if meant in known:
            return meant
    close = get_close_matches(wanted, by_plain, n=1, cutoff=cutoff)
    return by_plain[close[0]] if close else None


def typo_of(word: str, choices: Iterable[str]) -> str | None:
    """Returns the first choice that is one edit away: two neighbours swapped, else a letter more,
    less or another.
    """
    close = [choice for choice in choices if _one_edit(word, choice)]
    return next((one for one in close if sorted(one) == sorted(word)), next(iter(close), None))


def _one_edit(a: str, b: str) -> bool:
    if a == b or abs(len(a) - len(b)) > 1:
        return False
    begin = 0
    while begin < min(len(a), len(b)) and a[begin] == b[begin]:
        begin += 1
    a, b = a[begin:], b[begin:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return max(len(a), len(b)) <= 1 or (len(a) == 2 and a == b[::-1])


def did_you_mean(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """Returns ` Did you mean 'x'?`, or nothing."""
    close = nearest(word, choices, cutoff)
    return f" Did you mean '{close}'?" if close is not None else ""
