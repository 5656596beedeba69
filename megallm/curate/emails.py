"""Where an e-mail address begins and ends: not at the quotes, brackets, links and keys around it.

A name is letters, digits and . _ + - of one script, so that text without spaces (Chinese, Japanese,
Thai) before an address stays; RFC 5322 allows more (#, =, ?, /, quotes), which in text are nearly
always what stands around it. A host ends in a top-level domain; names of files, versions and units
that look like one do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megallm.curate.domains import TOP_LEVEL

_RUNS = (  # what a name may be, each from its end on: the text before an @ is read backwards
    re.compile(r"[A-Za-z0-9\u00c0-\u024f\u1e00-\u1eff\u0300-\u036f._+-]+"),
    re.compile(r"[\u0370-\u03ff\u0400-\u052f\u1f00-\u1fff0-9\u0300-\u036f._+-]+"),
    re.compile(r"(?:[^\W_]|[._+\-\u0300-\u036f\u0900-\u0dff\u0e00-\u0eff])+"),
)
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_LATIN = r"A-Za-z0-9\u00c0-\u024f\u1e00-\u1eff\u0300-\u036f"
_HOSTS = (
    re.compile(
        rf"(?:{_LABEL}\.)+(?:xn--[A-Za-z0-9-]{{1,59}}|[A-Za-z]{{2,24}})(?![{_LATIN}]|-[A-Za-z0-9])"
    ),
    re.compile(
        r"(?:(?:[^\W_]|[\u0300-\u036f\u0900-\u0dff\u0e00-\u0eff-]){1,63}\.)+"
        r"(?:[^\W\d_]|[\u0300-\u036f\u0900-\u0dff\u0e00-\u0eff-]){2,24}"
    ),
)
_NAME_CHARS = 64
_HOST_CHARS = 256
_RETINA = re.compile(r"[1-9](?:\.\d+)?x\.", re.IGNORECASE)  # icon@2x.zip
# Logins of version control and servers: git@github.com:megallm, anonymous@ftp.gnu.org. They are
# nobody's.
_SERVICES = frozenset(
    ("git", "hg", "svn", "bzr", "cvs", "anoncvs", "anonymous", "anonftp", "gitlab", "gitea", "aur")
)
_RESERVED_DOMAINS = ("example.com", "example.org", "example.net", "example.edu")
_RESERVED_SUFFIXES = (".example", ".invalid", ".test", ".localhost")
_SIGNS = "._+-"
_PERCENT = re.compile(r"%[0-9A-Fa-f]{2}")


def find_emails(text: str) -> Iterator[tuple[int, int]]:
    """Yields addresses around each @; those in domains reserved for examples and logins of services
    are left.
    """
    at = text.find("@")
    while at >= 0:
        begin = _begin_of(text, at)
        end = _end_of(text, at + 1) if begin < at else 0
        if end and not _is_nobody(text, begin, at, end):
            yield begin, end
        at = text.find("@", at + 1)


def _begin_of(text: str, at: int) -> int:
    """Returns where the name before the @ at `at` begins; `at` for none."""
    before = text[max(0, at - _NAME_CHARS) : at]
    backwards = before[::-1]
    found = next((match for run in _RUNS if (match := run.match(backwards))), None)
    if found is None or before[-1] in ".":
        return at
    begin = at - found.end()
    begin = max(begin, begin + text[begin:at].rfind("..") + 2 if ".." in text[begin:at] else begin)
    if begin and _PERCENT.match(text, begin - 1):  # mailto:%20jane@..., %3Cjane@...
        begin += 2
    if text[begin - 1 : begin] == "\\" and text[begin] in "nrt" and begin + 1 < at:  # source code
        begin += 1
    while begin < at and text[begin] in _SIGNS:
        begin += 1
    if (
        begin > 1
        and text[begin - 1] in "'’"
        and text[begin - 2] in "oO"
        and not text[begin - 3 : begin - 2].isalnum()
    ):
        begin -= 2  # O'Brien, but not d'alice in a French sentence
    return begin


def _end_of(text: str, begin: int) -> int:
    """Returns where the host that begins at `begin` ends; 0 for none."""
    for pattern in _HOSTS:
        match = pattern.match(text, begin, begin + _HOST_CHARS)
        if match:
            host = match[0].removesuffix(
                "E" if text.startswith("<gt>", match.end()) else ""
            )  # Perl's E<gt>
            return _shortened(host, begin) if not _RETINA.match(host) else 0
    return 0


def _shortened(host: str, begin: int) -> int:
    """Returns the end of the longest beginning of `host` that ends in a top-level domain. A capital
    after one begins a sentence that follows without a blank: jane@mail.org.In the meantime."""
    labels = host.split(".")
    known = [
        number
        for number, label in enumerate(labels)
        if number and (label.lower() in TOP_LEVEL or label.lower().startswith("xn--"))
    ]
    if len(known) > 1 and labels[known[-1]][0].isupper() and labels[known[-2]].islower():
        known.pop()
    return begin + len(".".join(labels[: known[-1] + 1])) if known else 0


def _is_nobody(text: str, begin: int, at: int, end: int) -> bool:
    """Returns whether it is reserved for examples, a service's login, or the password of a URL
    (scheme://name:password@)."""
    host = text[at + 1 : end].lower()
    if any(host == name or host.endswith(f".{name}") for name in _RESERVED_DOMAINS):
        return True
    if host.endswith(_RESERVED_SUFFIXES) or text[begin:at].lower() in _SERVICES:
        return True
    if text[begin - 1 : begin] != ":":
        return False
    scheme = text.rfind("://", max(0, begin - _NAME_CHARS), begin)
    return scheme >= 0 and not any(
        char.isspace() or char in "/<>\"'" for char in text[scheme + 3 : begin]
    )
