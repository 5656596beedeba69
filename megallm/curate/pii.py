"""Personal data: email, IP, IBAN, card, social security and telephone numbers, and access keys.

Each kind has a cheap scan for places that could hold it and a check that decides (checksums, ranges, the
phonenumbers library). The stand-in is a pure function of what it replaces, so that two mentions of one address stay
one address; it lies in ranges that are reserved for examples, so that it can belong to nobody.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from megallm.base import extension
from megallm.base.errors import UsageError
from megallm.curate import optional
from megallm.curate.config import PiiConfig
from megallm.curate.document import Batch, Span, Verdict, edit
from megallm.curate.text import code_points

_LOCAL = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*")  # from its end, too
_DOMAIN = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![A-Za-z0-9-])")
_IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
# Every address given out lies in 2000::/3 (RFC 4291), which keeps a::b of programming languages out.
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])")
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_SSN = re.compile(r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])")
_CARD = re.compile(r"(?<![\d.,-])\d(?:[ -]?\d){12,18}(?![\d-]|[.,]\d)")
_PHONE = re.compile(r"(?<![\w./:=#-])(?:\+\d|\(\d{2,4}\)|\d)[\d\u00a0 .\-/()]{5,20}\d(?![\w/:=-]|\.\d)")
_SECRETS = (
    re.compile(r"(?<![A-Za-z0-9])AKIA[0-9A-Z]{16}(?![A-Za-z0-9])"),
    re.compile(r"(?<![A-Za-z0-9])gh[pousr]_[A-Za-z0-9]{36}(?![A-Za-z0-9])"),
    re.compile(r"(?<![A-Za-z0-9])xox[abprs]-[A-Za-z0-9-]{20,72}"),
    re.compile(r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----[\s\S]{40,8000}?-----END (?:[A-Z]+ )?PRIVATE KEY-----"),
)
# Each with the place of a character that is rare in text.
_SECRET_MARKS = {"AKIA": 1, "ghp_": 3, "gho_": 3, "ghu_": 3, "ghs_": 3, "ghr_": 3, "xox": 0, "PRIVATE KEY-----": 8}
_LOCAL_CHARS = 64
_REMEMBERED = 1 << 14
_SMALL_PART = 40  # one public address in 1,700 has only parts below
_HEADING_PART = 100  # of a number that begins a line and has a title after it
_HEADING = re.compile(r"\.?[ \t]+\S")
# Digits that a line needs, and so many of one of these marks; the other kinds are looked for everywhere.
_LEAST = {
    "ip": (3, (("v4", 3), ("v6", 1))), "iban": (4, (("iban", 1),)), "card": (13, ()), "ssn": (9, (("-", 2),)),
    "phone": (7, ()),
}  # fmt: skip
_COUNTED = ("0", "v4", "v6", "iban", "-")
# A number after one of these words, or at the start of a heading, is a section or version number and no address.
_NUMBERING = re.compile(
    r"(?:section|sect\.|sec\.|§|chapter|version|release|rev\.?|revision|figure|table|appendix|clause|article|firmware"
    r"|build|kernel|linux|abschnitt|kapitel|tabelle|chapitre|paragraphe|capítulo|v|ver\.?|oid|draft|step|item)[\s:#(]*$",
    re.IGNORECASE,
)
_ADDRESSING = re.compile(
    r"\b(?:ips?|address|addr|host|server|dns|resolver|nameserver|ping|client|inet|gateway|peer|connected|login)\b"
    r"[\s:=(\[\"']*(?:to|from|at|is|of)?[\s:=(\[\"']*$",
    re.IGNORECASE,
)
_RESERVED_DOMAINS = ("example.com", "example.org", "example.net", "example.edu")
_RESERVED_SUFFIXES = (".example", ".invalid", ".test", ".localhost")
_CARD_ISSUERS = (  # first digits, and how many digits in all
    (re.compile(r"4"), (13, 16, 19)),
    (re.compile(r"5[1-5]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)"), (16,)),
    (re.compile(r"3[47]"), (15,)),
    (re.compile(r"6(?:011|4[4-9]|5)"), (16, 19)),
    (re.compile(r"3(?:0[0-5]|[68])"), (14,)),
    (re.compile(r"35"), (16,)),
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
    """Whether the last digit is the check digit of the others (ISO/IEC 7812)."""
    doubled = [2 * int(digit) for digit in digits[-2::-2]]
    return (sum(int(digit) for digit in digits[-1::-2]) + sum(value - 9 * (value > 9) for value in doubled)) % 10 == 0


def iban_valid(text: str) -> bool:
    """Whether it is an IBAN of its country's length with a right checksum modulo 97 (ISO 13616)."""
    code = text.replace(" ", "")
    if _IBAN_LENGTHS.get(code[:2]) != len(code):
        return False
    return int("".join(str(int(char, 36)) for char in code[4:] + code[:4])) % 97 == 1


