"""Rows of the layout oracle for update rules, and their negative controls, as data. No torch."""

from __future__ import annotations

from typing import Any

from megallm.oracle.rows import Written, row


def _row(name: str, rule: str, layout: str = "", model: str = "llama", **rest: Any) -> Written:
    return row(f"{rule}-{name}", layout, model, rule=rule, **rest)


UNEVEN = {"ffn_hidden_size": 27}  # tensor-parallel ranks hold matrices of different sizes
RULE_ROWS: tuple[Written, ...] = (
    _row("tp2", "muon", "tp=2", "biased"),
    _row("tp2-uneven-ffn", "muon", "tp=2", overrides=UNEVEN),
    _row("tp4-sp-two-kv", "muon", "tp=4,sp=1"),
    _row("zero1-dp2", "muon", "dp=2,zero=1", micros=2),
    _row("zero1-hybrid-dp4", "muon", "dp=4,zero=1", "tied", shard_size=2),
    _row("zero2-dp2-tp2", "muon", "dp=2,tp=2,zero=2", micros=2, overrides=UNEVEN),
    _row("zero3-dp2", "muon", "dp=2,zero=3", "tied", micros=2, recompute="full"),
    _row("zero3-dp3-cp2", "muon", "dp=3,cp=2,zero=3"),
    _row("pp2-tied", "muon", "pp=2", "tied", micros=3),
    _row("zero1-dp2-ep2", "muon", "dp=2,ep=2,zero=1", "moe-deepseek", micros=2),
    _row("zero3-dp4-ep2", "muon", "dp=4,ep=2,zero=3", "moe"),
    _row("tp2-ep2-mla-mtp", "muon", "tp=2,ep=2", "moe-mla-mtp"),
    _row("tp2-fp32", "muon", "tp=2", precision="fp32"),  # what runs take, with no float64 in it
    _row("single", "adafactor", clip=0.0),
    _row("tp2", "adafactor", "tp=2", "biased"),
    _row("tp4-sp-two-kv", "adafactor", "tp=4,sp=1", "qwen2"),
    _row("zero1-dp2", "adafactor", "dp=2,zero=1", micros=2),
    _row("zero2-dp2-tp2", "adafactor", "dp=2,tp=2,zero=2", "three-groups", micros=2),
    _row("zero3-dp3-tied-pp2", "adafactor", "dp=3,pp=2,zero=3", "tied", micros=2),
    _row("zero1-dp4-tp2-ep4", "adafactor", "dp=4,tp=2,ep=4,zero=1", "moe-deepseek"),
    _row("zero1-dp2-tp2", "sgd", "dp=2,tp=2,zero=1", "biased", micros=2),
    _row("zero2-dp2", "adagrad", "dp=2,zero=2", micros=2),
    _row("tp2-sp", "rmsprop", "tp=2,sp=1", "gpt2"),
    _row("zero1-dp3-tied-pp2", "adam", "dp=3,pp=2,zero=1", "tied", micros=2),
    _row("zero3-dp2-tp2", "lion", "dp=2,tp=2,zero=3", micros=2),
)
# Rules for random rows: a sign, as in Lion, makes a whole step of the noise in a gradient that is
# zero.
SMOOTH_RULES = ("adam", "sgd", "adagrad", "rmsprop", "adafactor", "muon")
RULE_CONTROLS: dict[str, str] = {"muon.matrices": "muon-tp2", "adafactor.sums": "adafactor-tp2"}
