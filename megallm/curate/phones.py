"""Telephone numbers, international or local, checked by the phonenumbers library."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from megallm.base import optional
from megallm.base.errors import UsageError
from megallm.curate.config import PiiConfig

_SPACE = r"\u00a0\u2009\u2010\u2011\u2013 .\-/()"
_PHONE = re.compile(
    # Not inside a word, a path or a time; after a colon or "=" it may stand (tel:, phone=).
    rf"(?<![\w./#-])(?<!\d[:=])(?:\+\d|\(\+?\d{{1,5}}\)|\d)[\d{_SPACE}]{{5,20}}\d(?![\w/:=-]|\.\d)"
)
_CALLED = re.compile(
    r"(?<![^\W_])(?:(?:tele)?phone|tel|tél|mobile|mob|cell|fax|call|whatsapp|sms|telefono|telefone|téléphone"
    r"|teléfono|portable|handy|telefon|телефон|電話|电话|携帯|전화)[\s.:=)\"'#№]{0,4}"
    r"(?:(?:no|number|nr|num|is|us|at|me|on|or)[\s.:=)\"'#№]{0,3}){0,2}$|[☎📞📱]\ufe0f?\s*$",
    re.IGNORECASE,
)
_DOTTED = re.compile(r"\d{1,3}(?:\.\d{1,3}){3}")  # an address of a machine
_HEX_BEFORE = re.compile(r"(?<![0-9A-Za-z])[0-9A-Fa-f]{2}[ \t]$")
_HEX_AFTER = re.compile(r"[ \t][0-9A-Fa-f]{2}(?![0-9A-Za-z])")
_REMEMBERED = 1 << 14
_NORTH_AMERICA = 1  # calling code
_LEAST_LOCAL = 9  # digits of a local number, with its 0


class Phones:
    """Finds the numbers of a configuration's countries. Errors: `UsageError`."""

    def __init__(self, config: PiiConfig) -> None:
        self._library = optional.need("phonenumbers", "take 'phone' out of pii.kinds")
        self._region, self._regions = config.phone_region, config.phone_regions
        for name, regions in (("phone_region", (self._region,)), ("phone_regions", self._regions)):
            for region in regions:
                if region not in self._library.SUPPORTED_REGIONS:
                    raise UsageError(
                        f"pii.{name} is '{region}'; give the two capital letters of a country, "
                        "such as US or DE."
                    )
        self._code = self._library.country_code_for_region(self._region)
        self._is_phone = lru_cache(_REMEMBERED)(
            self._valid
        )  # pages of a manual share their numbers
        self._is_local = lru_cache(_REMEMBERED)(self._locally_valid)

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Yields telephone numbers that are valid in their country; a local form must be grouped as
        people group it, or stand after a word such as "phone".
        """
        for match in _PHONE.finditer(text):
            written = match[0]
            digits = sum(char.isdigit() for char in written)
            if (
                not 7 <= digits <= 15
                or _DOTTED.fullmatch(written)
                or written.count("(") != written.count(")")
            ):
                continue
            groups = tuple(re.findall(r"\d+", written))
            if (
                written[0] == "+"
                or written[:2] == "(+"
                or text[match.start() - 1 : match.start()] == "+"
            ):
                found = self._is_phone(written)
            else:
                found = self._is_local_form(text, match, groups, digits)
            if found:
                yield match.span()

    def _is_local_form(
        self, text: str, match: re.Match[str], groups: tuple[str, ...], digits: int
    ) -> bool:
        if (
            3 <= len(groups) <= 5
            and digits >= 10
            and self._grouped(groups)
            and self._is_phone(match[0])
        ):
            return True
        if digits >= _LEAST_LOCAL and groups[0][0] == "0" and not _counts(groups):
            if self._is_local(match[0]):
                dump = _HEX_BEFORE.search(text, max(0, match.start() - 4), match.start())
                return dump is None and _HEX_AFTER.match(text, match.end()) is None
        elif digits < _LEAST_LOCAL:
            return False
        before = text[max(0, match.start() - 24) : match.start()]
        if _CALLED.search(before.rpartition("\n")[2]) is None:
            return False
        return any(self._valid(match[0], region) for region in (self._region, *self._regions))

    def _grouped(self, groups: tuple[str, ...]) -> bool:
        """Returns whether the groups may be a number of `phone_region`: in North America 3, 3 and 4
        digits, perhaps after a 1; elsewhere the sizes vary."""
        sizes = [len(group) for group in groups[groups[0] == "1" :]]
        return self._code != _NORTH_AMERICA or sizes == [3, 3, 4]

    def _valid(self, written: str, region: str = "") -> bool:
        try:
            return self._library.is_valid_number(
                self._library.parse(written, region or self._region)
            )
        except self._library.NumberParseException:
            return False

    def _locally_valid(self, written: str) -> bool:
        """Returns whether a country of `phone_regions` writes a valid number so, with its 0."""
        groups = re.findall(r"\d+", written)
        if len(groups) < 2 or min(map(len, groups)) < 2 or len(groups[0]) > 6:
            return False
        if groups[0].startswith("00"):  # as dialled from Europe: 0049 30 901820
            return len(groups[0]) > 3 and self._valid(written, "DE")
        return any(self._is_written_in(region, written, groups) for region in self._regions)

    def _is_written_in(self, region: str, written: str, groups: list[str]) -> bool:
        library = self._library
        try:
            number = library.parse(written, region)
        except library.NumberParseException:
            return False
        if not library.is_valid_number_for_region(number, region):
            return False
        national = re.findall(
            r"\d+", library.format_number(number, library.PhoneNumberFormat.NATIONAL)
        )
        if groups == national:
            return True
        if region == "FR" or "".join(groups) != "".join(national):
            return False
        area = (
            groups[0] == national[0] or region == "GB" and groups[0][:-1] == national[0]
        )  # 0207 946 0958
        return area and len(groups) <= 4 and (len(groups) > 2 or len(groups[-1]) > 4)


def _counts(groups: tuple[str, ...]) -> bool:
    """Returns whether the groups are numbers in a row: 01 02 03 04 05."""
    steps = {int(b) - int(a) for a, b in zip(groups[:-1], groups[1:], strict=True)}
    return len(groups) > 2 and len(steps) == 1
