"""Tokenizers in formats of their own: a sentencepiece model, or tiktoken ranks. Both libraries are
optional.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from megallm.base import optional
from megallm.base.errors import DataError, UsageError
from megallm.data.text import definition
from megallm.data.text.tokenizer_folder import FolderSettings

SENTENCEPIECE, TIKTOKEN = (".model", ".spm"), (".tiktoken",)
_END = "<|endoftext|>"
# Classes, or types of models, whose texts begin with a token unless their settings say otherwise.
_BEGIN = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "llama", "mistral", "mixtral")
# How OpenAI's published encodings split text, and their special tokens: the file itself does not
# say.
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
    r"\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_CAPS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = "|".join((
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPS}*{_SMALL}+{_SHORT}", rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPS}+{_SMALL}*{_SHORT}",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
))  # fmt: skip
_FIM_100K = {
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}
KNOWN: dict[str, tuple[str, dict[str, int]]] = {
    "gpt2": (_GPT2, {_END: 50256}),
    "r50k_base": (_GPT2, {_END: 50256}),
    "p50k_base": (_GPT2, {_END: 50256}),
    "cl100k_base": (_CL100K, {_END: 100257, **_FIM_100K}),
    "o200k_base": (_O200K, {_END: 199999, "<|endofprompt|>": 200018}),
}


class _Native:
    """What both have in common."""

    kind: str
    path: Path
    vocab_size: int
    template: tuple[list[int], list[int]] = ([], [])  # neither format has one

    def encode(self, text: str, special: bool = False) -> list[int]:
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self.encode(text), np.int64) for text in texts]

    def encode_joined(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids of all texts back to back, and how many each has."""
        ids = self.encode_batch(texts)
        return np.concatenate([np.empty(0, np.int64), *ids]), np.array(
            [len(one) for one in ids], np.int64
        )


class SentencePieceTokenizer(_Native):
    """A sentencepiece `.model`; control symbols written in a text are ordinary text. Errors:
    `DataError`.

    `settings` are those of the folder it lies in: added tokens beyond the model's pieces, which
    token ends a text, and whether texts begin with one. A file by itself has none.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path, settings: FolderSettings | None = None) -> None:
        library = optional.need_for_file("sentencepiece", str(path))
        self.path, data = path, _read(path)
        self._model = library.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(data)
        except RuntimeError as error:
            raise DataError(f"{path} is not a sentencepiece model: {error}.") from error
        self._settings, self._pieces = settings or FolderSettings(), self._model.vocab_size()
        self._added = {text: i for text, i in self._settings.added.items() if i >= self._pieces}
        self._texts = {i: text for text, i in self._added.items()}
        self.vocab_size = max([self._pieces - 1, *self._texts]) + 1
        found = _digest(
            data + json.dumps(sorted(self._added.items())).encode() if self._added else data
        )
        self.fingerprint = f"sentencepiece-{found}"
        texts = sorted(self.special_texts, key=len, reverse=True)
        self._finder = re.compile("|".join(map(re.escape, texts))) if texts else None

    @property
    def special_texts(self) -> set[str]:
        """Control symbols and added tokens as they are written."""
        symbols = {
            self._model.id_to_piece(i) for i in range(self._pieces) if self._model.is_control(i)
        }
        named = {text for text in self._settings.specials if self.token_id(text) is not None}
        return symbols | named | set(self._added)

    @property
    def eod(self) -> int:
        """Returns the id that the settings name, else the model's end-of-sentence id. Errors:
        `DataError`.
        """
        named = self._settings.tokens.get("eos")
        found = None if named is None else self.token_id(named)
        if found is None and self._model.eos_id() < 0:
            raise DataError(
                f"{self.path} has no end-of-sentence symbol: train it with one, or leave out "
                "--append-eod."
            )
        return self._model.eos_id() if found is None else found

    @property
    def template(self) -> tuple[list[int], list[int]]:
        """Ids around a text: those that add_bos_token and add_eos_token ask for; a Llama's begins
        with one anyway.
        """
        own = self._settings
        begins = own.add_bos
        if begins is None:
            known = own.kind.removesuffix("Fast") or own.model_type
            begins = known in _BEGIN
        named = own.tokens.get("bos")
        begin = self._model.bos_id() if named is None else self.token_id(named)
        return [begin] if begins and begin is not None and begin >= 0 else [], [
            self.eod
        ] if own.add_eos else []

    @property
    def specials(self) -> set[int]:
        """Ids of control symbols, of the unknown piece and of special added tokens."""
        model = self._model
        found = {i for i in range(self._pieces) if model.is_control(i) or model.is_unknown(i)}
        return found | {i for text, i in self._added.items() if text in self._settings.specials}

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Returns ids of a text; `special` lets special tokens written in it become their ids."""
        if not special or self._finder is None:
            return self._model.encode(text)
        ids, begin = [], 0
        for match in self._finder.finditer(text):
            ids += self._model.encode(text[begin : match.start()])
            ids.append(self.token_id(match.group()))
            begin = match.end()
        return ids + self._model.encode(text[begin:])

    def encode_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
        """Returns ids of a text with its special tokens, and their characters."""
        ids, offsets, begin = [], [], 0
        for match in [*(self._finder.finditer(text) if self._finder else ()), None]:
            end = len(text) if match is None else match.start()
            made = self._pieces_of(text[begin:end])
            ids += [number for number, _, _ in made]
            offsets += [(begin + low, begin + high) for _, low, high in made]
            if match is not None:
                ids.append(self.token_id(match.group()))
                offsets.append(match.span())
                begin = match.end()
        return ids, np.array(offsets, np.int64).reshape(-1, 2)

    def _pieces_of(self, text: str) -> list[tuple[int, int, int]]:
        """(id, first character, end) of each piece of a text."""
        try:
            made = self._model.encode(text, return_type="offset_mapping")
        except TypeError:  # before 0.2.2 the library called it otherwise
            pieces = self._model.encode(text, out_type="immutable_proto").pieces
            return [(piece.id, piece.begin, piece.end) for piece in pieces]
        return [(i, *place) for i, place in zip(made["ids"], made["offsets"], strict=True)]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text; control symbols give nothing, added tokens are written out."""
        parts, run = [], []
        for number in ids:
            if number < self._pieces:
                run.append(number)
            elif number in self._texts:  # others only pad a model's vocabulary
                parts += [self._model.decode(run), self._texts[number]]
                run = []
        return "".join([*parts, self._model.decode(run)])

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token by its name in the vocabulary; None when there is none."""
        if token in self._added:
            return self._added[token]
        found = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None


