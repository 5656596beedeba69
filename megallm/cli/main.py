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
from collections.abc import Iterable, Sequence
from typing import NoReturn

from megallm.base import extension, suggest, terminal
from megallm.base.errors import CannotWrite, InternalError, MegallmError, UsageError
from megallm.base.output import open_standard_streams, show_error
from megallm.base.paths import expand_home
from megallm.base.stopping import INTERRUPTED, before_ranks
from megallm.base.version import VERSION
from megallm.cli.board import BOARD
from megallm.cli.supervise import Terminated, die_of, say_stopped, supervised
from megallm.cli.table import TRAINING, VERBS, Verb

TEXTS = (
    "prompt",
    "stop",
    "system",
    "special_tokens",
    "json_keys",
    "key",
)  # arguments that are never paths
HELP = ("-h", "--help", "help")
OF_ONE = "`megallm VERB --help` shows the arguments of one."
FASTER_WITH_EXTENSION = ("preprocess", *TRAINING, "launch", "curate", "data verify", "data stream")
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UsageErrors, with the nearest option named."""

    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized arguments: "):
            options = [option for action in self._actions for option in action.option_strings]
            given = message.partition(": ")[2].split()[0].partition("=")[0]
            hint = self._setting(given) or suggest.did_you_mean(given, options)
        raise UsageError(f"{message[:1].lower()}{message[1:]}.{hint} See `{self.prog} --help`.")

    def _setting(self, given: str) -> str:
        """Returns a hint for an option that is a setting here, where the verb takes settings:
        `--lr` is optim.lr=VALUE.
        """
        from megallm.base.config import leaves  # here: `--help` need not wait for them
        from megallm.cli.config import DEFAULT
        from megallm.training.kinds import KINDS

        if not given.startswith("-") or all(action.dest != "overrides" for action in self._actions):
            return ""
        if suggest.plain(given.lstrip("-")) == "config" or given == "-c":
            return " The configuration stands without an option: CONFIG."
        name = suggest.plain(given.lstrip("-"))
        config = KINDS.get(self.prog.rpartition(" ")[2], KINDS[DEFAULT]).config
        known = list(leaves(config))
        keys = [
            key
            for key in known
            if name in (suggest.plain(key), suggest.plain(key.rpartition(".")[2]))
        ]
        found = keys[0] if len(keys) == 1 else vars(config).get("OTHER_NAMES", {}).get(name)
        if found is None:
            return ""
        key, _, note = found.partition(" ")
        if key not in known:
            return f" {found}"
        return f" A setting is written key=value: {key}=VALUE{note and ' ' + note}."


def main(argv: Sequence[str] | None = None, program: bool = False) -> int:
    """Run one command line and return its exit code; nothing but the interpreter's own exit
    follows.

    program: whether this process is there for the command alone, as without `argv`; one that may
    take long is then supervised.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    open_standard_streams()
    with terminal.escaping():
        return _run(arguments, program or argv is None)


def _run(arguments: list[str], program: bool) -> int:
    verb = next((verb for verb in map(VERBS.get, _names(arguments)) if verb is not None), None)
    kept = "" if verb is None else verb.kept
    if program and verb is not None and kept and not {"-h", "--help"} & set(arguments):
        return supervised(verb.words, kept, lambda: _ended(arguments, kept))
    with before_ranks(arguments[:1] != [] and arguments[0] in (*TRAINING, "launch")):
        return _ended(arguments, kept)


def _ended(arguments: list[str], kept: str) -> int:
    """Do what the words say, in this process; the exit code."""
    try:
        code = run_verb(arguments)
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
        _drop_output()
        return 0
    except OSError as error:
        if error.errno not in UNWRITABLE or error.filename is None:
            return _unexpected(error)
        if error.filename == terminal.STANDARD_OUTPUT:
            _drop_output()
        return _fail(
            f"{error.filename} cannot be written: {error.strerror}.", CannotWrite.exit_code
        )
    except Exception as error:  # the boundary of the program
        return _unexpected(error)
    return code


