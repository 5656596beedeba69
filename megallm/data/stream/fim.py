"""Fill in the middle: a document's text rearranged so that its middle comes last (Bavarian et al.,
arXiv 2207.14255).

PSM is `PRE prefix SUF suffix MID middle`, SPM is `PRE SUF suffix MID prefix middle` (their variant
2). The cuts fall between code points of the text, not between tokens, and hang on nothing but a
key, so whoever reads a document in an epoch reads the same. Nothing is ever left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megallm.base import rng
from megallm.base.errors import UsageError
from megallm.data.text.tokenizer import Tokenizer

PLAIN, PSM, SPM = "plain", "psm", "spm"
FORMS = (PLAIN, PSM, SPM)
KNOWN = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)
_REPLACEMENT = "\ufffd"  # what decoding makes of bytes that are no UTF-8


@dataclass(frozen=True)
class Sentinels:
    """Ids of the tokens that begin prefix, suffix and middle."""

    prefix: int
    suffix: int
    middle: int


def find_sentinels(
    tokenizer: Tokenizer, names: Sequence[str] | None, vocab_size: int | None
) -> Sentinels:
    """Returns ids of the given names (a number is an id), else of a triple this module knows.
    Errors: `UsageError`.
    """
    candidates = KNOWN if names is None else (tuple(names),)
    for triple in candidates:
        ids = [int(name) if name.isdecimal() else tokenizer.token_id(name) for name in triple]
        if len(ids) == 3 and all(one is not None for one in ids) and len(set(ids)) == 3:
            if vocab_size is not None and max(ids) >= vocab_size:
                raise UsageError(
                    f"data.fim.tokens has the id {max(ids)}, but model.vocab_size is {vocab_size}."
                )
            return Sentinels(*ids)
    raise UsageError(
        "data.fim.rate needs three different tokens for prefix, suffix and middle, and the "
        f"tokenizer does not have {' or '.join(str(triple) for triple in candidates)}. Name three "
        "of its tokens in data.fim.tokens, or train one with `megallm tokenizer train "
        "--special-tokens '<|fim_prefix|>' '<|fim_suffix|>' '<|fim_middle|>'`."
    )


def check_exact(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that does not give every text back, such as one that adds a space at the
    beginning.
    """
    for text in ("word", " word", "word ", "\n two  spaces\t", "é漢🙂"):
        if tokenizer.decode(tokenizer.encode(text)) != text:
            raise UsageError(
                "data.fim.rate needs a tokenizer that gives each part of a text back exactly; "
                f"this one turns {text!r} into {tokenizer.decode(tokenizer.encode(text))!r}. Set "
                "data.fim.rate=0, or use another."
            )


def choose_form(key: int, rate: float, spm_share: float) -> str:
    """Returns PLAIN with probability 1 - rate, else SPM with probability `spm_share`, else PSM."""
    first, second = rng.uniform(key, 0, 2).tolist()
    if first >= rate:
        return PLAIN
    return SPM if second < spm_share else PSM


def cuts(key: int, characters: int) -> tuple[int, int]:
    """Returns where the middle begins and ends: two of the characters + 1 places between
    characters, each equally likely.
    """
    first, second = (rng.uniform(key, 2, 2) * (characters + 1)).astype(np.int64).tolist()
    return min(first, second), max(first, second)


def rearrange(
    text: str, form: str, key: int, encode: Callable[[str], list[int]], sentinels: Sentinels
) -> list[int]:
    """Returns ids of the text in the given form (not PLAIN)."""
    begin, end = cuts(key, len(text))
    prefix, middle, suffix = (encode(part) for part in (text[:begin], text[begin:end], text[end:]))
    if form == PSM:
        return [sentinels.prefix, *prefix, sentinels.suffix, *suffix, sentinels.middle, *middle]
    return [sentinels.prefix, sentinels.suffix, *suffix, sentinels.middle, *prefix, *middle]


def restore(
    ids: Sequence[int], decode: Callable[[list[int]], str], sentinels: Sentinels
) -> tuple[str, str]:
    """Returns (form, original text) of what `rearrange` made; PSM with an empty prefix cannot be
    told from SPM, nor need be.
    """
    ids = list(ids)
    if not ids or ids[0] != sentinels.prefix:
        return PLAIN, decode(ids)
    suffix, middle = ids.index(sentinels.suffix), ids.index(sentinels.middle)
    after = decode(ids[suffix + 1 : middle])
    if suffix == 1:
        return SPM, decode(ids[middle + 1 :]) + after
    return PSM, decode(ids[1:suffix]) + decode(ids[middle + 1 :]) + after


class Rearranger:
    """Applies `rearrange` to tokens of a document: decodes, cuts, encodes; special tokens around it
    stay.
    """

    def __init__(self, tokenizer: Tokenizer, sentinels: Sentinels) -> None:
        check_exact(tokenizer)
        self.tokenizer, self.sentinels = tokenizer, sentinels
        self._special = tokenizer.specials | {tokenizer.eod}

    def __call__(self, tokens: np.ndarray, form: str, key: int) -> np.ndarray | None:
        """int64 [any], or None when the tokens are not a text (broken UTF-8, special tokens), read
        as it is then.
        """
        ids = tokens.tolist()
        ordinary = [place for place, token in enumerate(ids) if token not in self._special]
        begin, end = (ordinary[0], ordinary[-1] + 1) if ordinary else (0, 0)
        text = self.tokenizer.decode(ids[begin:end])
        if not text or _REPLACEMENT in text or len(ordinary) < end - begin:
            return None
        made = rearrange(text, form, key, self.tokenizer.encode, self.sentinels)
        return np.array([*ids[:begin], *made, *ids[end:]], np.int64)
