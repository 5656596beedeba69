"""As much of a corpus as a tokenizer is to learn from: spread over all of it, in pieces that are
cheap to split.

Counting words takes memory for each word that is different, and splitting a text takes about eighty
times its size; so both are bounded here: the whole by the number of bytes, one piece by `_PIECE`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from megallm.base import rng
from megallm.base.errors import UsageError
from megallm.base.progress import Progress, quiet
from megallm.data.text import readers, textfile
from megallm.data.text.readers import ReadOptions

SAMPLE_BYTES = 256 << 20
_PIECE = 1 << 15  # characters
# Where no pattern of byte-level BPE joins what stands on both sides: before a blank between two
# words.
_CUT = re.compile(r"(?<=\S) (?=\S)|(?<=\S\n)(?=\S)")
_SEED = 0


class TextSample:
    """At most `most_bytes` (UTF-8) of texts; `documents` and `text_bytes` count what was taken."""

    def __init__(self, most_bytes: int = SAMPLE_BYTES, progress: Progress = quiet) -> None:
        if most_bytes < 1:
            raise UsageError("--sample-mib must be at least 1.")
        self.most_bytes, self.progress = most_bytes, progress
        self.documents = self.text_bytes = 0

    def texts(self, inputs: Sequence[str], options: ReadOptions) -> Iterator[str]:
        """Yields the texts, in order: all of a corpus that is small enough, else of chunks that are
        chosen evenly over it.

        Of a pipe, whose size is not known, the beginning is taken. Errors: as `readers.read_texts`.
        """
        readers.check_inputs(inputs)
        share = self.most_bytes / max(1.0, sum(map(_text_bytes, inputs)))
        for text in (
            readers.read_texts(inputs, options) if share >= 1 else _spread(inputs, options, share)
        ):
            self.documents += 1
            self.text_bytes += len(text.encode("utf-8"))
            self.progress("reading", self.text_bytes, None, "bytes")
            yield text
            if self.text_bytes >= self.most_bytes:
                break
        self.progress("learning", 0, None)


def _spread(inputs: Sequence[str], options: ReadOptions, share: float) -> Iterator[str]:
    """Yields the texts of chunks that are drawn with the probability `share`."""
    key, number = rng.key_of(_SEED, "tokenizer sample"), 0
    for name in inputs:
        begin, lines = (
            0,
            1,
        )  # where in a file that is read by ranges, and the line where it is held in memory
        for chunk in readers.chunks(name, options):
            number += 1
            if float(rng.uniform(key, number, 1)[0]) < share:
                parsed = readers.parse_chunk(chunk, options)
                for line, reason in parsed.rejects:
                    raise readers.rejected(name, lines + _lines_before(name, begin) + line, reason)
                for _, document in parsed.documents:
                    yield from document
            begin = begin if chunk.data else chunk.end or begin
            lines += chunk.data.count(b"\n") if chunk.data else len(chunk.rows or ())


def _lines_before(name: str, end: int) -> int:
    """Lines in the first `end` bytes of a file."""
    if not end:
        return 0
    with open(name, "rb") as file:
        return sum(file.read(min(1 << 20, end - at)).count(b"\n") for at in range(0, end, 1 << 20))


def _text_bytes(name: str) -> float:
    """About how much text a file holds, from its size and how its beginning unpacks; 0 for a
    pipe.
    """
    if textfile.is_stream(name):
        return 0.0
    with textfile.damage(name), textfile.opened(name) as file:
        size = os.path.getsize(name)
        if not file.packing:
            return float(size)
        start = len(file.start(textfile.BLOCK_BYTES))
        return size * max(1.0, start / max(1, min(size, file.raw.tell())))


def split_long_text(text: str) -> Iterator[str]:
    """Yields a long text, cut where the words that a tokenizer splits it into stay the same."""
    begin = 0
    while len(text) - begin > _PIECE:
        match = _CUT.search(text, begin + _PIECE)
        if match is None:
            break
        yield text[begin : match.start()]
        begin = match.start()
    yield text[begin:]
