"""The policy of activation checkpointing: which activations of a block are recomputed in the
backward pass. Pure."""

from __future__ import annotations

BLOCK = "block"
# What of a block can be made again by itself, and the part that contains it.
PARTS = {"norm": None, "attention": None, "core": "attention", "mlp": None, "activation": "mlp"}


def recomputed_parts(
    mode: str, modules: tuple[str, ...], layers: int | None, place: int
) -> frozenset[str]:
    """What is made again of the block at `place` of its stage: nothing, some of PARTS, or the whole
    BLOCK.

    `mode` is none, selective (the `modules`) or full; only the first `layers` blocks are meant, all
    for None.
    """
    if mode == "none" or (layers is not None and place >= layers):
        return frozenset()
    return frozenset((BLOCK,)) if mode == "full" else frozenset(modules)