def _drop_output() -> None:
    """What still waits to be written to stdout would be tried again by the interpreter at its
    end.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def run_verb(arguments: list[str]) -> int:
    """Find the verb, import its module, parse, run."""
    if arguments[:1] == ["help"]:  # `megallm help data`, `megallm help ckpt ls`
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in HELP:
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"megallm {VERSION}")
        return 0
    if (
        group_of(arguments[0])
        and arguments[0] not in VERBS
        and arguments[1:2]
        and arguments[1] in HELP
    ):
        print(group_overview(arguments[0]))
        return 0
    verb, rest = find_verb(arguments)
    command = importlib.import_module(verb.module).COMMANDS[verb.words]
    also = [one for one in group_of(verb.words) if verb.words in VERBS]
    epilog = f"See also: {', '.join(f'megallm {one}' for one in also)}." if also else None
    parser = Parser(
        prog=f"megallm {verb.words}",
        description=_sentence(verb.help),
        epilog=epilog,
        allow_abbrev=False,
    )
    command.arguments(parser)
    parsed = expand_paths(parser.parse_intermixed_args(rest))
    if verb.words in FASTER_WITH_EXTENSION:
        _say_without_extension()
    return command.run(parsed)


def group_of(first: str) -> list[str]:
    """Returns the verbs of two words that begin with this one."""
    return [words for words in VERBS if words.startswith(f"{first} ")]


def expand_paths(args: argparse.Namespace) -> argparse.Namespace:
    """Returns `~/x` as the home folder in every argument that is no text: shells leave it alone in
    `--output=~/x`.
    """
    for name, value in vars(args).items():
        if name in TEXTS:
            continue
        if isinstance(value, str):
            setattr(args, name, expand_home(value))
        elif isinstance(value, list):
            setattr(
                args, name, [expand_home(one) if isinstance(one, str) else one for one in value]
            )
    return args


def find_verb(arguments: list[str]) -> tuple[Verb, list[str]]:
    """Returns the verb that the first one or two words name, and the words after it."""
    for name in _names(arguments):
        if name in VERBS:
            return VERBS[name], arguments[len(name.split()) :]
    first, group = arguments[0], group_of(arguments[0])
    if group:
        given = " ".join(arguments[:2])
        near = suggest.did_you_mean(given, group, cutoff=0.75) if arguments[1:] else ""
        raise UsageError(f"'megallm {given}' is not a verb; there are: {', '.join(group)}.{near}")
    hint = suggest.did_you_mean(
        first, [one for one in VERBS if suggest.plain(one) == suggest.plain(first)]
    )
    if not hint:
        from megallm.training import other_names

        pointer = other_names.verb_pointer(first)
        known = dict.fromkeys([*VERBS, *(one.split()[0] for one in VERBS)])
        hint = f" {pointer}" if pointer else suggest.did_you_mean(first, known)
    raise UsageError(f"'{first}' is not a verb.{hint} The verbs are: {', '.join(VERBS)}.")


def _names(arguments: list[str]) -> list[str]:
    """Returns what the verb may be called: the first two words, or the first."""
    return [" ".join(arguments[:count]) for count in (2, 1)]


def group_overview(first: str) -> str:
    """Returns the text of `megallm data --help`."""
    return (
        f"usage: megallm {first} VERB [arguments]\n\nverbs:\n{_rows(group_of(first))}\n\n{OF_ONE}"
    )


def _rows(verbs: Iterable[str]) -> str:
    verbs = list(verbs)
    width = max(map(len, verbs))
    return "\n".join(f"  {one:<{width}}  {VERBS[one].help}" for one in verbs)


def _say_without_extension() -> None:
    """Once a command, by rank 0: what a quiet `pip install` did not show."""
    found = extension.status()
    if not found.loaded and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(
            f"megallm: note: the extension {found.name} is not used: {found.detail}.",
            file=sys.stderr,
        )


def overview() -> str:
    """Returns the text of `megallm --help`."""
    return (
        "usage: megallm VERB [arguments]\n\nTrain language models, from raw text to a model "
        f"trained in parallel.\n\nverbs:\n{_rows(VERBS)}\n\n{OF_ONE} Exit codes: 0 ok, 2 usage or "
        "configuration, 65 data,\n69 peer lost, 70 internal, 73 cannot write, 74 checkpoint "
        "unreadable, 75 requeue, 76 hang, 77 diverged."
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _fail(message: str, code: int) -> int:
    BOARD.end()
    asked = message.startswith(("Stopped by ", "Interrupted"))  # no error: the run was told to
    show_error(f"megallm: {message}" if asked else f"megallm: error: {message}")
    return code


def _unexpected(error: Exception) -> int:
    show_error("".join(traceback.format_exception(error)).rstrip())
    return _fail(
        f"unexpected {type(error).__name__}; this is a bug in megallm: please report the lines "
        "above, the command line and the output of `megallm doctor`.",
        InternalError.exit_code,
    )
