"""Folders that mean harm: nothing of them runs, nothing outside them is read, memory stays small, nothing is left."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from megallm.base.errors import CheckpointError, UsageError
from megallm.convert import convert, weights
from megallm.convert import folder as folder_module
from megallm.convert.convert import ConvertRequest
from megallm.convert.folder import MAX_HEADER_BYTES, catalogue, plain_file, read_header
from megallm.convert.weights import HfReader
from tests.convert.tiny import MEASURING, case, make

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("hf") / "model", case("llama", "LlamaConfig"), shard="12KB")


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def write_file(path: Path, header: bytes | dict, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(begin: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_HEADERS = {
    "longer than the file": (b"{}", b"", 2**62, "does not fit"),
    "not JSON": (b"{", b"", None, "is not JSON"),
    "a list": (b"[]", b"", None, "must hold a JSON object"),
    "deep": (b'{"a":' + b"[" * 50_000, b"", None, "is not JSON"),
    "key twice": (b'{"a":' + json.dumps(tensor(0, 4, [1])).encode() + b',"a":1}', b"1234", None, "given twice"),
    "overlap": ({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, bytes(12), None, "b overlaps"),
    "same bytes": ({"a": tensor(0, 8, [2]), "b": tensor(0, 8, [2])}, bytes(8), None, "overlaps"),
    "hole": ({"a": tensor(0, 4, [1]), "b": tensor(8, 12, [1])}, bytes(12), None, "leaves a hole"),
    "tail": ({"a": tensor(0, 4, [1])}, bytes(9), None, "5 bytes after its last tensor"),
    "outside": ({"a": tensor(0, 2**40, [2**38])}, bytes(8), None, "outside the file"),
    "backwards": ({"a": tensor(8, 0, [2])}, bytes(8), None, "outside the file"),
    "negative": ({"a": tensor(-4, 0, [1])}, bytes(8), None, "no lists of whole numbers"),
    "too small for the shape": ({"a": tensor(0, 8, [2**20, 2**20])}, bytes(8), None, "has 8 bytes"),
    "product overflows": ({"a": tensor(0, 0, [2**32, 2**32])}, b"", None, "has 0 bytes"),
    "real numbers": ({"a": tensor(0, 4, [1.0])}, bytes(4), None, "no lists of whole numbers"),
    "truth": ({"a": tensor(0, 4, [True])}, bytes(4), None, "no lists of whole numbers"),
    "unknown dtype": ({"a": tensor(0, 4, [1], "Q7")}, bytes(4), None, "has dtype 'Q7'"),
    "more keys": ({"a": tensor(0, 4, [1]) | {"x": 1}}, bytes(4), None, "needs exactly"),
    "many dims": ({"a": tensor(0, 4, [1] * 9)}, bytes(4), None, "no lists of whole numbers"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_headers(name, tmp_path):
    header, data, length, sentence = BAD_HEADERS[name]
    with pytest.raises(CheckpointError, match=sentence):
        read_header(write_file(tmp_path / "x.safetensors", header, data, length))


def test_a_good_header_is_read_and_empty_or_short_files_are_not(tmp_path):
    path = write_file(tmp_path / "x.safetensors", {"b": tensor(4, 4, [0]), "a": tensor(0, 4, [1])}, bytes(4))
    assert read_header(path)["a"].nbytes == 4
    for size in (0, 7):
        (tmp_path / "y.safetensors").write_bytes(bytes(size))
        with pytest.raises(CheckpointError, match="no safetensors file"):
            read_header(tmp_path / "y.safetensors")


MEASURE = (
    MEASURING
    + """
from megallm.base.errors import CheckpointError
from megallm.convert.folder import read_header
before = begin()
try:
    read_header(sys.argv[1])
except CheckpointError as error:
    print(kib("VmHWM") - before, str(error)[-90:])
