"""The King James Bible as JSON Lines, one chapter a document: python corpus.py kjv.txt.xz OUT.jsonl

The text (1611, public domain) has one verse a line, `Ge1:1 In the beginning ...`. Chapters are written without their
numbers, one verse a line, in a shuffled order that never changes: the split into training and held-out text is by
position, and held-out chapters should come from all books.
"""

from __future__ import annotations

import json
import lzma
import random
import re
import sys
from pathlib import Path

CHAPTERS, VERSES = 1189, 31102
VERSE = re.compile(r"(\d?[A-Za-z]+)(\d+):\d+ (.+)")


def read_chapters(path: Path) -> dict[str, list[str]]:
    """`"Ge 1"` -> its verses, in the order of the book; ValueError names the line that is not a verse."""
    chapters: dict[str, list[str]] = {}
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            verse = VERSE.fullmatch(line.rstrip("\n"))
            if verse is None:
                raise ValueError(f"{path}:{number}: expected a line such as 'Ge1:1 In the beginning', got {line!r}.")
            chapters.setdefault(f"{verse[1]} {verse[2]}", []).append(verse[3])
    found = len(chapters), sum(map(len, chapters.values()))
    if found != (CHAPTERS, VERSES):
        raise ValueError(f"{path} holds {found[0]} chapters and {found[1]} verses; expected {CHAPTERS} and {VERSES}.")
    return chapters


def write_documents(chapters: dict[str, list[str]], path: Path) -> None:
    """One `{"chapter", "text"}` a line."""
    names = list(chapters)
    random.Random(1611).shuffle(names)
    rows = (json.dumps({"chapter": name, "text": "\n".join(chapters[name])}) for name in names)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    try:
        write_documents(read_chapters(Path(sys.argv[1])), Path(sys.argv[2]))
    except (ValueError, EOFError, OSError, lzma.LZMAError) as error:
        sys.exit(f"corpus.py: {error}")