class TiktokenTokenizer(_Native):
    """A file of tiktoken ranks; special tokens written in a text are ordinary text. Errors:
    `DataError`, `UsageError`.

    How text is split stands in `NAME.json` beside `NAME.tiktoken`: {"pattern": "...",
    "special_tokens": {token: id}}; encodings that OpenAI publishes need none when the file has
    their name.
    """

    kind = "tiktoken"

    def __init__(self, path: Path) -> None:
        library = optional.need_for_file("tiktoken", str(path))
        self.path, data = path, _read(path)
        pattern, self._special_tokens = _rules(path)
        ranks = _ranks(path, data)
        try:
            self._encoding = library.Encoding(
                path.stem,
                pat_str=pattern,
                mergeable_ranks=ranks,
                special_tokens=self._special_tokens,
            )
        except (ValueError, AssertionError) as error:
            raise DataError(f"{path} cannot be used with its rules: {error}.") from error
        self.vocab_size = self._encoding.n_vocab
        self._numbers = {*ranks.values(), *self._special_tokens.values()}
        rules = json.dumps([pattern, self._special_tokens], sort_keys=True).encode()
        self.fingerprint = f"tiktoken-{_digest(data + rules)}"

    @property
    def eod(self) -> int:
        """Returns the id of <|endoftext|>, <|end_of_text|> or </s>. Errors: `DataError`."""
        for token in (_END, "<|end_of_text|>", "</s>"):
            if token in self._special_tokens:
                return self._special_tokens[token]
        raise DataError(
            f"{self.path.with_suffix('.json')} names no special token {_END} that could end a "
            "document."
        )

    @property
    def specials(self) -> set[int]:
        """Ids of the special tokens of the rules."""
        return set(self._special_tokens.values())

    @property
    def special_texts(self) -> set[str]:
        """Returns the special tokens of the rules as they are written."""
        return set(self._special_tokens)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Returns ids of a text; `special` lets special tokens written in it become their ids."""
        return (
            self._encoding.encode(text, allowed_special="all")
            if special
            else self._encoding.encode_ordinary(text)
        )

    def encode_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
        """Returns ids of a text with its special tokens, and their characters."""
        ids = self.encode(text, special=True)
        begins = np.array(self._encoding.decode_with_offsets(ids)[1], np.int64)
        ends = np.maximum(np.append(begins[1:], len(text)), begins + 1)
        return ids, np.stack([begins, ends[: len(ids)]], axis=1)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text; an id without a token, such as of a row that only pads a model's
        vocabulary, gives nothing.
        """
        return self._encoding.decode([number for number in ids if number in self._numbers])

    def token_id(self, token: str) -> int | None:
        """Returns the id of a special token, or of an ordinary one by its text; None when there is
        none.
        """
        try:
            return self._encoding.encode_single_token(token)
        except KeyError:
            return None


def _rules(path: Path) -> tuple[str, dict[str, int]]:
    """(pattern, special tokens) of a rank file."""
    side = path.with_suffix(".json")
    if not side.exists():
        if path.stem in KNOWN:
            return KNOWN[path.stem]
        raise UsageError(
            f"{path} does not say how text is split: write {side.name} beside it, "
            f'{{"pattern": "...", "special_tokens": {{"{_END}": id}}}}, or give the file one of '
            f"the names {', '.join(KNOWN)} if it is that encoding."
        )
    try:
        value = definition.parse_json_object(definition.read_bytes(side), side)
        pattern, specials = value["pattern"], value["special_tokens"]
        if isinstance(pattern, str) and all(
            definition.checked_id(one) == one for one in specials.values()
        ):
            return pattern, specials
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError):
        pass
    raise DataError(f'{side} must hold {{"pattern": text, "special_tokens": {{token: id}}}}.')


def _ranks(path: Path, data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = definition.checked_id(int(rank))
            except (ValueError, binascii.Error):
                raise DataError(
                    f"{path}:{number}: want a base64 token and its rank, such as 'IQ== 0'."
                ) from None
    if not ranks:
        raise DataError(f"{path} holds no ranks.")
    return ranks


def _read(path: Path) -> bytes:
    try:
        return definition.read_bytes(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
