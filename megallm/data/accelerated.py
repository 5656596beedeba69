"""gigatoken, some fifty times as fast as `tokenizers`, behind a test that both give the same ids. Optional.

Three things of it need care. It would take a special token written in a text for that token, so it is given a
definition without special tokens. Its cache of words grows without end, so it is made anew now and then. And it is
young, so it is used only where it agrees with `tokenizers` on hard strings and on the beginning of the real text.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from megallm.base.errors import UsageError
from megallm.data.tokenizer import FolderTokenizer

AUTO, FAST, PLAIN = "auto", "gigatoken", "tokenizers"
BACKENDS = (AUTO, FAST, PLAIN)
_RENEW_BYTES = 128 << 20  # of text, after which the cache of words is dropped
_PROBES = (
    "", " ", "  ", "\n", "\n\n \n", "\t\tx", "\r\n a\r\n", "\x00", "a\u00a0b", "\u200b\ufeff", "...",
    "don't we'LL I'd", "1234567890 3.14159 1e-9", "0x7fff", "naïve façade Ünïcödé", "e\u0301 o\u0308",
    "漢字かな交じり文", "한국어 띄어쓰기", "العربية ١٢٣", "हिन्दी देवनागरी", "ไทยไม่เว้นวรรค",
    "\U0001f642\U0001f469\u200d\U0001f467\U0001f3fd\ufe0f", "\U0001d518\U0010ffff",
    "if (x<y) { return a[i]++; }  // end", "    def f(self):\n        return  'a'\n", "<|endoftext|>",
    "a<|endoftext|>b </s><s> [INST] <pad>", "A" * 300, "ab " * 200,
)  # fmt: skip


class AcceleratedTokenizer(FolderTokenizer):
    """The same tokenizer with gigatoken doing `encode_joined`; made by `accelerate`."""

    def __init__(self, path: str, module: Any) -> None:
        super().__init__(path)
        self._module = module
        kept = [token for token in self._definition.get("added_tokens", []) if not token.get("special")]
        self._without_specials = json.dumps({**self._definition, "added_tokens": kept}, ensure_ascii=False)
        self._used = 0
        self._fast = module.Tokenizer.from_json(self._without_specials)

    def encode_joined(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts back to back, and how many each has. On the calling thread only."""
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        if self._used > _RENEW_BYTES:
            self._fast, self._used = self._module.Tokenizer.from_json(self._without_specials), 0
        self._used += sum(map(len, texts))
        found = self._fast.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(found.offsets.data)
        return np.asarray(found.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)


def accelerate(plain: FolderTokenizer, sample: Sequence[str]) -> AcceleratedTokenizer | str:
    """The fast form of a tokenizer, or the reason why there is none."""
    try:
        module = importlib.import_module("gigatoken")
    except ImportError:
        return "gigatoken is not installed (pip install 'megallm[data]')"
    try:
        fast = AcceleratedTokenizer(str(plain.path), module)
        difference = first_difference(plain, fast, [*_probes(plain), *sample])
    except Exception as error:  # boundary: whatever a compiled library raises for a definition it cannot use
        return f"gigatoken cannot use this tokenizer ({' '.join(str(error).split())[:200]})"
    return fast if difference is None else f"gigatoken splits {difference[:60]!r} otherwise"


def first_difference(plain: FolderTokenizer, fast: FolderTokenizer, texts: Sequence[str]) -> str | None:
    """The first text that the two turn into different ids."""
    ids, lengths = fast.encode_joined(texts)
    begins = np.cumsum(lengths) - lengths
    for text, begin, length in zip(texts, begins.tolist(), lengths.tolist(), strict=True):
        if ids[begin : begin + length].tolist() != plain.encode(text):
            return text
    return None


def choose(plain: Any, backend: str, sample: Sequence[str]) -> tuple[Any, str]:
    """(tokenizer to use, what it is) for a backend. Errors: `UsageError` when gigatoken must be and cannot."""
    if backend not in BACKENDS:
        raise UsageError(f"--backend {backend} is unknown; accepted: {', '.join(BACKENDS)}.")
    if not isinstance(plain, FolderTokenizer) or backend == PLAIN:
        return plain, PLAIN if isinstance(plain, FolderTokenizer) else plain.kind
    fast = accelerate(plain, sample)
    if isinstance(fast, AcceleratedTokenizer):
        return fast, FAST
    if backend == FAST:
        raise UsageError(f"--backend {FAST}: {fast}. Use --backend {AUTO}.")
    return plain, f"{PLAIN} ({fast})"


def _probes(plain: FolderTokenizer) -> list[str]:
    """Hard strings, and every special token written in a text."""
    specials = [str(token["content"]) for token in plain.added_tokens][:200]
    return [*_PROBES, *specials, *(f"x {special}y" for special in specials)]
