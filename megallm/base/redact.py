"""Secrets that stand in a configuration by mistake, taken out of what is shown, kept or sent."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "[redacted]"
_KEY = re.compile(
    r"(^|[_.-])(password|passwd|secret|api_?key|access_?key|private_?key|credentials?|"
    r"(auth|access|api|hf|bearer|wandb|github)_?token)s?$",
    re.IGNORECASE,
)
_VALUE = re.compile(
    r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password@host
    r"|\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\bxox[abps]-[A-Za-z0-9-]{10,}"
    r"|(?<=[?&]token=)[^&\s]+|(?<=[?&]api_key=)[^&\s]+|(?<=Bearer )[A-Za-z0-9._-]{16,}"
)


def redacted_text(text: str) -> str:
    """Returns a text without what looks like a credential: of a URL, or a token of a known form."""
    return _VALUE.sub(HIDDEN, text)


def redacted(value: Any) -> Any:
    """Returns a JSON value in which texts under keys such as `api_key`, and credentials inside
    other texts, are replaced; everything else is as it was.
    """
    if isinstance(value, dict):
        hidden = {key for key in value if _KEY.search(str(key))}
        return {
            key: HIDDEN if key in hidden and isinstance(item, str) and item else redacted(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return redacted_text(value) if isinstance(value, str) else value
