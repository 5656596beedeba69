"""Tokenizers: raw bytes, or a Hugging Face folder's `tokenizer.json`; and training a byte-level
BPE.

The text of a document is ordinary text: a literal `<|endoftext|>` in it never becomes the
end-of-document id. Nothing here runs code of the folder, and `transformers` is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from megallm.base import files
from megallm.base.errors import DataError, UsageError
from megallm.data.text import definition, native, readers, tokenizer_folder
from megallm.data.text.sample import TextSample, split_long_text

BYTES = "bytes"
END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILES = (
    "tokenizer.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)  # that `train_bpe` writes
_AT_ONCE = 64  # texts given to the library together
_FALLBACK_EODS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")


class Encoder(Protocol):
    """What preprocessing needs; a faster implementation only has to give the same ids."""

    kind: str
    vocab_size: int

    @property
    def eod(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def template(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer's own template puts before and behind a text."""
        ...

    def encode_joined(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids of all texts back to back, and how many each has (int64 [texts])."""
        ...


class Tokenizer(Encoder, Protocol):
    """Text to ids and back. `eod` is the end-of-document id; `fingerprint` names vocabulary and
    rules.
    """

    @property
    def specials(self) -> set[int]:
        """Ids of the tokens that stand for no text."""
        ...

    @property
    def special_texts(self) -> set[str]:
        """Returns how the special tokens are written that `encode` finds when it is asked to."""
        ...

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Returns ids of a text; `special` lets special tokens written in it become their ids (chat
        templates).
        """
        ...

    def encode_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
        """Returns what `encode(text, special=True)` gives, and for each id the characters [begin,
        end) of the text that it stands for, int64 [ids, 2].

        Some libraries leave spaces at the ends of a token out; one of spaces alone may be empty,
        and then stands behind them.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token by its name in the vocabulary; None when there is none."""
        ...


def load(spec: str, check: bool = True) -> Tokenizer:
    """Returns the tokenizer called `bytes`, of a folder in any form of `tokenizer_folder`, or of a
    file.

    Files are a `tokenizer.json`, sentencepiece's `.model` and tiktoken's ranks; see `native`.
    Without `check` the library reads a tokenizer.json when it is first needed, and errors come
    then. Errors: `DataError`.
    """
    if spec == BYTES:
        return ByteTokenizer()
    path, settings = Path(spec), None
    if path.is_dir():
        form = tokenizer_folder.definition_file(path)
        if form is not None and form.name == tokenizer_folder.VOCABULARY:
            return PairTokenizer(spec)
        if form is not None and form.suffix in native.SENTENCEPIECE:
            settings = tokenizer_folder.settings_of(path)
        path = path if form is None else form
    if path.suffix in native.SENTENCEPIECE:
        return native.SentencePieceTokenizer(path, settings)
    if path.suffix in native.TIKTOKEN:
        return native.TiktokenTokenizer(path)
    found = FolderTokenizer(spec)
    if check:
        found.check()
    return found


def _check_sound(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"The text has a lone surrogate at character {error.start}, which UTF-8 cannot hold: "
            "remove it."
        ) from None


class ByteTokenizer:
    """256 bytes of UTF-8 and the end-of-document id 256."""

    kind = BYTES
    vocab_size = 257
    eod = 256
    fingerprint = "bytes-257"
    template = ([], [])
    special_texts: frozenset[str] = frozenset()

    @property
    def specials(self) -> set[int]:
        """Returns the end of a document."""
        return {self.eod}

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Returns bytes of the text; the one special token has no written form, so `special`
        changes nothing.
        """
        _check_sound(text)
        return list(text.encode("utf-8"))

    def encode_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
        """Returns bytes of the text, and for each the character that it is a part of."""
        _check_sound(text)
        widths = [len(character.encode("utf-8")) for character in text]
        begins = np.repeat(np.arange(len(text)), widths)
        return list(text.encode("utf-8")), np.stack([begins, begins + 1], axis=1)

    def encode_joined(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids of all texts back to back, and how many each has."""
        parts = [text.encode("utf-8") for text in texts]
        return np.frombuffer(b"".join(parts), np.uint8), np.fromiter(
            map(len, parts), np.int64, len(parts)
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text; the end-of-document id gives nothing, broken UTF-8 gives replacement
        characters.
        """
        return bytes(i for i in ids if i < self.eod).decode("utf-8", errors="replace")

    def token_id(self, token: str) -> int | None:
        """Returns None: no token has a name."""
        return None


class FolderTokenizer:
    """A Hugging Face tokenizer read with the `tokenizers` library; no truncation, no padding.

    The library builds it at the first use: for 128,000 tokens that takes half a second. Errors:
    `DataError`.
    """

    kind = "huggingface"

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.file = self.path / "tokenizer.json" if self.path.is_dir() else self.path
        self._definition, self.digest = _definition(self.file)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        return _build(self.file, True)

    @cached_property
    def _special(self) -> tokenizers.Tokenizer:
        return _build(self.file, False)

    @cached_property
    def _vocab(self) -> dict[str, int]:
        return _plain_vocab(self._definition) or self._plain.get_vocab(with_added_tokens=True)

    @cached_property
    def vocab_size(self) -> int:
        return max(self._vocab.values(), default=-1) + 1

    @property
    def definition(self) -> dict[str, Any]:
        """Returns what tokenizer.json holds."""
        return self._definition

    def check(self) -> None:
        """Let `tokenizers` read the definition. Errors: `DataError`."""
        self._plain  # noqa: B018

    @cached_property
    def eod(self) -> int:
        """Returns id of `eos_token` in tokenizer_config.json or special_tokens_map.json. Errors:
        `DataError`.
        """
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = (tokenizer_folder.read_optional_json(self.file.parent / name) or {}).get(
                "eos_token"
            )
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                if token not in self._vocab:
                    raise DataError(
                        f"{self.file.parent / name} names eos_token {token!r}, which {self.file} "
                        "lacks."
                    )
                return self._vocab[token]
        for token in _FALLBACK_EODS:
            if token in self._vocab:
                return self._vocab[token]
        raise DataError(
            f"{self.file.parent} does not say which token ends a document: put "
            f'{{"eos_token": "..."}} with a token of the vocabulary into its tokenizer_config.json.'
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything in tokenizer.json that changes ids, whatever the file's layout."""
        return definition.tokenizer_fingerprint(self._definition)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Returns ids of a text, without any token that a template would add around it."""
        _check_sound(text)
        return (
            (self._special if special else self._plain).encode(text, add_special_tokens=False).ids
        )

    def encode_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
        """Returns ids of a text with its special tokens, and their characters."""
        _check_sound(text)
        made = self._special.encode(text, add_special_tokens=False)
        return made.ids, np.array(made.offsets, np.int64).reshape(-1, 2)

    @cached_property
    def template(self) -> tuple[list[int], list[int]]:
        """Returns ids that the definition's template puts before and behind a text: a Llama's
        `<s>`, BERT's [CLS] and [SEP].
        """
        for text in ("a", *self.pieces()):  # some vocabularies have no token for an a
            made = self._special.encode(text, add_special_tokens=True)
            own = [
                place for place, sequence in enumerate(made.sequence_ids) if sequence is not None
            ]
            if own:
                return made.ids[: own[0]], made.ids[own[-1] + 1 :]
        return [], []

    @property
    def added_tokens(self) -> list[dict[str, Any]]:
        """Returns the added tokens of the definition, special or not."""
        return self._definition.get("added_tokens") or []

    @property
    def specials(self) -> set[int]:
        """Ids of the added tokens that the definition calls special."""
        return {token["id"] for token in self.added_tokens if token.get("special")}

    @property
    def special_texts(self) -> set[str]:
        """Returns the special tokens as they are written."""
        return {str(token["content"]) for token in self.added_tokens if token.get("special")}

    def pieces(self) -> list[str]:
        """Returns each token as the vocabulary writes it, by id; an id without a token is empty."""
        written = [""] * self.vocab_size
        for piece, number in self._vocab.items():
            written[number] = piece
        return written

    def encode_joined(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids of all texts back to back, and how many each has."""
        encode, parts = self._plain.encode_batch_fast, []
        for at in range(0, len(texts), _AT_ONCE):  # without offsets, which nobody asks for here
            parts += [
                one.ids for one in encode(list(texts[at : at + _AT_ONCE]), add_special_tokens=False)
            ]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        return np.fromiter(chain.from_iterable(parts), np.int64, int(lengths.sum())), lengths

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text, special tokens written out."""
        return self._plain.decode(list(ids), skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token by its name in the vocabulary; None when there is none."""
        return self._vocab.get(token)


class PairTokenizer(FolderTokenizer):
    """`vocab.json` and `merges.txt`, read as the tokenizer.json that they stand for."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.file = self.path / tokenizer_folder.VOCABULARY
        self._text = tokenizer_folder.pair_definition(self.path)
        self._definition, self.digest = definition.checked(self._text.encode(), self.file)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        return _prepared(tokenizers.Tokenizer.from_str(self._text), True)

    @cached_property
    def _special(self) -> tokenizers.Tokenizer:
        return _prepared(tokenizers.Tokenizer.from_str(self._text), False)


def _definition(path: Path) -> tuple[dict[str, Any], str]:
    try:
        return definition.read_definition(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path} does not exist. A tokenizer is `{BYTES}`, or a folder with "
            f"{tokenizer_folder.TOKENIZER_FORMS} (`megallm tokenizer train` makes one), or such a "
            "file."
        ) from None


def _plain_vocab(found: dict[str, Any]) -> dict[str, int] | None:
    """Returns every token's id where that stands in the definition without doubt: ids from 0 on,
    the added tokens last or in their places. None otherwise: `tokenizers` gives added tokens other
    ids then."""
    vocab = (found.get("model") or {}).get("vocab")
    if not isinstance(vocab, dict):
        return None
    added = {token["content"]: token["id"] for token in found.get("added_tokens") or []}
    whole = vocab | added
    new = [number for token, number in added.items() if token not in vocab]
    moved = any(vocab.get(token, number) != number for token, number in added.items())
    if (
        moved
        or new != [*range(len(vocab), len(whole))]
        or max(whole.values(), default=-1) + 1 != len(whole)
    ):
        return None
    return whole


def _build(file: Path, specials_are_text: bool) -> tokenizers.Tokenizer:
    try:
        built = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower for a bad definition
        raise DataError(
            f"{file} is not a tokenizer definition that `tokenizers` can load: {error}."
        ) from error
    return _prepared(built, specials_are_text)


def _prepared(built: tokenizers.Tokenizer, specials_are_text: bool) -> tokenizers.Tokenizer:
    built.no_truncation()
    built.no_padding()
    built.encode_special_tokens = specials_are_text
    return built


def train_bpe(
    inputs: Sequence[str],
    vocab_size: int,
    output: str,
    options: readers.ReadOptions | None = None,
    special_tokens: Sequence[str] = (),
    sample: TextSample | None = None,
) -> dict[str, Any]:
    """Train a byte-level BPE on the texts of `inputs` and write a folder that `transformers` can
    load.

    The vocabulary holds `<|endoftext|>` (id 0, the eos_token), the other special tokens, 256 bytes
    and the merges; it is smaller than asked when the text is too small. Returns {output,
    vocab_size, documents, text_bytes, fingerprint}: documents and bytes that were learned from.
    Errors: `UsageError` for the size, `DataError` for the files, `CannotWrite`.
    """
    sample = sample or TextSample()
    specials = list(dict.fromkeys((END_OF_TEXT, *special_tokens)))
    least = 256 + len(specials)
    if vocab_size < least:
        raise UsageError(
            f"--vocab-size {vocab_size} is too small: 256 bytes and {', '.join(specials)} need "
            f"{least}."
        )
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    found = sample.texts(inputs, options or readers.ReadOptions())
    bpe.train_from_iterator((piece for text in found for piece in split_long_text(text)), trainer)
    if not sample.text_bytes:
        raise DataError(f"There is no usable text in {', '.join(inputs)}: a tokenizer needs some.")
    folder = Path(output)
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "bos_token": None, "pad_token": None,
        "add_prefix_space": False, "clean_up_tokenization_spaces": False, "model_max_length": 10**12,
    }  # fmt: skip
    files.atomic_write_text(folder / "tokenizer.json", bpe.to_str(pretty=True))
    files.atomic_write_json(folder / "special_tokens_map.json", {"eos_token": END_OF_TEXT})
    files.atomic_write_json(folder / "tokenizer_config.json", config)
    made = FolderTokenizer(output)
    return {
        "output": output, "vocab_size": made.vocab_size, "documents": sample.documents,
        "text_bytes": sample.text_bytes, "fingerprint": made.fingerprint,
    }  # fmt: skip
