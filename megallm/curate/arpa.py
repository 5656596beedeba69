"""Reading ARPA files in Python: slow, exact, without any package; kenlm does the same fast."""

from __future__ import annotations

from pathlib import Path

from megallm.base.errors import DataError

_BEGIN, _END, _UNKNOWN = "<s>", "</s>", "<unk>"


class ArpaModel:
    """Backoff n-gram model. `score` has kenlm's meaning: log10 probability of a sentence with <s>
    and </s>.
    """

    def __init__(self, path: str | Path) -> None:
        self.table: dict[tuple[str, ...], tuple[float, float]] = {}
        self.order = 0
        try:
            with open(path, encoding="utf-8") as file:
                self._read(file)
        except (OSError, UnicodeDecodeError, ValueError, IndexError) as error:
            raise DataError(f"{path} is not an ARPA file that can be read: {error}.") from error
        if not self.order:
            raise DataError(f"{path} is not an ARPA file: it has no n-grams.")

    def _read(self, file: object) -> None:
        size = 0
        for line in file:  # type: ignore[attr-defined]
            line = line.rstrip("\n")
            if line.startswith("\\") and line.endswith("-grams:"):
                size = int(line[1:-7])
                self.order = max(self.order, size)
            elif size and line and not line.startswith("\\"):
                parts = line.split("\t")
                key = tuple(parts[1].split(" "))
                self.table[key] = (float(parts[0]), float(parts[2]) if len(parts) > 2 else 0.0)

    def word(self, context: tuple[str, ...], word: str) -> float:
        """Returns log10 p(word | context)."""
        context = context[max(0, len(context) - self.order + 1) :]
        found = self.table.get((*context, word))
        if found is not None:
            return found[0]
        if not context:
            return self.table[(_UNKNOWN,)][0]
        return self.table.get(context, (0.0, 0.0))[1] + self.word(context[1:], word)

    def score(self, sentence: str) -> float:
        """Returns log10 p(sentence </s> | <s>)."""
        known = [word if (word,) in self.table else _UNKNOWN for word in sentence.split()]
        total, context = 0.0, (_BEGIN,)
        for word in [*known, _END]:
            total += self.word(context, word)
            context = (*context, word)[-self.order :]
        return total
