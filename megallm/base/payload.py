"""Values as bytes, for messages between ranks: JSON, with arrays of numpy in binary beside it.
Never pickle, which would run what it reads.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

_ARRAY = "\0array"  # key of what stands for an array in the text


def to_payload(value: Any) -> bytes:
    """Returns what JSON can hold, in which arrays of numbers may stand anywhere, as bytes; every
    bit of an array is kept. Errors: TypeError for anything else.
    """
    arrays: list[np.ndarray] = []

    def stand_in(other: Any) -> dict[str, int]:
        if not isinstance(other, np.ndarray) or other.dtype.kind not in "biuf":
            raise TypeError(f"A {type(other).__name__} cannot be sent: it is no array of numbers.")
        arrays.append(np.ascontiguousarray(other))
        return {_ARRAY: len(arrays) - 1}

    text = json.dumps(value, default=stand_in)
    shapes = [[each.dtype.str, *each.shape] for each in arrays]
    head = json.dumps([text, shapes]).encode() if arrays else text.encode()
    size = len(head).to_bytes(8, "little") if arrays else bytes(8)
    return b"".join((size, head, *(each.tobytes() for each in arrays)))


def from_payload(payload: bytes) -> Any:
    """Returns the value that `to_payload` was given; its arrays are read-only."""
    size = int.from_bytes(payload[:8], "little")
    if not size:
        return json.loads(payload[8:])
    text, shapes = json.loads(payload[8 : 8 + size])
    arrays, begin = [], 8 + size
    for dtype, *shape in shapes:
        made = np.frombuffer(payload, dtype, int(np.prod(shape)), begin).reshape(shape)
        arrays.append(made)
        begin += made.nbytes

    def put_back(found: dict[str, Any]) -> Any:
        return arrays[found[_ARRAY]] if _ARRAY in found else found

    return json.loads(text, object_hook=put_back)
