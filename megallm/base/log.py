"""Diagnostic lines of a rank: `12:04:31 rank 2 WARNING message` on stderr, which the launcher keeps in a file."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

NAME = "megallm"


def get(part: str) -> logging.Logger:
    """The logger of one part of megallm, such as `get("checkpoint")`."""
    return logging.getLogger(f"{NAME}.{part}")


def configure(rank: int, level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Send megallm's lines of this process to `stream` (stderr), marked with the rank; calling again replaces it."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger(NAME)
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
