"""Every answer of a file's rows as tokens, in the order of the file: what a reward model scores.
Pure.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megallm.base.errors import DataError
from megallm.data.chat.config import ChatDataConfig
from megallm.data.chat.formats import FORMATS, answers_of
from megallm.data.chat.messages import BadRow
from megallm.data.chat.prepare import template_of
from megallm.data.chat.records import records
from megallm.data.chat.rows import RowMaker, RowRules
from megallm.data.chat.spans import Speaker
from megallm.data.chat.template import Renderer
from megallm.data.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answers:
    """A row of a file as it stands there, and the ids int32 of each of its answers, written as
    `megallm reward` trains them; `several`: whether the row names more than one.
    """

    row: dict[str, Any]
    sequences: list[np.ndarray]
    several: bool


def read_answers(name: str, config: ChatDataConfig, words: Tokenizer) -> list[Answers]:
    """Returns the rows of a file; of `config` the tokenizer, the template, `strings` and `seq_len`
    matter. Errors: DataError `file:line: reason` for a row that cannot be scored.
    """
    template, _ = template_of(config, words)
    ends = (*words.special_texts, *template.stops, template.tokens.get("eos_token", ""))
    found: list[Answers] = []
    with ExitStack() as stack:
        renderer = stack.enter_context(Renderer(template, config.template_date))
        # A row with a label is what a head reads whole; the label itself is not looked at.
        rules = RowRules("classification", "all", config.seq_len, "error")
        maker = RowMaker(words, lambda: Speaker(renderer, ends), rules)
        form = None
        for record in records(name):
            try:
                if record.row is None:
                    raise BadRow(record.reason)
                form = form or next((f for f in FORMATS if not f.missing(record.row)), None)
                if form is None:
                    raise BadRow(f"the columns {', '.join(list(record.row)[:12])} are not known")
                made = answers_of(form, record.row, config.strings)
                options: dict[str, Any] = dict(config.template_options)
                sequences = [
                    maker.rows(replace(one, label=0.0, options=options | dict(one.options)))[0]
                    for one in made
                ]
            except BadRow as bad:
                raise DataError(f"{name}:{record.line}: {bad}.") from None
            ids = [one.sequence.ids for one in sequences]
            found.append(Answers(record.row, ids, form.natural in ("pair", "several")))
    if not found:
        raise DataError(f"{name} holds no row.")
    return found
