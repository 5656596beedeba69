"""Tokenizer files: bytes as a tokenizer.json, chat template and generation config carried along, nothing else taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megallm.base.errors import CheckpointError
from megallm.convert import tokenizer_files, upcycle
from megallm.convert.convert import ConvertRequest, run
from megallm.convert.tokenizer_files import copy_tokenizer, token_ids, tokenizer_spec, write_byte_tokenizer
from megallm.convert.upcycle import UpcycleRequest
from megallm.data.text.tokenizer import ByteTokenizer, FolderTokenizer
from tests.convert.tiny import case, make

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
TEXT = "Zürich ☃ \x00\x7f\n  tab\there 漢字 🎉 don't"


def change(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_bytes_as_a_folder(tmp_path):
    write_byte_tokenizer(tmp_path)
    made, plain = FolderTokenizer(str(tmp_path)), ByteTokenizer()
    assert made.encode(TEXT) == plain.encode(TEXT) and made.decode(plain.encode(TEXT)) == TEXT
    assert (made.vocab_size, made.eod) == (plain.vocab_size, plain.eod)
    assert token_ids(tmp_path) == {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": None}
    assert tokenizer_spec(tmp_path) == "bytes" and tokenizer_spec(tmp_path / "none") is None


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["model"]["vocab"].update(a=98, b=97),
        lambda d: d["model"].update(merges=["a b"]),
        lambda d: d.update(normalizer={"type": "NFC"}),
        lambda d: d.update(
            post_processor={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        ),
        lambda d: d["added_tokens"].clear(),
        lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
    ],
)
def test_almost_bytes_is_not_bytes(tmp_path, edit):
    write_byte_tokenizer(tmp_path)
    change(tmp_path / "tokenizer.json", edit)
    assert tokenizer_spec(tmp_path) == str(tmp_path)


def test_files_travel_both_ways_and_only_they(tmp_path):
    folder = make(tmp_path / "hf", case("llama", "LlamaConfig"))
    write_byte_tokenizer(folder)
    change(folder / "tokenizer.json", lambda d: d["model"]["vocab"].update(a=98, b=97))  # a tokenizer of its own
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"temperature": 0.3, "eos_token_id": 256}\n')
    (folder / "secrets.json").write_text("{}")
    (folder / "modeling_x.py").write_text("raise SystemExit")
    run(ConvertRequest("megallm", str(folder), str(tmp_path / "ours")))
    assert not list((tmp_path / "ours").rglob("secrets.json")) and not list((tmp_path / "ours").rglob("*.py"))
    done = run(ConvertRequest("hf", str(tmp_path / "ours"), str(tmp_path / "back")))
    assert done["notes"] == []
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "back"))
    assert [before[key] for key in IDS] == [after[key] for key in IDS] and before["eos_token_id"] == 2
    assert not (tmp_path / "back/secrets.json").exists()
    (tmp_path / "ours/tokenizer/model.safetensors").write_bytes(b"weights that lie beside a tokenizer")
    upcycle.run(UpcycleRequest(str(tmp_path / "ours"), str(tmp_path / "grown"), experts=2))
    kept = {path.name: path.read_bytes() for path in (tmp_path / "grown/tokenizer").iterdir()}
    ids = json.loads(kept.pop("token_ids.json"))
    assert ids == {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2} | ids
    assert kept == {name: (folder / name).read_bytes() for name in kept} and "tokenizer.json" in kept


def test_a_link_to_somewhere_else_is_no_tokenizer_file(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a/tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="leaves the folder"):
        copy_tokenizer(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a/tokenizer.json").unlink()
    (tmp_path / "a/tokenizer.json").write_bytes(b"x" * 2000)
    monkeypatch.setattr(tokenizer_files, "MAX_TOKENIZER_BYTES", 1000)
    with pytest.raises(CheckpointError, match="larger than 1000 bytes"):
        copy_tokenizer(tmp_path / "a", tmp_path / "b")
