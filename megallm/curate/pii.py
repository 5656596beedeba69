"""Personal data: email, IP, IBAN, card, social security and telephone numbers, and access keys.

Each kind has a cheap scan for places that could hold it and a check that decides (checksums,
ranges, the phonenumbers library); emails.py, phones.py and access_keys.py have those of three
kinds. The stand-in is a pure function of what it replaces, so that two mentions of one address stay
one address; it lies in ranges that are reserved for examples, so that it can belong to nobody.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from megallm.base import extension
from megallm.curate.access_keys import find_keys, find_passwords, is_marked, scan_marks
from megallm.curate.config import PiiConfig
from megallm.curate.document import DocumentBatch, TextSpan, Verdict, edit
from megallm.curate.emails import find_emails
from megallm.curate.folding import code_points
from megallm.curate.phones import Phones

_IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
# Every address given out lies in 2000::/3 (RFC 4291), which keeps a::b of programming languages
# out.
_IPV6 = re.compile(
    r"(?<![\w:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])"
)
_BLANK = r"[ \u00a0\u2009-]"
_IBAN = re.compile(
    rf"(?<![A-Za-z0-9])[A-Za-z]{{2}}\d{{2}}(?:{_BLANK}?[A-Za-z0-9]{{4}}){{2,7}}(?:{_BLANK}?[A-Za-z0-9]{{1,3}})?"
    r"(?![A-Za-z0-9])"
)
_SSN = re.compile(r"\d{3}([- \u00a0\u2010\u2011\u2013])\d{2}\1\d{4}(?![\d-])")
# With blanks it must stand alone: a table's columns are no number.
_COLUMN_BEFORE = re.compile(r"[\w.,:/-]$|\d[.,:)]?[ \u00a0]$")
_COLUMN_AFTER = re.compile(r"\w|[ \u00a0.,/:]\(?\d")
_CARD = re.compile(rf"(?<![\d.,-])\d(?:{_BLANK}?\d){{12,18}}(?![\d-]|[.,]\d)")
_SMALL_PART = 40  # one public address in 1,700 has only parts below
_HEADING_PART = 100  # of a number that begins a line and has a title after it
_HEADING = re.compile(r"\.?[ \t]+\S")
# Digits that a line needs, and so many of one of these marks; the other kinds are looked for
# everywhere.
_LEAST = {
    "ip": (3, (("v4", 3), ("v6", 1))), "iban": (4, (("iban", 1),)), "card": (13, ()),
    "ssn": (9, ()),
    "phone": (7, ()),
}  # fmt: skip
_COUNTED = ("0", "v4", "v6", "iban")
# A number after one of these words, or at the start of a heading, is a section or version number
# and no address.
_NUMBERING = re.compile(
    r"(?<![^\W_])(?:section|sect\.|sec\.|§|chapter|version|release|rev\.?|revision|figure|table|appendix|clause|article|firmware"
    r"|build|kernel|linux|abschnitt|kapitel|tabelle|chapitre|paragraphe|capítulo|v|ver\.?|oid|draft|step|item)[\s:#(]*$",
    re.IGNORECASE,
)
_ADDRESSING = re.compile(
    r"\b(?:ips?|address|addr|host|server|dns|resolver|nameserver|ping|client|inet|gateway|peer|connected|login)\b"
    r"[\s:=(\[\"']*(?:to|from|at|is|of)?[\s:=(\[\"']*$",
    re.IGNORECASE,
)
_CARD_ISSUERS = (  # first digits, and how many digits in all
    (re.compile(r"4"), (13, 16, 19)),
    (re.compile(r"5[1-5]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)"), (16,)),
    (re.compile(r"3[47]"), (15,)),
    (re.compile(r"6(?:011|4[4-9]|5)"), (16, 19)),
    (re.compile(r"3(?:0[0-5]|[68])"), (14,)),
    (re.compile(r"35"), (16,)),
    (re.compile(r"62|81"), (16, 17, 18, 19)),  # UnionPay
    (re.compile(r"5018|5020|5038|5893|6304|6759|676[1-3]"), (16, 17, 18, 19)),  # Maestro
    (re.compile(r"220[0-4]|9792"), (16,)),  # Mir, Troy
)
_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15,
    "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24, "SI": 19,
    "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
}  # fmt: skip


def luhn(digits: str) -> bool:
    """Returns whether the last digit is the check digit of the others (ISO/IEC 7812)."""
    doubled = [2 * int(digit) for digit in digits[-2::-2]]
    return (
        sum(int(digit) for digit in digits[-1::-2])
        + sum(value - 9 * (value > 9) for value in doubled)
    ) % 10 == 0


def iban_valid(text: str) -> bool:
    """Returns whether it is an IBAN of its country's length with a right checksum modulo 97 (ISO
    13616).
    """
    code = re.sub(_BLANK, "", text).upper()
    if _IBAN_LENGTHS.get(code[:2]) != len(code):
        return False
    return int("".join(str(int(char, 36)) for char in code[4:] + code[:4])) % 97 == 1


def find_ips(text: str) -> Iterator[tuple[int, int]]:
    """Yields public addresses of version 4 and 6; section and version numbers are told by what
    stands before them.
    """
    patterns = ([_IPV4] if "." in text else []) + ([_IPV6] if ":" in text else [])
    for pattern in patterns:
        for match in pattern.finditer(text):
            if pattern is _IPV6 and ("::" not in match[0] and match[0].count(":") != 7):
                continue
            try:
                address = ipaddress.ip_address(match[0])
            except ValueError:
                continue
            if (
                address.is_global
                and not address.is_multicast
                and not _is_numbering(text, match, address.version)
            ):
                yield match.span()


def _is_numbering(text: str, match: re.Match[str], version: int) -> bool:
    """Returns whether a dotted number is the number of a section or a version: by the words before
    it, or because all its parts are small and nothing speaks of an address."""
    if version == 6:
        return False
    line = text.rfind("\n", 0, match.start()) + 1
    before = text[max(line, match.start() - 24) : match.start()]
    if _ADDRESSING.search(before):
        return False
    if _NUMBERING.search(before):
        return True
    heading = not before.strip() and _HEADING.match(text, match.end()) is not None
    return max(int(part) for part in match[0].split(".")) < (
        _HEADING_PART if heading else _SMALL_PART
    )


def find_ibans(text: str) -> Iterator[tuple[int, int]]:
    """Yields international bank account numbers, written together or in groups of four, in capitals
    or not.
    """
    for match in _IBAN.finditer(text):
        size = _IBAN_LENGTHS.get(match[0][:2].upper())
        if size is None:
            continue
        end, seen = match.start(), 0
        while end < match.end() and seen < size:
            seen += text[end].isalnum()
            end += 1
        code = text[match.start() : end]
        if seen != size or text[end : end + 1].isalnum() or not iban_valid(code):
            continue
        # Small letters are those of hashes and names, too: more than half must be digits then.
        if code.isupper() or 2 * sum(char.isdigit() for char in code) > size:
            yield match.start(), end


def find_cards(text: str) -> Iterator[tuple[int, int]]:
    """Yields payment card numbers: an issuer's prefix and length, the Luhn digit, groups of a usual
    size.
    """
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        sizes = [len(group) for group in re.split(_BLANK, match[0])]
        grouped = len(sizes) == 1 or all(3 <= size <= 7 for size in sizes) or sizes == [6, 13]
        issued = any(
            len(digits) in lengths and first.match(digits) for first, lengths in _CARD_ISSUERS
        )
        if issued and grouped and len(set(digits)) > 1 and luhn(digits):
            yield match.span()


def find_ssns(text: str) -> Iterator[tuple[int, int]]:
    """Yields social security numbers of the USA, written 123-45-6789 or 123 45 6789, without the
    numbers never given out.
    """
    for match in _SSN.finditer(text):
        area, group, serial = match[0][:3], match[0][4:6], match[0][7:]
        begin, end = match.span()
        if text[begin - 1 : begin].isdigit() or text[begin - 1 : begin] == "-":
            continue
        columns = _COLUMN_BEFORE.search(text, max(0, begin - 3), begin) or _COLUMN_AFTER.match(
            text, end
        )
        if match[1] in " \u00a0" and columns:
            continue
        if area not in ("000", "666") and area < "900" and group != "00" and serial != "0000":
            yield match.span()


class Pii:
    """The step `pii`: edits, never drops."""

    name = "pii"

    def __init__(self, config: PiiConfig) -> None:
        self.config = config
        self.marks: dict[str, tuple[float, ...]] = {}
        finders: dict[str, Callable[[str], Iterator[tuple[int, int]]]] = {
            "secret": find_keys, "email": find_emails, "iban": find_ibans, "card": find_cards,
            "ssn": find_ssns,
            "ip": find_ips,
        }  # fmt: skip
        if "phone" in config.kinds:
            finders["phone"] = Phones(config).find
        self._finders = {kind: finder for kind, finder in finders.items() if kind in config.kinds}

    def find(self, text: str) -> list[TextSpan]:
        """Returns all spans of a text with their kinds and stand-ins; where two kinds overlap the
        first of the table wins.
        """
        return self._find_all([text])[0]

    def judge(self, batch: DocumentBatch) -> list[Verdict]:
        return [
            edit(spans) for spans in self._find_all([document.text for document in batch.documents])
        ]

    def _find_all(self, texts: list[str]) -> list[list[TextSpan]]:
        """Lines with enough digits of all texts are searched as one text: no kind that has digits
        spans lines.
        """
        found: list[list[TextSpan]] = [[] for _ in texts]
        lines = lines_with_digits(texts)
        for kind, finder in self._finders.items():
            if kind not in _LEAST:
                for owner, text in enumerate(texts):
                    for begin, end in (
                        finder(text) if kind != "secret" or lines.marked[owner] else ()
                    ):
                        _take(found[owner], kind, text, begin, end)
                    for begin, end in find_passwords(text) if kind == "secret" else ():
                        _take(found[owner], kind, text, begin, end)
                continue
            places = lines.those(*_LEAST[kind])
            if not places:
                continue
            starts = list(accumulate((end - begin + 1 for _, begin, end in places), initial=0))
            for begin, end in finder(
                "\n".join([texts[owner][begin:end] for owner, begin, end in places])
            ):
                line = bisect_right(starts, begin) - 1
                owner, shift = places[line][0], places[line][1] - starts[line]
                _take(found[owner], kind, texts[owner], begin + shift, end + shift)
        return found


def _take(taken: list[TextSpan], kind: str, text: str, begin: int, end: int) -> None:
    """Add a span where none is yet."""
    if all(end <= span.begin or span.end <= begin for span in taken):
        taken.append(TextSpan(begin, end, kind, placeholder_for(kind, text[begin:end])))


@dataclass(frozen=True)
class Lines:
    """Lines of texts with at least three digits: `place` int64 [lines, 3] are (text, begin,
    end), and `count` how many digits (under "0") and marks each has, int64 [lines]: dots between
    digits ("v4"), colons after four hexadecimal digits of which the first is 2 or 3 ("v6"),
    digits after two letters ("iban"; what is not ASCII may be a digit). `marked`, bool [texts],
    are the texts that could hold an access key."""

    place: np.ndarray
    count: dict[str, np.ndarray]
    marked: np.ndarray

    def those(self, digits: int, marks: Sequence[tuple[str, int]]) -> list[list[int]]:
        """Returns the places with so many digits, and enough of one of the marks where there are
        any.
        """
        wanted = self.count["0"] >= digits
        if marks:
            wanted &= np.logical_or.reduce([self.count[mark] >= least for mark, least in marks])
        return self.place[wanted].tolist()


def lines_with_digits(texts: list[str]) -> Lines:
    """Returns the lines that could hold something with digits in it."""
    native = extension.index()
    if native is not None:
        place, counts, marked = native.digit_lines(texts, list(scan_marks()))
        columns = counts.reshape(-1, len(_COUNTED)).T
        return Lines(place.reshape(-1, 3), dict(zip(_COUNTED, columns, strict=True)), marked > 0)
    codes = code_points("\n".join(texts) + "\n")
    starts = np.cumsum([0, *(len(text) + 1 for text in texts)])
    ends = np.flatnonzero(codes == ord("\n"))
    counts = {
        mark: np.bincount(np.searchsorted(ends, np.flatnonzero(places)), minlength=len(ends))
        for mark, places in zip(_COUNTED, _marks(codes), strict=True)
    }
    lines = np.flatnonzero(counts["0"] >= 3)
    begins = np.where(lines > 0, ends[lines - 1] + 1, 0)
    owners = np.searchsorted(starts, begins, side="right") - 1
    shift = starts[owners]
    place = np.stack([owners, begins - shift, ends[lines] - shift], axis=1)
    marked = np.array([is_marked(text) for text in texts], bool)
    return Lines(place, {mark: found[lines] for mark, found in counts.items()}, marked)


def _marks(codes: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns where what `Lines` counts stands, in the order of _COUNTED, bool [characters]. (What
    lies below the first of a range wraps around.)"""

    def between(first: str, last: str, of: np.ndarray = codes) -> np.ndarray:
        return of - np.uint32(ord(first)) <= np.uint32(ord(last) - ord(first))

    def before(flags: np.ndarray, steps: int) -> np.ndarray:
        return np.concatenate([np.zeros(steps, bool), flags])[: len(flags)]

    digits, letters = between("0", "9"), between("a", "z", codes | np.uint32(32))
    hexadecimal = digits | between("a", "f", codes | np.uint32(32))
    v4 = (codes == ord(".")) & before(digits, 1) & np.append(digits[1:], False)
    v6 = (codes == ord(":")) & before(between("2", "3"), 4)
    v6 &= before(hexadecimal, 1) & before(hexadecimal, 2) & before(hexadecimal, 3)
    iban = (digits | (codes >= 128)) & before(letters, 1) & before(letters, 2)
    return digits, v4, v6, iban


def placeholder_for(kind: str, text: str) -> str:
    """Returns what replaces a span: 16 bits of its hash, in a form of the kind that is reserved for
    examples.
    """
    number = int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=2).digest(), "little"
    )
    if kind == "email":
        return f"user{number:05d}@example.com"
    if kind == "ip":
        return f"2001:db8::{number:x}" if ":" in text else f"192.0.2.{number % 256}"
    if kind == "phone":
        return f"+1 202-555-01{number % 100:02d}"
    if kind == "ssn":
        return "000-00-0000"
    if kind == "card":
        return "4000 0000 0000 0000"
    return {"iban": "XX00 0000 0000 0000", "secret": "REDACTED_KEY"}[kind]
