"""D.27: what looks alike compares alike in every step that compares texts (found of 60 planted:
full width 5, zero width 40, NFD 56)."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

import pytest

from megallm.curate import exact, near
from megallm.curate.config import NearConfig, ToxicityConfig
from megallm.curate.folding import comparable
from megallm.curate.quality import measure
from megallm.curate.text import Analysis
from megallm.curate.toxicity import Toxicity

from .test_chain import prose

ACCENTS = str.maketrans("aeiou", "áèîõü")
SMALL_CAPITALS = str.maketrans("abcdefghijklmnoprstuvwyz", "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ")
CYRILLIC = str.maketrans("aceopxyABEHKMT", "асеорхуАВЕНКМТ")
DISGUISES: dict[str, Callable[[str], str]] = {
    "full width": lambda text: "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text),
    "zero width": lambda text: "\u200b".join(text),
    "joiners and marks of direction": lambda text: "\u2060\u200e".join(text),
    "soft hyphens": lambda text: "\u00ad".join(text),
    "variation selectors": lambda text: "".join(f"{char}\ufe0f" for char in text),
    "tags": lambda text: "\U000e0061".join(text),
    "NFD": lambda text: unicodedata.normalize("NFD", text.translate(ACCENTS)),
    "accents": lambda text: text.translate(ACCENTS),
    "marks": lambda text: "".join(f"{char}\u0323\u0301" if char.isalpha() else char for char in text),
    "struck out": lambda text: "".join(f"{char}\u0336" if char.isalpha() else char for char in text),
    "capitals": str.upper,
    "mathematical letters": lambda text: "".join(
        chr(0x1D41A + ord(char) - 97) if "a" <= char <= "z" else char for char in text
    ),
    "circled letters": lambda text: "".join(
        chr(0x24D0 + ord(char) - 97) if "a" <= char <= "z" else char for char in text
    ),
    "small capitals": lambda text: text.translate(SMALL_CAPITALS),
    "ligatures": lambda text: text.replace("ff", "ﬀ").replace("fi", "ﬁ").replace("st", "ﬆ"),
    "long s": lambda text: text.replace("s", "ſ"),
    "Cyrillic look-alikes": lambda text: text.translate(CYRILLIC),
    "blanks": lambda text: text.replace(" ", "\u00a0\u2003").replace("\n", "\u2028"),
}
PUNCTUATION: dict[str, Callable[[str], str]] = {
    "emphasis": lambda text: " ".join(f"_{word}_" for word in text.split()),
    "stars": lambda text: " ".join(f"**{word}**" for word in text.split()),
    "dashes": lambda text: text.replace(" ", " — "),
    "quotes": lambda text: " ".join(f"“{word}”" for word in text.split()),
}


@pytest.mark.parametrize("name", [*DISGUISES, *PUNCTUATION])
def test_steps_see_through(name: str) -> None:
    """Words, near duplicates and listed words; exact keys where punctuation is the same."""
    plain = "The first official staff finish just before the festival of Saint Felix. "
    plain += prose(3, 40).replace("\n", " ")
    disguised = (DISGUISES | PUNCTUATION)[name](plain)
    words, others = Analysis([plain]).words, Analysis([disguised]).words
    assert words.hashes.tolist() == others.hashes.tolist()
    sets, offsets = near.shingles(Analysis([plain, disguised]), NearConfig().ngram)
    assert (sets[: offsets[1]] == sets[offsets[1] :]).all() and offsets[1] > 20
    if name in DISGUISES:
        assert exact.text_key(plain) == exact.text_key(disguised)
    step = Toxicity(ToxicityConfig(score=False))
    rude = "what the fucking shit of a motherfucker"
    assert len(step.matches(Analysis([(DISGUISES | PUNCTUATION)[name](rude)]).words)) == 3


def test_what_is_written_in_two_ways_and_what_is_not_the_same() -> None:
    same = [
        ("Straße", "STRASSE"), ("한국어", unicodedata.normalize("NFD", "한국어")),
        ("ｶﾞﾗｽ", "ガラス"), ("İstanbul", "istanbul"),
        ("ΟΔΟΣ", "οδος"), ("Łódź", "lodz"), ("don’t", "donʼt".replace("ʼ", "’")), ("x²", "x2"),
        ("№ 5", "No 5"),
        ("كِتَاب", "كتاب"), ("שָׁלוֹם", "שלום"), ("½", "1⁄2"), ("Ⅳ", "IV"), ("\ufefftext", "text"),
        ("a\r\n\tb ", "a b"), ("الســـلام", "السلام"),
    ]  # fmt: skip
    for one, other in same:
        assert comparable(one) == comparable(other), (one, other)
    for one, other in (
        ("x = y", "x ≠ y"), ("x = y", unicodedata.normalize("NFD", "x ≠ y")), ("a + b", "a - b"),
        ("हिन्दी", "हन्दी"), ("a b", "ab"),
        ("Foo™", "Footm"), ("がか", "がき"), ("한국어", "한국"), ("10", "1 0"),
    ):  # fmt: skip
        assert comparable(one) != comparable(other), (one, other)


def test_measures_of_quality_do_not_depend_on_how_accents_are_written() -> None:
    text = "Größe und Häuser über Äpfel, schöne Straßen für alle Bürger. " * 3
    texts = [text, unicodedata.normalize("NFD", text), "\u00ad".join(text)]
    for name, values in measure(Analysis(texts), texts, ["de"] * 3).items():
        assert values.tolist() == [values[0]] * 3, name
    again = ["The library opens at nine o'clock.\nThe\u200b library opens at nine o’clock.".replace("’", "'")]
    assert measure(Analysis(again), again, ["en"])["dup_line_share"].tolist() == [0.5]
