"""manifest.json is untrusted: each lie is found, and so is each flipped bit."""

import json

import pytest

from megallm.base.errors import CheckpointError
from megallm.checkpoint.manifest import Manifest, decode, digest

SHARD = "weights-00000.safetensors"
ZERO = "0" * 32


def content(**changes):
    piece = {"file": SHARD, "offset": 80, "box_offset": [0, 0], "box_shape": [2, 4], "xxh3_128": ZERO}
    second = {**piece, "offset": 112, "box_offset": [2, 0]}
    return {
        "format": "megallm-checkpoint",
        "schema": 1,
        "needs": "0.1.0",
        "step": 3,
        "files": {SHARD: {"bytes": 144, "header_bytes": 80, "header_xxh3_128": ZERO}},
        "tensors": {"w": {"full": [4, 4], "dtype": "float32", "pieces": [piece, second]}},
        "meta": {"lr": 0.1, "ledger": [1, 2]},
        **changes,
    }


def sealed(value):
    """The bytes of a manifest with this content and a right hash, as someone who means harm would write it."""
    text = value if isinstance(value, str) else json.dumps(value)
    body = text[:-1].encode()
    return body + f',\n"xxh3_128": "{digest(body)}"\n}}\n'.encode()


def changed(path, value):
    """The good content with one field replaced, for example `tensors.w.full`."""
    result = content()
    *parents, last = path.split("/")
    place = result
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[last] = value
    return result


def test_a_manifest_comes_back_as_it_was_written():
    manifest = decode(sealed(content()), "manifest.json")
    again = decode(manifest.encode(), "manifest.json")
    assert again == manifest and manifest.step == 3 and manifest.nbytes == 144
    assert again.meta == {"lr": 0.1, "ledger": [1, 2]}
    assert json.loads(manifest.encode())["tensors"]["w"]["full"] == [4, 4]


def test_floats_in_meta_round_trip_exactly():
    values = [0.1, 1e-300, 2.0**-1074, 123456789.123456789, 1 / 3]
    assert decode(Manifest(0, {}, {}, values).encode(), "m").meta == values


def test_every_flipped_bit_is_found():
    good = decode(sealed(content()), "m").encode()
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CheckpointError):
            decode(bytes(bad), "m")


def test_every_truncation_is_found():
    good = decode(sealed(content()), "m").encode()
    for length in range(len(good)):
        with pytest.raises(CheckpointError):
            decode(good[:length], "m")


PIECE = "tensors/w/pieces/0/"
LIES = [
    ("format", "something", "no megallm checkpoint"),
    ("schema", 2, "needs megallm >= 0.1.0"),
    ("schema", True, "has schema True"),
    ("step", -1, "whole number"),
    ("step", 1.0, "whole number"),
    ("step", 2**70, "whole number"),
    ("files", [], "JSON object"),
    ("files", {"../evil.safetensors": content()["files"][SHARD]}, "does not match"),
    ("files", {"/etc/evil.safetensors": content()["files"][SHARD]}, "does not match"),
    ("files", {}, "does not list"),
    (f"files/{SHARD}/bytes", 143, "end at byte 144"),
    (f"files/{SHARD}/bytes", 2**61, "end at byte 144"),
    (f"files/{SHARD}/header_bytes", 72, "no hash covers"),
    (f"files/{SHARD}/header_bytes", 88, "overlaps another piece"),
    (f"files/{SHARD}/header_xxh3_128", "0" * 31, "does not match"),
    ("tensors", {"a/../b": content()["tensors"]["w"]}, "does not match"),
    ("tensors", {"w@0,0": content()["tensors"]["w"]}, "does not match"),
    ("tensors/w/full", [4, 5], "hold 16 of 20"),
    ("tensors/w/full", [2**40, 2**40], "hold 16 of"),
    ("tensors/w/full", [16], "number of dims"),
    ("tensors/w/full", [4, -4], "whole number"),
    ("tensors/w/dtype", "complex64", "accepted are float64"),
    ("tensors/w/dtype", ["float32"], "accepted are"),
    ("tensors/w/dtype", "float64", "overlaps"),
    ("tensors/w/dtype", "float16", "no hash covers"),
    ("tensors/w/pieces", None, "JSON list"),
    ("tensors/w/pieces", [], "hold 0 of 16"),
    (PIECE + "file", "../../etc/passwd.safetensors", "does not match"),
    (PIECE + "file", "weights-00007.safetensors", "does not list"),
    (PIECE + "offset", 0, "overlaps"),
    (PIECE + "offset", 112, "no hash covers"),
    (PIECE + "offset", "80", "whole number"),
    (PIECE + "box_offset", [1, 0], "overlap"),
    (PIECE + "box_offset", [3, 0], "does not lie inside"),
    (PIECE + "box_shape", [2, 3], "hold 14 of 16"),
    (PIECE + "box_shape", [0, 4], "empty"),
    (PIECE + "xxh3_128", None, "does not match"),
    (PIECE + "extra", 1, "exactly the keys"),
    ("extra", 1, "exactly the keys"),
]


@pytest.mark.parametrize(("path", "value", "sentence"), LIES, ids=[f"{p}={str(v)[:20]}" for p, v, _ in LIES])
def test_a_lie_with_a_right_hash_is_refused(path, value, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        decode(sealed(changed(path, value)), "RUN/manifest.json")


def test_bad_json_with_a_right_hash_is_refused():
    for text in ("[1]", "{]", '{"a": 1, "a": 2}', "[" * 100000 + "]", "{" + '"n": ' + "9" * 5000 + "}"):
        with pytest.raises(CheckpointError, match="m"):
            decode(sealed(text), "m")
