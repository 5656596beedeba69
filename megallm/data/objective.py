"""Training objectives of bidirectional models: tokens of a text are masked and the model predicts
them (masked language modelling, masked diffusion). Pure.

`TokenMasker` masks tokens by BERT's rule or by that of masked diffusion (`masking`). What it masks
depends on (seed, which text, epoch) alone, so layout, batch and resume change nothing, and the same
text loses other tokens in its next epoch. Each document in a packed row is a text of its own;
padding is a document too, so that nothing attends to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megallm.base import rng
from megallm.base.errors import DataError, UsageError
from megallm.data.masking import MaskRule, diffuse_tokens, mask_tokens, word_starts_of
from megallm.data.text.tokenizer import ByteTokenizer, FolderTokenizer, Tokenizer

NEXT_TOKEN, MLM, DIFFUSION = "next_token", "mlm", "diffusion"
KNOWN = ("[MASK]", "<mask>", "<|mask|>", "<|mdm_mask|>")  # names of mask tokens

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class TokenMasker:
    """Masks tokens of a text. `begins` bool [V] says which tokens begin a word: then whole words
    are masked.
    """

    kind: str
    rule: MaskRule
    seed: int
    begins: np.ndarray | None = None

    def __call__(self, tokens: np.ndarray, *sample: str | int) -> Arrays:
        """{"tokens", "labels": int64 [T], "mask": bool [T]} of the text called `sample`, for
        diffusion also "weight".

        The mask is True where the loss counts: at the tokens to predict, or for diffusion at all
        that could have been masked; "weight" float32 [T] is 1 / t at those that are.
        """
        key = rng.key_of(self.seed, self.kind, *sample)
        if self.kind == MLM:
            return mask_tokens(
                tokens, self.rule, key, None if self.begins is None else self._word_starts(tokens)
            )
        keep = np.isin(tokens, self.rule.special)
        made = diffuse_tokens(tokens, key, self.rule.mask_token, keep)
        return made | {"mask": ~keep, "weight": made["weight"].astype(np.float32)}

    def _word_starts(self, tokens: np.ndarray) -> np.ndarray:
        known = tokens < len(self.begins)
        starts = np.where(known, self.begins[np.where(known, tokens, 0)], True)
        starts[:1] = True
        return starts


# From a tokenizer


def mask_token_of(tokenizer: Tokenizer | None, name: str | None, vocab_size: int) -> int:
    """Returns the id of the mask token: given by name or id, else one of the `KNOWN` names. Errors:
    `UsageError`.
    """
    for one in KNOWN if name is None else (name,):
        token = (
            int(one) if one.isdecimal() else None if tokenizer is None else tokenizer.token_id(one)
        )
        if token is None:
            continue
        if token >= vocab_size:
            raise UsageError(
                f"data.masking.token is the id {token}, but model.vocab_size is {vocab_size}: give "
                f"the model at least {token + 1} rows."
            )
        return token
    free = (
        ""
        if tokenizer is None
        else f" A free id does too: data.masking.token={tokenizer.vocab_size} and model.vocab_size="
    )
    free += "" if tokenizer is None else f"{tokenizer.vocab_size + 1}."
    raise UsageError(
        "Hiding tokens needs a mask token, and the tokenizer has no "
        f"{' or '.join(KNOWN if name is None else [name])}: name one of its tokens or an id in "
        f"data.masking.token.{free}"
    )


def special_tokens(tokenizer: Tokenizer | None) -> set[int]:
    """Returns ids that are never masked nor put in another's place: the end of a document and the
    tokenizer's specials.
    """
    if tokenizer is None:
        return set()
    try:
        return tokenizer.specials | {tokenizer.eod}
    except DataError:  # a tokenizer without an end of documents, such as BERT's
        return tokenizer.specials


def word_start_table(tokenizer: Tokenizer | None) -> np.ndarray:
    """Returns bool [V]: which tokens begin a word. Errors: `UsageError` for a tokenizer that does
    not show its pieces.
    """
    if isinstance(tokenizer, ByteTokenizer):
        pieces = [chr(byte) for byte in range(256)] + [" "]
        return np.array([piece.isspace() for piece in pieces])
    if not isinstance(tokenizer, FolderTokenizer):
        raise UsageError(
            "data.masking.whole_word needs a tokenizer.json, which says where words begin: leave "
            "it out."
        )
    pieces = tokenizer.pieces()
    for boundary in ("##", "Ġ", "▁"):
        if any(piece.startswith(boundary) and piece != boundary for piece in pieces):
            return word_starts_of(pieces, boundary)
    raise UsageError(
        "data.masking.whole_word cannot tell where words begin: no token of the tokenizer starts "
        "with ##, Ġ or ▁."
    )
