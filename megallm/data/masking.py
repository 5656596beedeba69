"""Training targets other than the next token: masked language modelling, masked diffusion. Pure.

Labels of several tokens ahead follow from those of the next one (`losses.language`).

Each function takes what a row holds and a key and returns arrays; which rank or worker calls it
changes nothing. They are collators for the heads that need them: the arrays are named as a batch
names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megallm.base import rng
from megallm.base.errors import UsageError


@dataclass(frozen=True)
class MaskRule:
    """BERT's rule (Devlin et al., arXiv 1810.04805): `rate` of the tokens are predicted; of these
    `masked` become the mask token, `random` a random token of the vocabulary, and the rest stay.
    Tokens in `special` never."""

    mask_token: int
    vocab_size: int
    special: tuple[int, ...] = ()
    rate: float = 0.15
    masked: float = 0.8
    random: float = 0.1

    def __post_init__(self) -> None:
        shares = (self.rate, self.masked, self.random)
        if not all(0 <= share <= 1 for share in shares) or self.masked + self.random > 1:
            raise UsageError(
                f"Masking needs shares between 0 and 1, masked + random <= 1; got {shares}."
            )
        if len(set(range(min(self.vocab_size, len(self.special) + 1))) - set(self.special)) < 1:
            raise UsageError("Masking needs at least one token that is not special.")


def mask_tokens(
    tokens: np.ndarray, rule: MaskRule, key: int, word_starts: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Returns {"tokens", "labels": int64 [T], "mask": bool [T]}: what the model sees, what stood
    there, and what is predicted.

    word_starts bool [T]: the units are whole words (a word begins where it is True) instead of
    tokens; all tokens of a chosen word are predicted, each treated by the 80/10/10 rule on its own,
    as in BERT's whole-word form. With another key (say of the epoch) other tokens are chosen:
    masking is dynamic (RoBERTa).
    """
    tokens = np.asarray(tokens, np.int64)
    free = ~np.isin(tokens, rule.special)
    unit = (
        np.arange(len(tokens)) if word_starts is None else np.cumsum(np.asarray(word_starts, bool))
    )
    chosen = rng.uniform(rng.key_of(key, "choose"), 0, len(tokens) + 1)[unit] < rule.rate
    chosen &= free
    fate = rng.uniform(rng.key_of(key, "fate"), 0, len(tokens))
    seen = np.where(chosen & (fate < rule.masked), rule.mask_token, tokens)
    swapped = chosen & (fate >= rule.masked) & (fate < rule.masked + rule.random)
    if swapped.any():
        ordinary = _ordinary(rule.vocab_size, rule.special)
        pick = rng.uniform(rng.key_of(key, "token"), 0, len(tokens)) * len(ordinary)
        seen[swapped] = ordinary[pick.astype(np.int64)[swapped]]
    return {"tokens": seen, "labels": tokens, "mask": chosen}


@lru_cache(maxsize=8)
def _ordinary(vocab_size: int, special: tuple[int, ...]) -> np.ndarray:
    """Returns the tokens that may stand in another's place."""
    return np.setdiff1d(np.arange(vocab_size), np.asarray(special, np.int64))


def word_starts_of(pieces: Sequence[str], boundary: str = "Ġ") -> np.ndarray:
    """Returns bool [T]: where words begin among written tokens: `boundary` first (Ġ or ▁), or for
    "##" where it is missing.
    """
    if boundary == "##":
        starts = np.array([not piece.startswith("##") for piece in pieces], bool)
    else:
        starts = np.array([piece.startswith(boundary) for piece in pieces], bool)
    starts[:1] = True
    return starts


def diffuse_tokens(
    tokens: np.ndarray,
    key: int,
    mask_token: int,
    keep: np.ndarray | None = None,
    least: float = 1e-3,
) -> dict[str, np.ndarray]:
    """Corrupt one row for masked diffusion (LLaDA, Nie et al., arXiv 2502.09992).

    One level t is drawn uniformly from [least, 1) for the row, each token becomes the mask token
    with probability t, and the loss of a masked token weighs 1/t. keep bool [T]: tokens that are
    never masked (a prompt, padding). Returns {"tokens", "labels": int64 [T], "mask": bool [T],
    "weight": float64 [T]}.
    """
    tokens = np.asarray(tokens, np.int64)
    level = least + (1 - least) * float(rng.uniform(rng.key_of(key, "level"), 0, 1)[0])
    masked = rng.uniform(rng.key_of(key, "mask"), 0, len(tokens)) < level
    if keep is not None:
        masked &= ~np.asarray(keep, bool)
    return {
        "tokens": np.where(masked, mask_token, tokens), "labels": tokens, "mask": masked,
        "weight": np.where(masked, 1 / level, 0.0),
    }  # fmt: skip
