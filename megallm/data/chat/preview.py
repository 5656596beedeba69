"""The first rows as a person sees them: which tokens are trained. Pure.

On a terminal the trained tokens are coloured; as plain text they stand between `[[` and `]]`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from megallm.data.chat.cache import Tokenised
from megallm.data.chat.rows import LabelledRow, PreferenceRow, PromptRow, RankedRow, Row, SftRow
from megallm.data.text.tokenizer import Tokenizer

BEGIN, END, STYLE = "[[", "]]", "bold green"

TextPiece = tuple[str, bool]  # a text, and whether its tokens are trained


def text_pieces(row: SftRow, words: Tokenizer) -> list[TextPiece]:
    """Returns the text of a sequence, cut where trained tokens begin and end.

    The first token of a sequence has nothing before it and is never predicted.
    """
    ids, trained = row.ids.tolist(), row.trained.tolist()
    trained[:1] = [False] * len(trained[:1])
    cuts = [0, *(i for i in range(1, len(ids)) if trained[i] != trained[i - 1]), len(ids)]
    return [
        (words.decode(ids[a:b]), trained[a]) for a, b in zip(cuts, cuts[1:], strict=False) if a < b
    ]


def lines(row: Row, words: Tokenizer) -> Iterator[tuple[str, list[TextPiece]]]:
    """Yields (what it is, its pieces) of each sequence of a row."""
    if isinstance(row, PreferenceRow):
        more = f", margin {row.margin:g}" if row.margin else ""
        yield f"chosen ({_sizes(row.chosen)}{more})", text_pieces(row.chosen, words)
        yield f"rejected ({_sizes(row.rejected)})", text_pieces(row.rejected, words)
    elif isinstance(row, RankedRow):
        for rank, one in zip(row.ranks, row.sequences, strict=True):
            yield f"rank {rank} ({_sizes(one)})", text_pieces(one, words)
    elif isinstance(row, LabelledRow):
        yield f"label {row.label:g} ({_sizes(row.sequence)})", text_pieces(row.sequence, words)
    elif isinstance(row, PromptRow):
        columns = json.dumps(dict(row.columns), ensure_ascii=False)
        yield f"prompt ({len(row.ids)} tokens)", [(words.decode(row.ids.tolist()), False)]
        yield "columns", [(columns[:300], False)]
    else:
        yield f"row ({_sizes(row)})", text_pieces(row, words)


def _sizes(row: SftRow) -> str:
    return f"{len(row.ids)} tokens, {int(row.trained[1:].sum())} trained"


def preview(row: Row, words: Tokenizer) -> str:
    """Returns a row as plain text, its trained tokens in double brackets."""
    return "\n".join(
        f"--- {said}\n"
        + "".join(f"{BEGIN}{text}{END}" if trained else text for text, trained in found)
        for said, found in lines(row, words)
    )


def first_rows(sources: Mapping[str, Tokenised], words: Tokenizer, count: int = 3) -> str:
    """Returns the first rows of every source as plain text: what RUN/first_rows.txt holds."""
    parts = [
        f"{name}, line {int(one.table[number]['line'])}\n{preview(one.row(number), words)}\n"
        for name, one in sources.items()
        for number in range(min(count, len(one)))
    ]
    return f"Trained tokens stand in {BEGIN} {END}.\n\n" + "\n".join(parts)


def show_row(row: Row, words: Tokenizer, console: Any) -> None:
    """Print a row on a console of `base.terminal`, its trained tokens coloured."""
    from rich.text import Text

    for said, found in lines(row, words):
        text = Text().append(f"{said}\n", style="dim")
        for piece, trained in found:
            text.append(piece, style=STYLE if trained else "")
        console.print(text, soft_wrap=True)
