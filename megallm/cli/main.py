"""`megallm <verb>`: finds the verb, parses its arguments, and turns every ending into an exit code.

This is the one place that prints errors and leaves the process.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from megallm.base.errors import CannotWrite, InternalError, MegallmError, UsageError
from megallm.base.paths import expand_home
from megallm.base.version import VERSION
from megallm.cli.board import BOARD
from megallm.cli.supervise import INTERRUPTED, Terminated, die_of, say_stopped, supervised
from megallm.cli.table import VERBS, Verb

TEXTS = ("prompt", "stop", "system", "special_tokens", "json_keys", "key")  # arguments that are never paths
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


def main(argv: Sequence[str] | None = None, program: bool = False) -> int:
    """Run one command line and return its exit code; nothing but the interpreter's own exit follows.

    program: whether this process is there for the command alone, as without `argv`; one that may take long is then
    supervised.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = next((verb for verb in map(VERBS.get, _names(arguments)) if verb is not None), None)
    kept = "" if verb is None else verb.kept
    if (program or argv is None) and verb is not None and kept and not {"-h", "--help"} & set(arguments):
        return supervised(verb.words, kept, lambda: _ended(arguments, kept))
    return _ended(arguments, kept)


def _ended(arguments: list[str], kept: str) -> int:
    """Do what the words say, in this process; the exit code."""
    try:
        code = dispatch(arguments)
        sys.stdout.flush()
    except MegallmError as error:
        if error.exit_code == INTERRUPTED and kept:  # a rank was
            say_stopped(signal.SIGINT, kept)
            return INTERRUPTED
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        say_stopped(signal.SIGINT, kept)
        return INTERRUPTED
    except Terminated as stop:
        say_stopped(stop.number, kept)
        return die_of(stop.number)
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
    return command.run(expand_paths(parser.parse_intermixed_args(rest)))


def expand_paths(args: argparse.Namespace) -> argparse.Namespace:
    """`~/x` as the home folder in every argument that is no text: shells leave it alone in `--output=~/x`."""
    for name, value in vars(args).items():
        if name in TEXTS:
            continue
        if isinstance(value, str):
            setattr(args, name, expand_home(value))
        elif isinstance(value, list):
            setattr(args, name, [expand_home(one) if isinstance(one, str) else one for one in value])
    return args


def find_verb(arguments: list[str]) -> tuple[Verb, list[str]]:
    """The verb that the first one or two words name, and the words after it."""
    for name in _names(arguments):
        if name in VERBS:
            return VERBS[name], arguments[len(name.split()) :]
    first = arguments[0]
    group = [words for words in VERBS if words.startswith(f"{first} ")]
    if group:
        raise UsageError(f"'megallm {' '.join(arguments[:2])}' is not a verb; there are: {', '.join(group)}.")
    close = get_close_matches(first, [*VERBS, *(words.split()[0] for words in VERBS)], n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    raise UsageError(f"'{first}' is not a verb.{hint} The verbs are: {', '.join(VERBS)}.")


def _names(arguments: list[str]) -> list[str]:
    """What the verb may be called: the first two words, or the first."""
    return [" ".join(arguments[:count]) for count in (2, 1)]


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
    BOARD.end()
    print(f"megallm: error: {message}", file=sys.stderr)
    return code


def _unexpected(error: Exception) -> int:
    traceback.print_exception(error)
    return _fail(
        f"unexpected {type(error).__name__}; this is a bug in megallm: please report the lines above, the command "
        "line and the output of `megallm doctor`.",
        InternalError.exit_code,
    )
