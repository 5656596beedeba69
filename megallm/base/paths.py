"""Paths as people write them: the home folder, and what is still to be filled in."""

from __future__ import annotations

import os
import re

from megallm.base.errors import UsageError

_HOME = re.compile(r"~[A-Za-z0-9._-]*/")
# What launch scripts hold where a user's own value belongs: `$3`, `$(date)`, MOCK, <path>,
# path/to/x.
_PLACEHOLDER = re.compile(r"[$`]|^MOCK$|<[^<>]+>|(^|/)path/to(/|$)|^(YOUR|your)_\w+$")


def expand_home(text: str) -> str:
    """Returns `~/x` and `~name/x` as paths of the home folder; anything else as it is: no text that
    is not a path begins so.

    Errors: `UsageError` for a user who is not there.
    """
    if not _HOME.match(text):
        return text
    found = os.path.expanduser(text)
    if found == text:
        raise UsageError(
            f"{text}: there is no user whose home folder {text.partition('/')[0]} could be; write "
            "it out."
        )
    return found


def is_placeholder(text: str) -> bool:
    """Returns whether a path stands for one that is still to be filled in."""
    return _PLACEHOLDER.search(text) is not None
