"""The home folder in paths: the one place for configurations and flags."""

from __future__ import annotations

import os
import re

from megallm.base.errors import UsageError

_HOME = re.compile(r"~[A-Za-z0-9._-]*/")


def expand_home(text: str) -> str:
    """`~/x` and `~name/x` as paths of the home folder; anything else as it is: no text that is not
    a path begins so.

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
