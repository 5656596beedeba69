"""What a worker of preprocessing does: parse a chunk of text and tokenise it. Pure functions of chunk and job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from megallm.data import accelerated, readers, textfile, tokenizer


@dataclass(frozen=True)
class Job:
    """What a worker needs to know beside the chunk.

    `opening` and `closing` stand before and behind each text; `backend`: `accelerated.FAST`, anything else is the plain
    one.
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

    `lines` [documents] are the lines that the documents begin on, counted from 0 in the chunk.
    """

    parsed: readers.Parsed
    lines: np.ndarray
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    characters: int


@cache
def encoder_of(spec: str, backend: str) -> tokenizer.Encoder:
    """The tokenizer of this process; a forked worker inherits the parent's."""
    plain = tokenizer.load(spec)
    return accelerated.choose(plain, backend, ())[0] if backend == accelerated.FAST else plain


def encode_chunk(job: Job, chunk: readers.Chunk) -> Encoded:
    """Parse and tokenise: all the work that is worth dividing."""
    parsed = readers.parse(chunk, job.options)
    encoder, columns, characters = encoder_of(job.tokenizer, job.backend), [], 0
    for column in range(len(job.options.keys)):
        texts = [document[column] for _, document in parsed.documents]
        columns.append(join(*encoder.encode_joined(texts), job))
        characters += sum(map(len, texts))
    lines = np.fromiter((line for line, _ in parsed.documents), np.int64, len(parsed.documents))
    parsed.documents = []
    return Encoded(parsed, lines, columns, characters)


def join(ids: np.ndarray, lengths: np.ndarray, job: Job) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens back to back, lengths of the sequences, sequences of each document); an empty text has none.

    ids [sum(lengths)]; opening and closing go around every text that has tokens.
    """
    full = lengths > 0
    ends = np.cumsum(lengths)[full]
    tokens, around = ids.astype(np.dtype(job.dtype)), (*job.opening, *job.closing)
    if around:
        places = (ends - lengths[full], ends)  # those of one text before those of the next: insert keeps their order
        places = np.repeat(np.stack(places, 1).ravel(), np.tile((len(job.opening), len(job.closing)), len(ends)))
        tokens = np.insert(tokens, places, np.tile(around, len(ends)))
    return tokens, (lengths[full] + len(around)).astype(np.int32), full.astype(np.uint8)


def sample_texts(inputs: Sequence[str], options: readers.ReadOptions, characters: int = 1 << 16) -> list[str]:
    """Texts from the beginning of the input, as many as `characters`: what backends are compared on.

    Nothing is taken from a pipe, which can be read only once.
    """
    found: list[str] = []
    for name in [name for name in inputs if not textfile.is_stream(name)][:1]:
        for chunk in readers.chunks(name, options):
            for _, document in readers.parse(chunk, options).documents:
                found += document
                characters -= sum(map(len, document))
                if characters < 0:
                    return found
    return found
