"""Values as bytes: JSON with arrays in binary."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megallm.base.payload import from_payload, to_payload


def test_every_bit_of_an_array_comes_back():
    draw = np.random.default_rng(0)
    odd = np.array([0.1, -0.0, np.nan, -np.inf, 5e-324, np.nextafter(1, 2)])
    value = {"a": [odd, draw.integers(-(2**62), 2**62, 7)]}
    value |= {"b": [{"c": np.zeros((0, 3), np.float32)}, "x\0array", None]}
    value |= {"d": np.array([[True, False]]), "e": draw.random((2, 3)).T}
    found = from_payload(to_payload(value))
    assert found["b"][1:] == value["b"][1:]
    pairs = [(found["a"][0], odd), (found["a"][1], value["a"][1]), (found["b"][0]["c"], value["b"][0]["c"]),
             (found["d"], value["d"]), (found["e"], value["e"])]  # fmt: skip
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()


def test_without_arrays_it_is_json_and_nothing_else_is_taken():
    value = [1, 2.5, "täxt", None, {"a": [True]}]
    assert from_payload(to_payload(value)) == value and json.loads(to_payload(value)[8:]) == value
    for wrong in (object(), {1, 2}, np.array(["a"]), np.array([None])):
        with pytest.raises(TypeError, match="cannot be sent"):
            to_payload([wrong])


def test_numbers_take_their_own_size():
    numbers = np.random.default_rng(1).normal(size=10_000)
    assert len(to_payload([numbers])) < 8 * 10_000 + 100 < len(json.dumps([numbers.tolist()])) / 2
