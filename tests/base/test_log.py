"""base.log: one line a message, marked with the rank, never twice."""

from __future__ import annotations

import io
import logging
import re

from megallm.base import log


def test_lines_carry_the_rank_and_configuring_again_replaces():
    first, second = io.StringIO(), io.StringIO()
    log.configure(0, stream=first)
    log.configure(3, level=logging.WARNING, stream=second)
    log.get("data").info("quiet")
    log.get("data").warning("the file %s is large", "x.bin")
    assert first.getvalue() == ""
    assert re.fullmatch(r"\d\d:\d\d:\d\d rank 3 WARNING the file x.bin is large\n", second.getvalue())
