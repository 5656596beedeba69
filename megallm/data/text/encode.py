"""What a worker of preprocessing does: parse a chunk of text and tokenise it. Pure functions of
chunk and job.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megallm.data.text import accelerated, readers, tokenizer


@dataclass(frozen=True)
class EncodeJob:
    """What a worker needs to know beside the chunk.

    `opening` and `closing` stand before and behind each text; `backend`: `accelerated.FAST`,
    anything else is the plain one.
    """

    tokenizer: str
    options: readers.ReadOptions
    dtype: str
    opening: tuple[int, ...]
    closing: tuple[int, ...]
    backend: str


@dataclass
class Encoded:
    """A tokenised chunk; per key (tokens, lengths of the sequences, sequences of each document).

    `lines` [documents] are the lines that the documents begin on, counted from 0 in the chunk;
    `by_tokenizers` texts were left to `tokenizers` by the fast backend.
    """

    parsed: readers.Parsed
    lines: np.ndarray
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    characters: int
    by_tokenizers: int = 0


_made: dict[tuple[str, str], tokenizer.Encoder] = {}  # of this process, by tokenizer and backend


def choose_encoder(spec: str, wanted: str) -> tuple[tokenizer.Encoder, str]:
    """Returns the tokenizer, read anew, and the backend: gigatoken wherever it is proved. Errors:
    `DataError`, `UsageError`.
    """
    plain = tokenizer.load(spec, check=wanted == accelerated.PLAIN)
    found, backend = accelerated.choose_tokenizer(plain, wanted)
    if isinstance(found, tokenizer.FolderTokenizer) and backend != accelerated.FAST:
        found.check()
    _made.clear()
    _made[spec, backend] = found
    return found, backend


def encoder_of(spec: str, backend: str) -> tokenizer.Encoder:
    """Returns the tokenizer of this process; a forked worker inherits the parent's."""
    if (spec, backend) not in _made:
        _made[spec, backend], _ = choose_encoder(
            spec, accelerated.FAST if backend == accelerated.FAST else accelerated.PLAIN
        )
    return _made[spec, backend]


def encode_chunk(job: EncodeJob, chunk: readers.Chunk) -> Encoded:
    """Parse and tokenise: all the work that is worth dividing."""
    parsed = readers.parse_chunk(chunk, job.options)
    encoder, columns, characters = encoder_of(job.tokenizer, job.backend), [], 0
    left = _by_tokenizers(encoder)
    for column in range(len(job.options.keys)):
        texts = [document[column] for _, document in parsed.documents]
        columns.append(join(*encoder.encode_joined(texts), job))
        characters += sum(map(len, texts))
    lines = np.fromiter((line for line, _ in parsed.documents), np.int64, len(parsed.documents))
    parsed.documents = []
    return Encoded(parsed, lines, columns, characters, _by_tokenizers(encoder) - left)


def _by_tokenizers(encoder: tokenizer.Encoder) -> int:
    return encoder.by_tokenizers if isinstance(encoder, accelerated.AcceleratedTokenizer) else 0


def join(
    ids: np.ndarray, lengths: np.ndarray, job: EncodeJob
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (tokens back to back, lengths of the sequences, sequences of each document); an empty
    text has none.

    ids [sum(lengths)]; opening and closing go around every text that has tokens.
    """
    full = lengths > 0
    ends = np.cumsum(lengths)[full]
    tokens, around = ids.astype(np.dtype(job.dtype)), (*job.opening, *job.closing)
    if around:
        places = (
            ends - lengths[full],
            ends,
        )  # those of one text before those of the next: insert keeps their order
        places = np.repeat(
            np.stack(places, 1).ravel(), np.tile((len(job.opening), len(job.closing)), len(ends))
        )
        tokens = np.insert(tokens, places, np.tile(around, len(ends)))
    return tokens, (lengths[full] + len(around)).astype(np.int32), full.astype(np.uint8)