def find_emails(text: str) -> Iterator[tuple[int, int]]:
    """Addresses around each @; those in domains reserved for examples are left."""
    at = text.find("@")
    while at >= 0:
        before = _LOCAL.match(text[max(0, at - _LOCAL_CHARS) : at][::-1])
        after = _DOMAIN.match(text, at + 1, at + 256)
        if before and after:
            domain = after[0].lower()
            reserved = any(domain == name or domain.endswith(f".{name}") for name in _RESERVED_DOMAINS)
            if not reserved and not domain.endswith(_RESERVED_SUFFIXES):
                yield at - len(before[0]), after.end()
        at = text.find("@", at + 1)


def find_ips(text: str) -> Iterator[tuple[int, int]]:
    """Public addresses of version 4 and 6; section and version numbers are told by what stands before them."""
    patterns = ([_IPV4] if "." in text else []) + ([_IPV6] if ":" in text else [])
    for pattern in patterns:
        for match in pattern.finditer(text):
            if pattern is _IPV6 and ("::" not in match[0] and match[0].count(":") != 7):
                continue
            try:
                address = ipaddress.ip_address(match[0])
            except ValueError:
                continue
            if address.is_global and not address.is_multicast and not _is_numbering(text, match, address.version):
                yield match.span()


def _is_numbering(text: str, match: re.Match[str], version: int) -> bool:
    """Whether a dotted number is the number of a section or a version: by the words before it, or because all its
    parts are small and nothing speaks of an address."""
    if version == 6:
        return False
    line = text.rfind("\n", 0, match.start()) + 1
    before = text[max(line, match.start() - 24) : match.start()]
    if _ADDRESSING.search(before):
        return False
    if _NUMBERING.search(before):
        return True
    heading = not before.strip() and _HEADING.match(text, match.end()) is not None
    return max(int(part) for part in match[0].split(".")) < (_HEADING_PART if heading else _SMALL_PART)


def find_ibans(text: str) -> Iterator[tuple[int, int]]:
    """International bank account numbers, written together or in groups of four."""
    for match in _IBAN.finditer(text):
        size = _IBAN_LENGTHS.get(match[0][:2])
        if size is None:
            continue
        end, seen = match.start(), 0
        while end < match.end() and seen < size:
            seen += text[end] != " "
            end += 1
        if seen == size and iban_valid(text[match.start() : end]):
            yield match.start(), end


def find_cards(text: str) -> Iterator[tuple[int, int]]:
    """Payment card numbers: an issuer's prefix and length, the Luhn digit, groups of a usual size."""
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        groups = re.split(r"[ -]", match[0])
        grouped = len(groups) == 1 or all(3 <= len(group) <= 7 for group in groups)
        issued = any(len(digits) in lengths and first.match(digits) for first, lengths in _CARD_ISSUERS)
        if issued and grouped and len(set(digits)) > 1 and luhn(digits):
            yield match.span()


def find_ssns(text: str) -> Iterator[tuple[int, int]]:
    """Social security numbers of the USA in the written form 123-45-6789, without the numbers never given out."""
    for match in _SSN.finditer(text):
        area, group, serial = match[0].split("-")
        if area not in ("000", "666") and area < "900" and group != "00" and serial != "0000":
            yield match.span()


def find_secrets(text: str) -> Iterator[tuple[int, int]]:
    """Access keys that are known by their form, and private keys."""
    for pattern in _SECRETS:
        yield from (match.span() for match in pattern.finditer(text))


