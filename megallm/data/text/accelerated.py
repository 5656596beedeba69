"""gigatoken, some fifty times as fast as `tokenizers`, wherever it gives the very same ids.
Optional.

The ids are those of `tokenizers`, always. The two split text by tables of other versions of
Unicode, so each code point is compared at its first sight (`SameSplits`), and a text that holds one
on which they differ goes to `tokenizers`; so does one that is not normalised, or in which an added
token is written. That both read the definition alike is tried once on hard strings, special tokens
and thousands of its own tokens; the verdict is kept for these versions. gigatoken's cache of words
grows without end, so it is made anew when it has become large.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import resource
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from megallm.base import files
from megallm.base.errors import CannotWrite, UsageError
from megallm.base.version import VERSION
from megallm.data.text.byte_level import BYTE_SYMBOLS
from megallm.data.text.code_points import SameSplits
from megallm.data.text.definition import dumps, steps_of
from megallm.data.text.tokenizer import BYTES, FolderTokenizer

AUTO, FAST, PLAIN = "auto", "gigatoken", "tokenizers"
BACKENDS = (AUTO, FAST, PLAIN)
CACHE = "~/.cache/megallm/gigatoken"  # verdicts of `first_difference`
_CHECK = 1  # changes with what is compared
_LOOK_BYTES = 16 << 20  # of text, after which the size of the process is looked at
_GROWN_BYTES = (
    192 << 20
)  # that a process may have grown by before the cache of words is dropped: most text never does
_LONG = 512  # characters of a text, on average
_OWN_TOKENS = 4096  # of the vocabulary, whose texts are compared
_PROBES = (
    "", " ", "  ", "\n", "\n\n \n", "\t\tx", "\r\n a\r\n", "\x00", "a\u00a0b", "\u200b\ufeff", "...",
    "don't we'LL I'd", "1234567890 3.14159 1e-9", "0x7fff", "naïve façade Ünïcödé", "e\u0301 o\u0308",
    "漢字かな交じり文", "한국어 띄어쓰기", "العربية ١٢٣", "हिन्दी देवनागरी", "ไทยไม่เว้นวรรค",
    "\U0001f642\U0001f469\u200d\U0001f467\U0001f3fd\ufe0f", "\U0001d518\U0010ffff",
    "if (x<y) { return a[i]++; }  // end", "    def f(self):\n        return  'a'\n", "<|endoftext|>",
    "a<|endoftext|>b </s><s> [INST] <pad>", "A" * 300, "ab " * 200,
)  # fmt: skip


class AcceleratedTokenizer(FolderTokenizer):
    """The same tokenizer with gigatoken doing `encode_joined`; made by `accelerate`.

    by_tokenizers: texts that were left to `tokenizers` so far.
    """

    def __init__(self, plain: FolderTokenizer, module: Any) -> None:
        vars(self).update(vars(plain))
        self._module, self._unseen, self.by_tokenizers = module, 0, 0
        self._splits = SameSplits(self._definition, module)
        self._normal_form = _normal_form(self._definition)
        kept = [token for token in self.added_tokens if not token.get("special")]
        # Found wherever they are written, however `tokenizers` would look for them: a text that
        # holds one goes there.
        bare = [
            token | dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
            for token in kept
        ]
        self._bare = dumps({**self._definition, "added_tokens": bare, "post_processor": None})
        self._added = np.array(sorted({token["id"] for token in kept}), np.int64)
        self._renew()

    def _renew(self) -> None:
        self._fast = self._module.Tokenizer.from_json(self._bare)
        self._small = _resident_bytes()

    def encode_joined(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids of all texts back to back, and how many each has. On the calling thread only.
        """
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        ids, offsets = self.fast_ids(texts)
        left = self._left(texts, ids, offsets)
        if not left:
            return ids, np.diff(offsets)
        self.by_tokenizers += len(left)
        theirs, counts = super().encode_joined([texts[i] for i in left])
        ends, lengths = np.cumsum(counts), np.diff(offsets)
        parts, at = [], 0
        for i, count, end in zip(left, counts.tolist(), ends.tolist(), strict=True):
            parts += [ids[at : offsets[i]], theirs[end - count : end].astype(ids.dtype)]
            at = offsets[i + 1]
        lengths[left] = counts
        return np.concatenate([*parts, ids[at:]]), lengths

    def fast_ids(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids of all texts as gigatoken makes them, and where each begins [texts + 1]."""
        if self._unseen > _LOOK_BYTES:
            self._unseen = 0
            if _resident_bytes() - self._small > _GROWN_BYTES:
                self._renew()
        characters = sum(map(len, texts))
        self._unseen += characters
        if characters >= _LONG * len(
            texts
        ):  # one by one as fast, and without the import of awkward, a fifth of a second
            found = [self._fast.encode(text) for text in texts]
            offsets = np.zeros(len(texts) + 1, np.int64)
            np.cumsum([len(one) for one in found], out=offsets[1:])
            return np.concatenate(found), offsets
        found = self._fast.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(found.offsets.data)
        return np.asarray(found.content.data)[offsets[0] : offsets[-1]], offsets - offsets[0]

    def _left(self, texts: Sequence[str], ids: np.ndarray, offsets: np.ndarray) -> list[int]:
        """Returns the texts, by number, whose ids must be made by `tokenizers`."""
        left = set(self._splits.unlike(texts))
        if self._normal_form is not None:
            form = self._normal_form
            left.update(
                i
                for i, text in enumerate(texts)
                if not text.isascii() and not unicodedata.is_normalized(form, text)
            )
        if self._added.size:
            places = np.flatnonzero(np.isin(ids, self._added))
            left.update((np.searchsorted(offsets, places, side="right") - 1).tolist())
        return sorted(left)


def accelerate(plain: FolderTokenizer) -> AcceleratedTokenizer | str:
    """Returns the fast form of a tokenizer, or the reason why there is none."""
    try:
        module = importlib.import_module("gigatoken")
    except ImportError:
        return "gigatoken is not installed (pip install 'megallm[data]')"
    reason = unprovable(plain.definition)
    if reason:
        return f"gigatoken is not compared on {reason}"
    try:
        fast = AcceleratedTokenizer(plain, module)
        difference = _known_difference(plain, fast)
    except Exception as error:  # boundary: whatever a compiled library raises for a definition
        plain.check()
        return f"gigatoken cannot use this tokenizer ({' '.join(str(error).split())[:200]})"
    fast.by_tokenizers = 0
    return fast if difference is None else f"gigatoken splits {difference[:60]!r} otherwise"


def unprovable(definition: dict[str, Any]) -> str:
    """Returns what of a definition the comparison of code points says nothing about; empty when
    there is nothing.
    """
    model, normalizer = definition.get("model") or {}, definition.get("normalizer")
    if model.get("type", "BPE") != "BPE" or model.get("dropout"):
        return "this kind of model"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "subword prefixes or suffixes"
    vocab = model.get("vocab")
    whole = (
        [f"<0x{byte:02X}>" for byte in range(256)] if model.get("byte_fallback") else BYTE_SYMBOLS
    )
    if not isinstance(vocab, dict) or not all(symbol in vocab for symbol in whole):
        return "a vocabulary that lacks bytes"
    kinds = [step.get("type") for step in steps_of(normalizer)]
    if not set(kinds) <= {"NFC", "Prepend", "Replace"} or ("NFC" in kinds and len(kinds) > 1):
        return f"the normaliser {', '.join(map(str, kinds))}"
    written = [token for token in definition.get("added_tokens") or [] if not token.get("special")]
    if kinds not in ([], ["NFC"]) and written:
        return f"added tokens behind the normaliser {', '.join(map(str, kinds))}"
    form = _normal_form(definition)
    if form and not all(unicodedata.is_normalized(form, token["content"]) for token in written):
        return "added tokens that are not normalised"
    return ""


def _resident_bytes() -> int:
    """Memory that this process has now."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _normal_form(definition: dict[str, Any]) -> str | None:
    kinds = [step.get("type") for step in steps_of(definition.get("normalizer"))]
    return "NFC" if "NFC" in kinds else None


def _known_difference(plain: FolderTokenizer, fast: AcceleratedTokenizer) -> str | None:
    """`first_difference` on the probes, kept in a file for this definition and these versions of
    the libraries.
    """
    key = json.dumps([_CHECK, plain.digest, versions()])
    path = None
    with suppress(RuntimeError):  # nobody's home is known
        path = (
            Path(CACHE).expanduser()
            / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.json"
        )
    if path is not None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["of"] == json.loads(key):
                plain.fingerprint = fast.fingerprint = str(kept["fingerprint"])
                return kept["difference"]
    found = first_difference(plain, fast, _probes(plain))
    if path is not None:
        with suppress(OSError, CannotWrite):
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = {"of": json.loads(key), "fingerprint": plain.fingerprint, "difference": found}
            files.atomic_write_json(path, kept)
    return found


def first_difference(
    plain: FolderTokenizer, fast: AcceleratedTokenizer, texts: Sequence[str]
) -> str | None:
    """Returns the first text that the two turn into different ids."""
    ids, lengths = fast.encode_joined(texts)
    begins = np.cumsum(lengths) - lengths
    for text, begin, length in zip(texts, begins.tolist(), lengths.tolist(), strict=True):
        if ids[begin : begin + length].tolist() != plain.encode(text):
            return text
    return None


def choose_tokenizer(plain: Any, backend: str) -> tuple[Any, str]:
    """Returns (tokenizer to use, what it is) for a backend. Errors: `UsageError` when gigatoken
    must be and cannot.
    """
    if backend not in BACKENDS:
        raise UsageError(f"--backend {backend} is unknown; accepted: {', '.join(BACKENDS)}.")
    if not isinstance(plain, FolderTokenizer) or backend == PLAIN:
        return plain, PLAIN if isinstance(plain, FolderTokenizer) else plain.kind
    fast = accelerate(plain)
    if isinstance(fast, AcceleratedTokenizer):
        return fast, FAST
    if backend == FAST:
        raise UsageError(f"--backend {FAST}: {fast}. Use --backend {AUTO}.")
    return plain, f"{PLAIN} ({fast})"


def versions() -> dict[str, str]:
    """Returns versions of the two libraries, by their names."""
    return {name: metadata.version(name) for name in (FAST, PLAIN)}


def libraries(encoder: Any, backend: str) -> list[str]:
    """Returns "NAME VERSION" of what makes the ids: of gigatoken also the library it was compared
    with.
    """
    if encoder.kind == BYTES:
        return [f"megallm {VERSION}"]
    names = [PLAIN] if isinstance(encoder, FolderTokenizer) else [encoder.kind]
    return [
        f"{name} {metadata.version(name)}"
        for name in ([FAST, *names] if backend == FAST else names)
    ]


def _probes(plain: FolderTokenizer) -> list[str]:
    """Hard strings, every special token written in a text, and texts of tokens from all over the
    vocabulary.
    """
    specials = [str(token["content"]) for token in plain.added_tokens][:200]
    pieces = plain.pieces()
    ids = range(0, len(pieces), max(1, len(pieces) // _OWN_TOKENS))
    own = [plain.decode([i]) for i in ids if pieces[i]]
    lines = ["".join(own[at : at + 16]) for at in range(0, len(own), 16)]
    return [*_PROBES, *specials, *(f"x {special}y" for special in specials), *lines]
