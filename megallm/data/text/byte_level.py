"""The 256 characters that stand for bytes in a byte-level BPE (Radford et al., GPT-2, 2019).
Pure.
"""

from __future__ import annotations

_PRINTED = {*range(33, 127), *range(161, 173), *range(174, 256)}


def _symbols() -> list[str]:
    hidden = [byte for byte in range(256) if byte not in _PRINTED]
    return [chr(byte) if byte in _PRINTED else chr(256 + hidden.index(byte)) for byte in range(256)]


BYTE_SYMBOLS = _symbols()  # by byte
