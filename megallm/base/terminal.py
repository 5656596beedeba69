"""What is printed cannot steer the terminal: control characters in it are written out, as in
`\\x1b`.

Paths, keys of a file, tokens and texts come from others; printed raw, an ESC in them moves the
cursor, hides lines or sets the title of the window. `escaping` puts the one filter in front of
stdout and stderr, in `cli.main` and in each rank; what draws (rich) is made by `console` and passes
the filter with its own codes only.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# All of C0 but tab and newline, DEL, C1, lone surrogates (undecodable bytes of a file name), and
# the characters that turn the direction of the text around them (U+202A and so on), which make a
# line read otherwise than it is.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
STANDARD_OUTPUT = "The standard output"
_REDRAW = re.compile(
    "(\r(\x1b\\[[0-2]?K)?)?"
)  # how a line of progress begins: back to the left, erase


def escaped(text: str) -> str:
    """Returns the text with each control character as its escape in Python: `\\x1b[31m` instead of
    red.
    """
    return _CONTROL.sub(lambda match: _written(ord(match[0])), text)


def _written(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


class Escaping:
    """A text stream that writes `escaped` text: results, or with `notes` what is only told, as
    stderr is.

    A note may begin with a carriage return (progress), and one that cannot be written is dropped.
    Of a result that is an OSError, whose file name says so.
    """

    def __init__(self, raw: TextIO, notes: bool = False) -> None:
        self.raw, self.notes = raw, notes

    def write(self, text: str) -> int:
        """Write a text, and return how many of its characters were taken: all."""
        begin = _REDRAW.match(text).end() if self.notes else 0
        with self._failing():
            self.raw.write(text[:begin] + escaped(text[begin:]))
        return len(text)

    def flush(self) -> None:
        """Write what waits."""
        with self._failing():
            self.raw.flush()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.notes:
                error.filename = STANDARD_OUTPUT
                raise

    def writelines(self, lines: list[str]) -> None:
        """Write each text."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.raw)


def escape_streams() -> None:
    """Put the filter in front of this process's stdout and stderr, for good."""
    sys.stdout = _filtered(sys.stdout, notes=False)
    sys.stderr = _filtered(sys.stderr, notes=True)


@contextmanager
def escaping() -> Iterator[None]:
    """Put the filter in front of stdout and stderr inside the block."""
    before = sys.stdout, sys.stderr
    escape_streams()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _filtered(stream: Any, notes: bool) -> Any:
    """Returns the stream behind the filter, once; None (a closed stream) stays None."""
    return stream if stream is None or isinstance(stream, Escaping) else Escaping(stream, notes)


def console(stream: Any = None, **options: Any) -> Console:
    """Returns a rich console on `stream` (stdout when None) whose texts are escaped, while its own
    colours and moves pass.
    """
    from rich.console import Console
    from rich.segment import Segment

    class Filtered(Console):
        """Escapes what is rendered; control segments are rich's own."""

        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else escaped(text), style, control)

    stream = sys.stdout if stream is None else stream
    return Filtered(file=stream.raw if isinstance(stream, Escaping) else stream, **options)
