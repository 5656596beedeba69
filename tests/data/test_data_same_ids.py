"""gigatoken is not `tokenizers` (issue R, items 4 and 29): the ids are those of `tokenizers`, whatever makes them."""

from __future__ import annotations

import json
import random
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from megallm.data.indexed import dataset as indexed
from megallm.data.indexed import meta, split_merge
from megallm.data.text import accelerated, code_points, definition, preprocess, tokenizer
from megallm.data.text.byte_level import BYTE_SYMBOLS

gigatoken = pytest.importorskip("gigatoken")

ROOT = Path(__file__).parents[2]
# New in Unicode 17: a letter, a mark, capitals, a digit, an ideograph; `tokenizers` knows 16 or less.
YOUNG = ["\u088f", "\u1acf", "\ua7ce", "\ua7d2", "\U00010940", "\U00011de0", "\U000323b0"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (  # with the very line ends in it
    r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+""".replace(r"\r\n", "\r\n")
    + r"| ?[\p{P}\p{S}]+" "[\r\n]*|" r"\s*" "[\r\n]+|" r"\s+(?!\S)|\s+",
)  # fmt: skip
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def in_turn(*patterns: str) -> dict:
    return {"type": "Sequence", "pretokenizers": [*map(split, patterns), BYTE_LEVEL]}


SPLITTINGS = {
    "gpt2": (BYTE_LEVEL | {"use_regex": True}, None),
    "llama3": (in_turn(LLAMA3), None),
    "qwen": (in_turn(LLAMA3.replace("{1,3}", "")), {"type": "NFC"}),
    "o200k": (in_turn(O200K), None),
    "deepseek": (in_turn(*DEEPSEEK), None),
}


def written(folder: Path, splitting: str, added: tuple[dict, ...] = (), seed: int = 0) -> str:
    """A folder with a tokenizer of a thousand merges, most across borders of classes."""
    chance = random.Random(seed)
    vocab = {symbol: byte for byte, symbol in enumerate(BYTE_SYMBOLS)}
    high = BYTE_SYMBOLS[128:]
    merges = [pair for a in "a1." for b in high for pair in ([a, b], [b, a])]  # whatever is not split shows
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    names = list(vocab)
    for a, b in ([chance.choice(names), chance.choice(names)] for _ in range(300)):
        if a + b not in vocab and len(a + b) < 12:
            vocab[a + b] = len(vocab)
            names.append(a + b)
            merges.append([a, b])
    tokens = [{"content": "<|endoftext|>", "special": True, "normalized": False}, *added]
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    pre_tokenizer, normalizer = SPLITTINGS[splitting]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": [{**flags, **one, "id": len(vocab) + i} for i, one in enumerate(tokens)],
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": False, "vocab": vocab, "merges": merges},
    }))  # fmt: skip
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return str(folder)


def both(folder: str) -> tuple[tokenizer.FolderTokenizer, accelerated.AcceleratedTokenizer]:
    plain = tokenizer.load(folder)
    fast, name = accelerated.choose_tokenizer(plain, "gigatoken")
    assert name == "gigatoken"
    return plain, fast


def unequal(plain, fast, texts) -> list[str]:
    """The texts to which `encode_joined` of the fast one gives other ids."""
    ids, lengths = fast.encode_joined(texts)
    ends = np.cumsum(lengths)
    return [
        text for text, end, length in zip(texts, ends, lengths, strict=True)
        if ids[end - length : end].tolist() != plain.encode(text)
    ]  # fmt: skip


def hard_texts(count: int, seed: int = 1) -> list[str]:
    """Texts of random code points of all kinds, young ones among them."""
    chance = random.Random(seed)
    blocks = [
        (0x20, 0x7F), (0xA0, 0x250), (0x250, 0x600), (0x900, 0xE00), (0x1AB0, 0x1B00), (0x2000, 0x2100),
        (0x4E00, 0x4F00), (0xA7C0, 0xA800), (0x10900, 0x10A00), (0x1F600, 0x1F650), (0x323A0, 0x323C0),
    ]  # fmt: skip

    def one() -> str:
        if chance.random() < 0.3:
            return chance.choice((" ", "a", "1", "\n", "'", *YOUNG))
        return chr(chance.randrange(*chance.choice(blocks)))

    return ["".join(one() for _ in range(chance.randint(0, 60))) for _ in range(count)]


@pytest.mark.parametrize("splitting", SPLITTINGS)
def test_item_4_code_points_that_the_libraries_class_otherwise_go_to_tokenizers(tmp_path, splitting):
    """360, 373 and 519 code points are split otherwise: texts with and without them get the ids of `tokenizers`."""
    plain, fast = both(written(tmp_path / "t", splitting))
    texts = [f"a{c}b 1{c}2 {c}{c}.{c}" for c in YOUNG] + ["plain ASCII"] * 3 + hard_texts(300)
    assert unequal(plain, fast, texts) == []
    made, offsets = fast.fast_ids(texts)  # the control: what gigatoken alone would have given
    careless = [i for i, text in enumerate(texts) if made[offsets[i] : offsets[i + 1]].tolist() != plain.encode(text)]
    assert 0 < len(careless) <= fast.by_tokenizers < len(texts)


@pytest.mark.parametrize("splitting", ["gpt2", "qwen"])
def test_item_4_every_block_of_unicode(tmp_path, splitting):
    """A code point of every 16 of the planes that hold any, in texts of a block each."""
    plain, fast = both(written(tmp_path / "t", splitting))
    points = [c for c in [*range(0x80, 0x1F000, 16), *range(0x1F000, 0x34000, 256)] if not 0xD800 <= c < 0xE000]
    texts = ["".join(f"x{chr(c)}y {chr(c)}" for c in points[at : at + 32]) for at in range(0, len(points), 32)]
    assert unequal(plain, fast, texts) == [] and fast.by_tokenizers < len(texts)


def test_item_4_control_without_the_comparison_the_ids_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(code_points.SameSplits, "unlike", lambda self, texts: [])
    plain, fast = both(written(tmp_path / "t", "gpt2"))
    assert unequal(plain, fast, hard_texts(300))


def test_item_4_text_that_is_not_normalised_goes_to_tokenizers(tmp_path):
    plain, fast = both(written(tmp_path / "t", "qwen"))
    texts = ["e\u0301 o\u0308", "\u212b \u1e9b\u0323", "a\u0327\u0301", "\u0344", "가 \u1100\u1161", "naïve é"]
    assert unequal(plain, fast, texts) == [] and fast.by_tokenizers == 5


@pytest.mark.parametrize("flags", [
    {"normalized": True}, {"normalized": False}, {"single_word": True}, {"lstrip": True}, {"rstrip": True},
])  # fmt: skip
def test_item_4_added_tokens_go_to_tokenizers(tmp_path, flags):
    added = ({"content": "  ", "special": False, **flags}, {"content": "<think>", "special": False, **flags},
             {"content": "ab", "special": False, **flags})  # fmt: skip
    added = tuple({"normalized": False, **one} for one in added)
    plain, fast = both(written(tmp_path / "t", "llama3", added))
    texts = ["a  b", "x <think> y<think>z", "crab ab", "   ", "nothing of it", "<|endoftext|>", "cab\nab"]
    assert unequal(plain, fast, texts) == [] and fast.by_tokenizers == 5


@pytest.mark.parametrize("change,reason", [
    ({"normalizer": {"type": "NFKC"}}, "normaliser NFKC"),
    ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}}, "NFC, Lowercase"),
    ({"model": {"dropout": 0.1}}, "kind of model"), ({"model": {"end_of_word_suffix": "</w>"}}, "suffixes"),
    ({"model": {"type": "WordPiece"}}, "kind of model"),
])  # fmt: skip
def test_item_4_what_cannot_be_proved_is_not_used(tmp_path, change, reason):
    found = json.loads((Path(written(tmp_path / "t", "gpt2")) / "tokenizer.json").read_text())
    found |= {key: found["model"] | value if key == "model" else value for key, value in change.items()}
    assert reason in accelerated.unprovable(found)
    assert accelerated.unprovable({**found, "normalizer": None, "model": found["model"] | {"vocab": {"a": 0}}})


def test_item_4_the_choice_does_not_depend_on_the_size(tmp_path):
    """A line of one document has the ids that the same line has among many; the side-car says who made them."""
    folder = written(tmp_path / "t", "llama3")
    line = json.dumps({"text": "".join(f"a{c}b 12{c} " for c in YOUNG) + "and words"}) + "\n"
    (tmp_path / "one.jsonl").write_text(line)
    (tmp_path / "many.jsonl").write_text((json.dumps({"text": "words " * 400}) + "\n") * 2000 + line)
    found = {}
    for name in ("one", "many"):
        stats = preprocess.run(preprocess.PreprocessConfig((f"{tmp_path}/{name}.jsonl",), f"{tmp_path}/{name}", folder))
        assert (stats.backend, stats.by_tokenizers) == ("gigatoken", 1)
        data = indexed.IndexedDataset(f"{tmp_path}/{name}_text_document")
        found[name] = data.document(data.num_documents - 1).tolist()
    assert found["one"] == found["many"] == tokenizer.load(folder).encode(json.loads(line)["text"])
    libraries = [f"{name} {metadata.version(name)}" for name in ("gigatoken", "tokenizers")]
    assert meta.read_meta(f"{tmp_path}/one_text_document")["tokenizer"]["encoded_by"] == libraries
    indexed.merge_datasets([f"{tmp_path}/one_text_document", f"{tmp_path}/many_text_document"], tmp_path / "all")
    parts = split_merge.split_dataset(str(tmp_path / "all"), str(tmp_path / "part"), [1, 1, 0], 1)
    for prefix in (str(tmp_path / "all"), parts[0]["prefix"]):
        assert meta.read_meta(prefix)["tokenizer"]["encoded_by"] == libraries


def test_item_4_a_merge_names_the_libraries_of_all_its_parts(tmp_path):
    folder = written(tmp_path / "t", "llama3")
    (tmp_path / "in.jsonl").write_text('{"text": "a few words"}\n')
    for backend in ("tokenizers", "gigatoken"):
        preprocess.run(
            preprocess.PreprocessConfig((f"{tmp_path}/in.jsonl",), f"{tmp_path}/{backend}", folder, backend=backend)
        )
    indexed.merge_datasets(
        [f"{tmp_path}/{name}_text_document" for name in ("tokenizers", "gigatoken")], tmp_path / "all"
    )
    assert len(meta.read_meta(str(tmp_path / "all"))["tokenizer"]["encoded_by"]) == 2


def test_item_4_another_library_does_not_go_on_with_its_work(tmp_path, monkeypatch):
    folder = written(tmp_path / "t", "llama3")
    (tmp_path / "in.jsonl").write_text('{"text": "a few words"}\n')
    config = preprocess.PreprocessConfig((f"{tmp_path}/in.jsonl",), f"{tmp_path}/o", folder)
    encoder = tokenizer.load(folder)
    kept = [preprocess._identity(config, encoder, backend) for backend in ("gigatoken", "tokenizers")]
    monkeypatch.setattr(accelerated.metadata, "version", lambda name: "9.9")
    kept.append(preprocess._identity(config, encoder, "tokenizers"))
    assert len({json.dumps(one) for one in kept}) == 3


# Item 29.


def test_item_29_the_tokenizer_is_built_once(tmp_path, monkeypatch):
    """9.0 CPU s for one line: built four times, compared twice. The second run has nothing left to compare."""
    folder = written(tmp_path / "t", "gpt2")
    (tmp_path / "in.jsonl").write_text('{"text": "a few words"}\n')
    built, real = [], tokenizer.tokenizers.Tokenizer

    class Counted:
        @staticmethod
        def from_file(path):
            built.append(path)
            return real.from_file(path)

    monkeypatch.setattr(tokenizer.tokenizers, "Tokenizer", Counted)
    monkeypatch.setattr(code_points.tokenizers.Tokenizer, "from_str", real.from_str, raising=False)
    config = preprocess.PreprocessConfig((f"{tmp_path}/in.jsonl",), f"{tmp_path}/o", folder)
    for expected in (1, 0):
        built.clear()
        assert preprocess.run(config).backend == "gigatoken"
        assert len(built) == expected
    built.clear()
    preprocess.run(preprocess.PreprocessConfig(**{**vars(config), "backend": "tokenizers"}))
    assert len(built) == 1


def test_item_29_a_verdict_is_kept_for_its_versions_only(tmp_path, monkeypatch):
    folder = written(tmp_path / "t", "gpt2")
    compared = []
    original = accelerated.first_difference
    monkeypatch.setattr(accelerated, "first_difference", lambda *a: compared.append(1) or original(*a))
    prints = [accelerated.choose_tokenizer(tokenizer.load(folder), "auto")[0].fingerprint for _ in range(2)]
    assert len(compared) == 1 and prints[0] == prints[1] == definition.tokenizer_fingerprint(
        tokenizer.load(folder).definition
    )
    monkeypatch.setattr(accelerated, "versions", lambda: {"gigatoken": "9.9"})
    accelerated.choose_tokenizer(tokenizer.load(folder), "auto")
    assert len(compared) == 2
    for path in Path(accelerated.CACHE).iterdir():
        path.write_text("{")
    accelerated.choose_tokenizer(tokenizer.load(folder), "auto")
    assert len(compared) == 3
    monkeypatch.setattr(accelerated, "CACHE", "/proc/nowhere")
    assert accelerated.choose_tokenizer(tokenizer.load(folder), "auto")[1] == "gigatoken" and len(compared) == 4


def test_item_29_the_vocabulary_is_read_off_the_definition(tmp_path):
    """Where that is not the same as what `tokenizers` makes of it, `tokenizers` is asked."""
    tokens = [{"content": "x", "id": 4}, {"content": "new", "id": 9}, {"content": "y", "id": 3}]
    for number, added in enumerate(([], tokens[:1], tokens[1:2], tokens[2:], tokens)):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        found = {
            "version": "1.0", "added_tokens": [one | flags for one in added],
            "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 2, "y": 3}, "unk_token": "a"},
        }  # fmt: skip
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(found))
        plain = tokenizer.load(str(path))
        assert plain._vocab == plain._plain.get_vocab(with_added_tokens=True)


def test_item_29_the_fingerprint_has_not_changed(tmp_path):
    import hashlib

    for splitting in ("gpt2", "deepseek"):
        found = tokenizer.load(written(tmp_path / splitting, splitting))
        rest = {k: v for k, v in found.definition.items() if k not in ("version", "truncation", "padding")}
        old = hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=16).hexdigest()
        assert found.fingerprint == f"hf-{old}"
