"""Rows of the layout oracle whose loss reads more of the head than log-probabilities, as data. No
torch.

Their loss is that of `objectives.Tempered`: log-probabilities and entropies at a temperature, both
with gradients, and whether the label is the likeliest token. Only tokens that count reach the
vocabulary: masks leave different numbers of them on cp ranks, none on a data rank, none in a
microbatch, and one single token everywhere.
"""

from __future__ import annotations

from typing import Any

from megallm.oracle.rows import Written, row

_FUSED: dict[str, Any] = {"fused_head": "on", "small_pieces": True}


def _row(name: str, layout: str = "", model: str = "llama", **rest: Any) -> Written:
    return row(f"tempered-{name}", layout, model, loss="tempered", **rest)


OUTPUT_ROWS: tuple[Written, ...] = (
    _row("single"),
    _row("single-fused-tied", "", "tied", mask="one", **_FUSED),
    _row("tp2", "tp=2"),
    # So few entries that labels are the likeliest ones, on either rank.
    _row("tp2-few-entries", "tp=2", seq_len=16, overrides={"vocab_size": 3}),
    _row("tp4-two-kv-fused", "tp=4", **_FUSED),
    _row("tp4-two-kv-sp-full", "tp=4,sp=1", recompute="full"),
    _row("cp2-ring-fused", "cp=2", **_FUSED),
    _row("cp2-tp2-sp-ulysses-packed", "cp=2,tp=2,sp=1,cp_kind=ulysses", packed=True, micro_batch=1),
    _row("packed-fused-one-token", packed=True, micro_batch=1, micros=2, mask="one", **_FUSED),
    _row("dp2-zero1-masked-rank", "dp=2,zero=1", micros=2, mask="rank"),
    _row("dp2-zero2-masked-rank-fused", "dp=2,zero=2", "tied", micros=2, mask="rank", **_FUSED),
    _row("dp2-zero3-masked-micro-fused", "dp=2,zero=3", micros=2, mask="micro", **_FUSED),
    _row("dp2-zero3-tp2-sp-one-token", "dp=2,tp=2,sp=1,zero=3", "tied", mask="one"),
    _row("ep2-masked-rank", "dp=2,ep=2", "moe", micros=2, mask="rank"),
    _row("interleaved", "pp=2,schedule=interleaved", micros=4, overrides={"num_layers": 4}),
    _row("zb-h1-tied-tp2-fused", "pp=2,tp=2,schedule=zb-h1", "tied", micros=3, **_FUSED),
    _row(
        "zb-v-full-masked-micro",
        "pp=2,dp=2,schedule=zb-v",
        micros=3,
        mask="micro",
        recompute="full",
        overrides={"num_layers": 4},
    ),
)

OUTPUT_CONTROLS = {"vocab.entropy": "tempered-tp2", "vocab.best": "tempered-tp2-few-entries"}
