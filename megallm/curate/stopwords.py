"""Frequent short words of some languages: running text has them, lists and tables do not."""

from __future__ import annotations

from functools import cache

import numpy as np

from megallm.curate.text import Analysis

STOP_WORDS = {
    "en": "the be to of and that have with is in for it as was on are",
    "de": "der die das und ist nicht mit von zu den ein eine im für auf sich",
    "fr": "le la les de des et est un une dans que pour qui pas sur du",
    "es": "el la los las de y que en un una es por con para no se",
    "it": "il la di e che un una per non con del della sono si le gli",
    "pt": "o a os as de e que em um uma para com não por se do da",
    "nl": "de het een en van is dat niet te op met voor zijn die aan",
    "pl": "i w na z do się nie to jest że od jak lub dla po",
    "ru": "и в не на что с по это для как из или от а к если",
    "sv": "och att det i en som är på för med av den inte om",
    "da": "og at det i en er som på for med af den ikke til",
    "cs": "a je v na se že to s z do pro jako nebo by",
    "tr": "ve bir bu da de için ile olarak daha çok olan gibi",
    "fi": "ja on ei se että ovat oli tai kuin mutta voi joka",
}


@cache
def hashes_of(words: str) -> np.ndarray:
    """Sorted word hashes of the words of a line of text, uint64."""
    return np.unique(Analysis([words]).words.hashes)


def counts(analysis: Analysis, languages: list[str | None]) -> np.ndarray:
    """How many different stop words of its language each document has; -1 where we know none, int64 [documents]."""
    out = np.full(len(analysis), -1, np.int64)
    words = analysis.words
    for language in sorted({name or "en" for name in languages} & set(STOP_WORDS)):
        table = hashes_of(STOP_WORDS[language])
        place = np.searchsorted(table, words.hashes)
        found = np.flatnonzero(table[np.minimum(place, len(table) - 1)] == words.hashes)
        seen = np.zeros((len(analysis), len(table)), bool)
        seen[words.documents[found], place[found]] = True
        rows = np.array([(name or "en") == language for name in languages])
        out[rows] = seen.sum(axis=1)[rows]
    return out