class Pii:
    """The step `pii`: edits, never drops."""

    name = "pii"

    def __init__(self, config: PiiConfig) -> None:
        self.config = config
        self.marks: dict[str, tuple[float, ...]] = {}
        finders: dict[str, Callable[[str], Iterator[tuple[int, int]]]] = {
            "secret": find_secrets, "email": find_emails, "iban": find_ibans, "card": find_cards, "ssn": find_ssns,
            "ip": find_ips, "phone": self._find_phones,
        }  # fmt: skip
        self._finders = {kind: finder for kind, finder in finders.items() if kind in config.kinds}
        if "phone" in config.kinds:
            self._phones = optional.need("phonenumbers", "take 'phone' out of pii.kinds")
            if config.phone_region not in self._phones.SUPPORTED_REGIONS:
                raise UsageError(
                    f"pii.phone_region is '{config.phone_region}'; give the two capital letters of a country, such as "
                    "US or DE."
                )
            self._is_phone = lru_cache(_REMEMBERED)(self._valid)  # pages of a manual share their numbers

    def _find_phones(self, text: str) -> Iterator[tuple[int, int]]:
        """Telephone numbers that are valid in their country; a local form must be grouped as people group it."""
        for match in _PHONE.finditer(text):
            written = match[0]
            digits = sum(char.isdigit() for char in written)
            groups = len(re.findall(r"\d+", written))
            international = written[0] == "+" or match.start() and text[match.start() - 1] == "+"
            if not 7 <= digits <= 15 or (not international and (groups < 3 or groups > 5 or digits < 10)):
                continue
            if written.count("(") != written.count(")"):
                continue
            if self._is_phone(written):
                yield match.span()

    def _valid(self, written: str) -> bool:
        try:
            return self._phones.is_valid_number(self._phones.parse(written, self.config.phone_region))
        except self._phones.NumberParseException:
            return False

    def find(self, text: str) -> list[Span]:
        """All spans of a text with their kinds and stand-ins; where two kinds overlap the first of the table wins."""
        return self._find_all([text])[0]

    def judge(self, batch: Batch) -> list[Verdict]:
        return [edit(spans) for spans in self._find_all([document.text for document in batch.documents])]

    def _find_all(self, texts: list[str]) -> list[list[Span]]:
        """Lines with enough digits of all texts are searched as one text: no kind that has digits spans lines."""
        found: list[list[Span]] = [[] for _ in texts]
        lines = lines_with_digits(texts)
        for kind, finder in self._finders.items():
            if kind not in _LEAST:
                for owner, text in enumerate(texts):
                    for begin, end in finder(text) if kind != "secret" or lines.marked[owner] else ():
                        _take(found[owner], kind, text, begin, end)
                continue
            places = lines.those(*_LEAST[kind])
            if not places:
                continue
            starts = list(accumulate((end - begin + 1 for _, begin, end in places), initial=0))
            for begin, end in finder("\n".join([texts[owner][begin:end] for owner, begin, end in places])):
                line = bisect_right(starts, begin) - 1
                owner, shift = places[line][0], places[line][1] - starts[line]
                _take(found[owner], kind, texts[owner], begin + shift, end + shift)
        return found


def _take(taken: list[Span], kind: str, text: str, begin: int, end: int) -> None:
    """Add a span where none is yet."""
    if all(end <= span.begin or span.end <= begin for span in taken):
        taken.append(Span(begin, end, kind, stand_in(kind, text[begin:end])))


@dataclass(frozen=True)
class Lines:
    """Lines of texts with at least three digits: `place` int64 [lines, 3] are (text, begin, end), and `count` how many
    digits (under "0") and marks each has, int64 [lines]: dots between digits ("v4"), colons after four hexadecimal
    digits of which the first is 2 or 3 ("v6"), digits after two capitals ("iban"; what is not ASCII may be a digit),
    and "-". `marked`, bool [texts], are the texts that hold one of _SECRET_MARKS."""

    place: np.ndarray
    count: dict[str, np.ndarray]
    marked: np.ndarray

    def those(self, digits: int, marks: Sequence[tuple[str, int]]) -> list[list[int]]:
        """The places with so many digits, and enough of one of the marks where there are any."""
        wanted = self.count["0"] >= digits
        if marks:
            wanted &= np.logical_or.reduce([self.count[mark] >= least for mark, least in marks])
        return self.place[wanted].tolist()


def lines_with_digits(texts: list[str]) -> Lines:
    """The lines that could hold something with digits in it."""
    native = extension.index()
    if native is not None:
        place, counts, marked = native.digit_lines(texts, list(_SECRET_MARKS.items()))
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
    marked = np.array([any(mark in text for mark in _SECRET_MARKS) for text in texts], bool)
    return Lines(place, {mark: found[lines] for mark, found in counts.items()}, marked)


def _marks(codes: np.ndarray) -> tuple[np.ndarray, ...]:
    """Where what `Lines` counts stands, in the order of _COUNTED, bool [characters]. (What lies below the first of a
    range wraps around.)"""

    def between(first: str, last: str, of: np.ndarray = codes) -> np.ndarray:
        return of - np.uint32(ord(first)) <= np.uint32(ord(last) - ord(first))

    def before(flags: np.ndarray, steps: int) -> np.ndarray:
        return np.concatenate([np.zeros(steps, bool), flags])[: len(flags)]

    digits, capitals = between("0", "9"), between("A", "Z")
    hexadecimal = digits | between("a", "f", codes | np.uint32(32))
    v4 = (codes == ord(".")) & before(digits, 1) & np.append(digits[1:], False)
    v6 = (codes == ord(":")) & before(between("2", "3"), 4)
    v6 &= before(hexadecimal, 1) & before(hexadecimal, 2) & before(hexadecimal, 3)
    iban = (digits | (codes >= 128)) & before(capitals, 1) & before(capitals, 2)
    return digits, v4, v6, iban, codes == ord("-")


def stand_in(kind: str, text: str) -> str:
    """What replaces a span: 16 bits of its hash, in a form of the kind that is reserved for examples."""
    number = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=2).digest(), "little")
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
