"""Folding: what looks alike becomes alike, so that every step that compares texts sees through how
Unicode wrote them.

Compatibility forms (full width, ligatures, mathematical letters), case, accents and other marks,
invisible characters and letters drawn like Latin ones are made one, character by character. The
extension does the same work with the same results (csrc/index/documents.cpp).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from megallm.base import extension

# Bits of a character's class. SOLO: a word by itself; STOP: ends a sentence; SYMBOL: # and an
# ellipsis.
WORD, LETTER, SPACE, SOLO, DIGIT, STOP, SYMBOL = 1, 2, 4, 8, 16, 32, 64
_SOLO_RANGES = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x31F0, 0x31FF),
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip


@cache
def classes() -> np.ndarray:
    """Returns the class of every code point, uint8 [0x110000]."""
    table = np.zeros(0x110000, np.uint8)
    for code in (*range(0x20000), *range(0xE0000, 0xE01F0)):
        kind = unicodedata.category(chr(code))
        if kind[0] == "L":
            table[code] = WORD | LETTER
        elif kind[0] == "M":
            table[code] = WORD
        elif kind[0] == "N":
            table[code] = WORD | DIGIT
        elif kind[0] == "Z" or code in (9, 10, 11, 12, 13, 28, 29, 30, 31, 0x85):
            table[code] = SPACE
    table[0x20000:0x323B0] = WORD | LETTER  # Han; the other planes hold no text
    table[ord("_")] = WORD
    table[[ord(char) for char in ".!?。！？।؟"]] |= STOP
    table[[ord(char) for char in "#…"]] |= SYMBOL
    for low, high in _SOLO_RANGES:
        part = table[low : high + 1]
        part[(part & WORD) > 0] |= SOLO
    return table


# Letters that are drawn like Latin ones (of a capital and its small letter the look of the capital
# decides), Latin letters with a stroke, and apostrophes that Unicode counts as letters.
_ALIKE = dict(
    zip(
        "авекмнорстухіјѕһԁԛԝαβεζηικμνορτυχłøđħŧıɡᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢʼʻꞌ",
        "abekmhopctyxijshdqwabezhikmnoptyxlodhtigabcdefghijklmnoprstuvwyz'''",
        strict=True,
    )
)
# Not taken apart: the ellipsis, trade marks (Foo™ is no "footm"), and jamo that stand for
# themselves.
_WHOLE = {0x2026, 0x2120, 0x2122, *range(0x3131, 0x318F), *range(0xAC00, 0xD7A4)}
_JAMO = (range(0x1100, 0x1200), range(0xA960, 0xA980), range(0xD7B0, 0xD800))
_INVISIBLE = {
    0x034F, 0x0640, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), 0x3164, 0xFFA0,
    *range(0xFE00, 0xFE10),
    *range(0xE0000, 0xE0200),
}  # fmt: skip
_NOT = {0x0338, 0x20D2}  # the stroke of ≠ and ∉: a mark that changes what is said
# Where characters change: not in Han, Yi, private use, Tangut.
_FOLDED_RANGES = (
    range(0x80, 0x3400), range(0xA490, 0xAC00), range(0xD7B0, 0xD800), range(0xF900, 0x17000),
    range(0x18D00, 0x20000),
    range(0x2F800, 0x2FA20), range(0xE0000, 0xE0200),
)  # fmt: skip


def _drops(char: str) -> bool:
    """Returns whether a character of a decomposed text is left out. All marks that normalisation
    may reorder are, so that every character can be folded by itself."""
    code = ord(char)
    if code in _NOT or code < 0x80:
        return False
    return (
        code in _INVISIBLE or unicodedata.combining(char) > 0 or unicodedata.category(char) == "Cf"
    )


def _folds() -> dict[int, str]:
    """Returns what each character becomes, of those that change."""
    codes = [code for part in _FOLDED_RANGES for code in part if code not in _WHOLE]
    lines = unicodedata.normalize("NFKD", "\n".join(map(chr, codes))).casefold()
    lines = unicodedata.normalize("NFKD", lines)
    table: dict[int, str | None] = {ord(char): None for char in set(lines) if _drops(char)}
    lines = lines.translate(table | {ord(char): like for char, like in _ALIKE.items()})
    changed = {
        code: to for code, to in zip(codes, lines.split("\n"), strict=True) if to != chr(code)
    }
    return {**changed, **{code: chr(code + 32) for code in range(ord("A"), ord("Z") + 1)}}


@cache
def folding() -> tuple[np.ndarray, np.ndarray]:
    """Returns what every code point becomes: uint32 [0x110000] with the new code in bits 0 to 20
    and its class from bit 24 on, and uint32 [n] with the longer ones. Bit 23 says that the code is
    a place in the second array, where the number of characters (perhaps none) stands before them;
    bit 22 says that it is a part of a Hangul syllable."""
    kinds = classes().astype(np.uint32) << np.uint32(24)
    table = np.arange(0x110000, dtype=np.uint32) | kinds
    folds = _folds()
    single = {code: to for code, to in folds.items() if len(to) == 1}
    letters = code_points("".join(single.values()))
    table[list(single)] = letters | kinds[letters]
    longer: list[int] = []
    for code, to in folds.items():
        if len(to) != 1:
            table[code] = len(longer) | 1 << 23
            longer += [len(to), *(ord(char) | int(kinds[ord(char)]) for char in to)]
    for part in _JAMO:
        table[part.start : part.stop] |= np.uint32(1 << 22)
    return table, np.array(longer, np.uint32)


@cache
def _native_folding(native: ModuleType) -> Any:
    return native.Folding(*folding())


def _fold(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """(code points uint32, classes uint8, where each text begins int64 [texts + 1], whether
    syllables want to be composed) of texts with a newline after each."""
    native = extension.index()
    if native is not None:
        return _native_folding(native).fold(list(texts))
    table, longer = folding()
    packed = table[code_points("\n".join(texts) + "\n" if texts else "")]
    bounds = np.cumsum([0, *(len(text) + 1 for text in texts)])
    jamo = bool((packed >> np.uint32(22) & 1).any())
    places = np.flatnonzero(packed >> np.uint32(23) & 1)
    if len(places):
        index = (packed[places] & np.uint32(0x1FFFFF)).astype(np.int64)
        sizes = np.ones(len(packed), np.int64)
        sizes[places] = longer[index]
        ends = np.cumsum(sizes)
        packed = np.repeat(packed, sizes)
        own = sizes[places]
        shift = np.arange(own.sum()) - np.repeat(np.cumsum(own) - own, own)
        packed[np.repeat(ends[places] - own, own) + shift] = longer[
            np.repeat(index + 1, own) + shift
        ]
        bounds = np.append(0, ends)[bounds]
    return packed & np.uint32(0x1FFFFF), (packed >> np.uint32(24)).astype(np.uint8), bounds, jamo


def fold(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the folded code points of texts, their classes, and where each text begins."""
    *found, jamo = _fold(texts)
    if jamo:  # Hangul is compared by syllables, however it is written
        *found, _ = _fold([unicodedata.normalize("NFC", text) for text in texts])
    return found[0], found[1], found[2]


def comparable(text: str) -> bytes:
    """Returns UTF-8 of a text folded and with runs of white space made one blank: equal for texts
    that compare alike.
    """
    native = extension.index()
    if native is None:
        same = fold([text])[0].tobytes().decode("utf-32-le", "surrogatepass")
        return " ".join(same.split()).encode("utf-8", "surrogatepass")
    form = _native_folding(native).comparable
    out, jamo = form(text)
    return form(unicodedata.normalize("NFC", text))[0] if jamo else out


def code_points(text: str) -> np.ndarray:
    """Returns uint32 [len(text)]; a lone surrogate is allowed."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
