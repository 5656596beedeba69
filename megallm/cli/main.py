"""`megallm <verb>`: finds the verb, parses its arguments, and turns every ending into an exit code.

This is the one place that prints errors and leaves the process.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from megallm.base.errors import CannotWrite, InternalError, MegallmError, UsageError
from megallm.base.output import open_standard_streams, show_error
from megallm.base.stopping import INTERRUPTED, before_ranks
from megallm.base.version import VERSION
from megallm.cli.table import VERBS, Verb

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UsageErrors, with the nearest option named."""

    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized arguments: "):
            options = [option for action in self._actions for option in action.option_strings]
            given = message.partition(": ")[2].split()[0].partition("=")[0]
            close = get_close_matches(given, options, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
        raise UsageError(f"{message[:1].lower()}{message[1:]}.{hint} See `{self.prog} --help`.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; nothing but the interpreter's own exit follows."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    open_standard_streams()
    with before_ranks(arguments[:1] == ["pretrain"]):
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    try:
        code = dispatch(arguments)
        sys.stdout.flush()
    except MegallmError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted.", INTERRUPTED)
    except BrokenPipeError:  # `megallm ... | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        if error.errno not in UNWRITABLE or error.filename is None:
            return _unexpected(error)
        return _fail(f"{error.filename} cannot be written: {error.strerror}.", CannotWrite.exit_code)
    except Exception as error:  # the boundary of the program
        return _unexpected(error)
    return code


def dispatch(arguments: list[str]) -> int:
    """Find the verb, import its module, parse, run."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"megallm {VERSION}")
        return 0
    verb, rest = find_verb(arguments)
    command = importlib.import_module(verb.module).COMMANDS[verb.words]
    parser = Parser(prog=f"megallm {verb.words}", description=_sentence(verb.help), allow_abbrev=False)
    command.arguments(parser)
    return command.run(parser.parse_intermixed_args(rest))


def find_verb(arguments: list[str]) -> tuple[Verb, list[str]]:
    """The verb that the first one or two words name, and the words after it."""
    for count in (2, 1):
        verb = VERBS.get(" ".join(arguments[:count]))
        if verb is not None:
            return verb, arguments[count:]
    first = arguments[0]
    group = [words for words in VERBS if words.startswith(f"{first} ")]
    if group:
        raise UsageError(f"'megallm {' '.join(arguments[:2])}' is not a verb; there are: {', '.join(group)}.")
    close = get_close_matches(first, [*VERBS, *(words.split()[0] for words in VERBS)], n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise UsageError(f"'{first}' is not a verb.{hint} The verbs are: {', '.join(VERBS)}.")


def overview() -> str:
    """The text of `megallm --help`."""
    width = max(len(words) for words in VERBS)
    rows = "\n".join(f"  {verb.words:<{width}}  {verb.help}" for verb in VERBS.values())
    return (
        "usage: megallm VERB [arguments]\n\n"
        "Train language models, from raw text to a model trained in parallel.\n\n"
        f"verbs:\n{rows}\n\n"
        "`megallm VERB --help` shows the arguments of one. Exit codes: 0 ok, 2 usage or configuration, 65 data,\n"
        "69 peer lost, 70 internal, 73 cannot write, 74 checkpoint unreadable, 75 requeue, 76 hang, 77 diverged."
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _fail(message: str, code: int) -> int:
    asked = message.startswith(("Stopped by ", "Interrupted"))  # no error: the run was told to
    show_error(f"megallm: {message}" if asked else f"megallm: error: {message}")
    return code


def _unexpected(error: Exception) -> int:
    show_error("".join(traceback.format_exception(error)).rstrip())
    return _fail(
        f"unexpected {type(error).__name__}; this is a bug in megallm: please report the lines above, the command "
        "line and the output of `megallm doctor`.",
        InternalError.exit_code,
    )
