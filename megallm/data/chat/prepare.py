"""From the section `data` to tokenised sources: files found, formats told, rows made or taken from
the cache. Pure.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megallm.base.errors import DataError, UsageError
from megallm.data.chat import cache as caches
from megallm.data.chat.cache import Made, Tokenised, Writer
from megallm.data.chat.config import ChatDataConfig
from megallm.data.chat.formats import RowKind, RowReading, detect_format, examples
from megallm.data.chat.messages import BadRow
from megallm.data.chat.records import records
from megallm.data.chat.rows import RowCounts, RowMaker, RowRules
from megallm.data.chat.spans import Speaker
from megallm.data.chat.template import CHATML, CHATML_STOPS, ChatTemplate, Renderer, find_template
from megallm.data.text import tokenizer
from megallm.data.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prepared:
    """Tokenised sources: file -> rows, and file -> weight. `notes` are lines for a person."""

    kind: RowKind
    config: ChatDataConfig
    words: Tokenizer
    template: ChatTemplate
    sources: Mapping[str, Tokenised]
    weights: Mapping[str, float]
    notes: tuple[str, ...]

    def check_vocabulary(self, vocab_size: int) -> None:
        """Errors: DataError when a row has an id that a model of `vocab_size` tokens lacks."""
        for name, source in self.sources.items():
            if source.largest >= vocab_size:
                raise DataError(
                    f"{name} has the token {source.largest} with the tokenizer "
                    f"{self.config.tokenizer}, but model.vocab_size is {vocab_size}: give the "
                    "model "
                    f"at least {source.largest + 1} tokens, or use its own tokenizer."
                )

    def check_classes(self, num_labels: int) -> None:
        """Errors: DataError `file:line: reason` when a row's label is no class of a model that has
        `num_labels` of them.
        """
        for name, source in self.sources.items():
            for row in source.table[source.table["label"] >= num_labels][:1]:
                raise DataError(
                    f"{name}:{row['line']}: label is {row['label']:g}, but model.num_labels is "
                    f"{num_labels}, so classes go from 0 to {num_labels - 1}: mend the row, or "
                    "give the model more classes."
                )

    @property
    def has_margins(self) -> bool:
        """Whether any pair has a margin."""
        return any(source.table["margin"].any() for source in self.sources.values())

    @property
    def per_row(self) -> int:
        """Most sequences of a row: 2 of pairs."""
        return max(source.most_sequences for source in self.sources.values())

    @property
    def counts(self) -> RowCounts:
        """What became of the rows of all files."""
        total = RowCounts()
        for source in self.sources.values():
            total.add(vars(source.counts))
        return total


def silent(line: str) -> None:
    """Tells nobody."""


def prepare(
    config: ChatDataConfig,
    kind: RowKind,
    cache: Path,
    valid: bool = False,
    note: Callable[[str], None] = silent,
) -> Prepared:
    """Tokenise the sources (or `valid_sources`) of a section, or find them in the folder `cache`.

    In a job of several processes the first does so, the others after it: they find all of it there.
    `note` gets each line as soon as it is known. Errors: UsageError for the section, DataError
    `file:line: reason` for rows.
    """
    faults = [*config.faults()]
    if faults:
        raise UsageError(" ".join(faults))
    if config.tokenizer is None:
        raise UsageError("data.tokenizer is not given: name a tokenizer's folder, or 'bytes'.")
    words = tokenizer.load(config.tokenizer)
    template, said = template_of(config, words)
    notes = [said]
    note(said)

    def tell(line: str) -> None:
        notes.append(line)
        note(line)

    found = files_of(config.valid_sources if valid else config.sources)
    workshop = _Workshop(config, kind, words, template, tell)
    sources = {name: workshop.tokenised(name, cache) for name in found}
    return Prepared(
        kind, config, words, template, sources, weights_of(found, sources, config), tuple(notes)
    )


def template_of(config: ChatDataConfig, words: Tokenizer) -> tuple[ChatTemplate, str]:
    """Returns the template that the section names, and a line that says which. Errors: DataError.
    """
    spec = Path(config.tokenizer)
    found = find_template(
        spec if spec.is_dir() else spec.parent if spec.is_file() else None, words.special_texts
    )
    if config.template == "chatml":
        specials = tuple(sorted({*found.specials, *CHATML_STOPS}))
        found = ChatTemplate(CHATML, "ChatML (data.template)", found.tokens, specials)
    elif config.template is not None:
        try:
            text = Path(config.template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.template {config.template} cannot be read: {error}.") from error
        found = replace(found, source=text, origin=config.template, stops=(), built_in=False)
    elif found.built_in:
        return found, (
            f"warning: the tokenizer {config.tokenizer} has no chat template: conversations are "
            "written as ChatML (data.template names another)"
        )
    return found, f"chat template: {found.origin}"


def files_of(sources: Mapping[str, float | None]) -> dict[str, float | None]:
    """Returns file -> weight; the files of a pattern share its weight. Errors: DataError for a
    pattern that fits no file, UsageError for a file that is named twice.
    """
    found: dict[str, float | None] = {}
    for name, weight in sources.items():
        names = (
            sorted(glob.glob(name, recursive=True))
            if glob.has_magic(name) and not Path(name).exists()
            else [name]
        )
        if not names:
            raise DataError(f"{name}: no file has such a name.")
        for one in names:
            if one in found:
                raise UsageError(f"{one} is named twice in the data's sources.")
            found[one] = None if weight is None else weight / len(names)
    return found


def weights_of(
    found: Mapping[str, float | None], sources: Mapping[str, Tokenised], config: ChatDataConfig
) -> dict[str, float]:
    """Returns file -> weight; without weights that of its size: tokens where rows are packed, else
    rows.
    """
    sizes = {
        name: source.counts.tokens if config.packing else len(source)
        for name, source in sources.items()
    }
    return {
        name: float(sizes[name]) if weight is None else weight for name, weight in found.items()
    }


class _Workshop:
    """Makes the rows of files with one tokenizer, template and set of rules."""

    def __init__(
        self,
        config: ChatDataConfig,
        kind: RowKind,
        words: Tokenizer,
        template: ChatTemplate,
        tell: Callable[[str], None],
    ) -> None:
        self.config, self.kind, self.words, self.template, self.tell = (
            config,
            kind,
            words,
            template,
            tell,
        )
        self.reading = RowReading(
            kind, config.strings, config.pairs, config.condition, tuple(config.return_edges)
        )
        self.rules = RowRules(kind, config.train_on, config.seq_len, config.too_long)

    def tokenised(self, name: str, cache: Path) -> Tokenised:
        """Returns the rows of a file. Errors: DataError."""
        template = self.template
        key = caches.cache_key(
            caches.content_hash(name),
            self.words.fingerprint,
            self.words.template,
            vars(template) | {"tokens": dict(template.tokens), "origin": None},
            dict(self.config.template_options),
            self.config.template_date,
            {key: value for key, value in vars(self.reading).items() if value},
            vars(self.rules),
            Path(name).suffix,
        )
        made = caches.load_or_make(
            cache, key, self.kind, lambda folder: self._make(name, key, folder), self.tell
        )
        bad = next(made.rejects(), None)
        if bad is not None and self.config.on_error == "stop":
            raise _stopped(name, *bad)
        if not len(made):
            raise DataError(
                f"{name} holds no row that can be used{_why(name, bad)} ({made.counts.told()})."
            )
        self.tell(f"{name}: {made.said}; {made.counts.told()}{_why(name, bad)}")
        return made

    def _make(self, name: str, key: str, folder: Path) -> None:
        counts, said = RowCounts(), ""
        with ExitStack() as stack:
            renderer = stack.enter_context(Renderer(self.template, self.config.template_date))
            ends = (
                *self.words.special_texts,
                *self.template.stops,
                self.template.tokens.get("eos_token", ""),
            )
            maker = RowMaker(self.words, lambda: Speaker(renderer, ends), self.rules)
            writer = Writer(folder, self.words.vocab_size)
            stack.callback(writer.close)
            for made, told in self._lines(name, maker):
                said = told or said
                counts.lines += 1
                counts.bad += bool(made.reason)
                if made.reason and self.config.on_error == "stop":
                    raise _stopped(name, made.line, made.reason)
                writer.add(made)
            counts.add(vars(maker.counts))
            writer.finish(key, said, counts)

    def _lines(self, name: str, maker: RowMaker) -> Iterator[tuple[Made, str]]:
        """What each line of a file gives, and what the file's format is said to be."""
        form, said = None, ""
        for record in records(name):
            before = replace(maker.counts)
            try:
                if record.row is None:
                    raise BadRow(record.reason)
                if form is None:
                    form, whole = detect_format(name, record.row, self.kind)
                    said = whole.removeprefix(f"{name}: ")
                made = examples(form, record.row, self.reading)
                options: dict[str, Any] = dict(self.config.template_options)
                made = [replace(one, options=options | dict(one.options)) for one in made]
                yield Made(record.line, [row for one in made for row in maker.rows(one)]), said
            except BadRow as bad:
                maker.counts = before  # of a row that is left out nothing counts
                yield Made(record.line, [], str(bad)), said


def _stopped(name: str, line: int, reason: str) -> DataError:
    return DataError(
        f"{name}:{line}: {reason}. Mend the row, or set data.on_error: skip to leave such rows out."
    )


def _why(name: str, bad: tuple[int, str] | None) -> str:
    return "" if bad is None else f"; the first that cannot, {name}:{bad[0]}: {bad[1]}"