"""
)


@pytest.mark.parametrize("kind", ["sparse", "length", "shape"])
def test_header_bombs_cost_no_memory(kind, tmp_path):
    """A header that claims gigabytes, in a file that has them or not, is refused before anything is allocated."""
    path = tmp_path / "x.safetensors"
    if kind == "sparse":  # the file is as long as it says, on paper
        write_file(path, b"{", length=2**33)
        os.truncate(path, 2**33 + 8)
    elif kind == "length":
        write_file(path, b"{}", length=2**63)
    else:
        write_file(path, {"a": tensor(0, 2**34, [2**32])}, bytes(64))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        capture_output=True, text=True, timeout=60, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert int(done.stdout.split()[0]) < 4096, done.stdout  # KiB
    assert MAX_HEADER_BYTES < 2**25


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".hidden.safetensors", "a\x00.safetensors",
     "C:\\x.safetensors", "pytorch_model.bin", ""],
)  # fmt: skip
def test_weight_map_names_only_plain_files(folder, name):
    secret = folder.parent / "secret.safetensors"
    shutil.copy(next(iter(folder.glob("*.safetensors"))), secret)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        catalogue(folder)


def test_links_stay_inside(folder):
    victim = sorted(folder.glob("*.safetensors"))[0]
    outside = folder.parent / "outside.safetensors"
    victim.rename(outside)
    victim.symlink_to(outside)
    with pytest.raises(CheckpointError, match="leaves the folder"):
        catalogue(folder)
    victim.unlink()
    os.mkfifo(victim)
    with pytest.raises(CheckpointError, match="not a regular file"):
        catalogue(folder)
    victim.unlink()
    inside = folder / "blob.safetensors"
    shutil.copy(outside, inside)
    victim.symlink_to(inside.name)
    assert catalogue(folder)


def test_the_cache_of_hugging_face_is_read(folder, tmp_path):
    """`snapshots/REVISION/x` -> `../../blobs/HASH`, and nowhere else."""
    blobs, home = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/abc"
    blobs.mkdir(parents=True)
    home.mkdir(parents=True)
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        (home / path.name).symlink_to(f"../../blobs/{path.name}")
    with HfReader(home) as reader:
        assert reader.model.num_layers == 3
    (home / "config.json").unlink()
    (home / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="leaves the folder"):
        plain_file(home, "config.json")


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def plant(folder: Path, marker: Path) -> None:
    """Everything that could run: code named in auto_map, pickles, a kernel, a template."""
    code = f"open({str(marker)!r}, 'w').close()\n"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "__init__.py", "generate.py"):
        (folder / name).write_text(code)
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "tokenizer_class": "X"})
    )


@pytest.mark.parametrize("change", [{}, {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, {"model_type": "x"},
                                    {"_attn_implementation_internal": "evil/kernel"}])  # fmt: skip
def test_nothing_of_a_folder_runs(folder, tmp_path, change):
    marker = tmp_path / "ran"
    plant(folder, marker)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    request = ConvertRequest("megallm", str(folder), str(tmp_path / "out"), verify=True)
    if change.keys() & {"auto_map", "model_type"}:
        with pytest.raises(UsageError, match="never run"):
            convert.run(request)
        assert not list(tmp_path.glob("out*"))
    else:
        assert convert.run(request)["max_rel_error"] <= 1e-5
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))  # negative control: the payload works
    assert marker.exists()


@pytest.mark.parametrize("change", [{"dtype": "evil"}, {"attn_implementation": "evil/kernel"}, {"use_cache": "no"},
                                    {"experts_implementation": "evil"}, {"pad_token_id": 10**9}])  # fmt: skip
def test_strange_words_that_say_nothing_do_not_reach_transformers(folder, tmp_path, change):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert convert.run(ConvertRequest("megallm", str(folder), str(tmp_path / "out"), verify=True))["left_out"] == 0


def test_what_transformers_cannot_load_is_a_sentence(folder, tmp_path):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text_config": {"a": 1}}))
    with pytest.raises(UsageError, match="transformers cannot load .*AttributeError.* or leave --verify out"):
        convert.run(ConvertRequest("megallm", str(folder), str(tmp_path / "out"), verify=True))
    assert not list(tmp_path.glob("out*"))


def test_pickled_weights_are_refused_with_advice(folder, tmp_path):
    marker = tmp_path / "ran"
    plant(folder, marker)
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    with pytest.raises(UsageError, match=r"as model\.pt, a pickle.*save_pretrained"):
        convert.run(ConvertRequest("megallm", str(folder), str(tmp_path / "out")))
    assert not marker.exists() and not list(tmp_path.glob("out*"))


def test_an_adapter_beside_the_weights_is_not_left_out_silently(folder, tmp_path):
    """transformers would load the base model that the adapter names, from wherever that is, and add the adapter."""
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/somewhere/else", "peft_type": "LORA"}')
    with pytest.raises(UsageError, match="holds an adapter .* merge it first"):
        convert.run(ConvertRequest("megallm", str(folder), str(tmp_path / "out"), verify=True))
    assert not list(tmp_path.glob("out*"))


def test_more_tensors_than_any_model_has(folder, monkeypatch):
    monkeypatch.setattr(folder_module, "MAX_TENSORS", 20)  # this one has 30, in several files
    with pytest.raises(CheckpointError, match="more than 20 tensors"):
        catalogue(folder)


def test_tensors_for_more_layers_than_any_model_has(folder, monkeypatch):
    """A header of 16 MB can name the tensors of 18,000 tiny layers: refused before a layer is built."""
    HfReader(folder).close()
    monkeypatch.setattr(weights, "MAX_LAYERS", 2)
    with pytest.raises(CheckpointError, match="says 3 layers; more than 2 are refused"):
        HfReader(folder)


CHANGES = {
    "one layer more": ({"num_hidden_layers": 4}, "layers.3.input_layernorm.weight is missing"),
    "one layer less": ({"num_hidden_layers": 2}, "holds tensors that a llama .* does not have: model.layers.2"),
    "another width": ({"intermediate_size": 64}, r"has shape \(48, 32\), config.json makes it \(64, 32\)"),
    "layers without end": ({"num_hidden_layers": 2**30}, "tensors, but its config.json says 1073741824 layers"),
    "tied after all": ({"vocab_size": 60}, "config.json makes it"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_config_and_weights_must_agree(folder, tmp_path, name):
    change, sentence = CHANGES[name]
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=sentence):
        convert.run(ConvertRequest("megallm", str(folder), str(tmp_path / "out")))
    assert not list(tmp_path.glob("out*"))


def test_a_file_that_is_cut_while_it_is_read(folder, tmp_path):
    with HfReader(folder) as reader:
        for path in folder.glob("*.safetensors"):
            os.truncate(path, 512)
        with pytest.raises(CheckpointError, match="cut off while it was read"):
            for name in reader.names():
                convert.LazyTensors(reader, name, *reader.info(name))[tuple(slice(0, n) for n in reader.info(name)[0])]


def test_outputs_are_never_overwritten(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("x")
    with pytest.raises(UsageError, match="nothing is overwritten unasked"):
        convert.run(ConvertRequest("megallm", str(folder), str(tmp_path / "out")))
    assert (tmp_path / "out/precious").read_text() == "x"
