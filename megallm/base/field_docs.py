"""The comments beside the fields of a dataclass: what `megallm config --schema` says of a key."""

from __future__ import annotations

import dataclasses
import inspect
import io
import re
import tokenize


def field_docs(cls: type) -> dict[str, str]:
    """Returns the comment beside each field, and the comment lines directly above it; those of
    base classes too.
    """
    docs = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= _own_field_docs(base)
    return docs


def _own_field_docs(cls: type) -> dict[str, str]:
    source = inspect.getsource(cls)
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ").strip()
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    docs = {}
    names = {field.name for field in dataclasses.fields(cls)}
    for number, line in enumerate(source.splitlines(), start=1):
        match = re.match(r"    (\w+):", line)
        if not match or match[1] not in names:
            continue
        above, row = [], number - 1
        while row in alone:
            above.insert(0, comments[row])
            row -= 1
        docs[match[1]] = " ".join([*above, *([comments[number]] if number in comments else [])])
    return docs
