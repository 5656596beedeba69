"""`megallm pretrain --text DIR`: from a folder of text to a trained model in one command."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable

from megallm.base.config import load
from megallm.base.errors import UsageError
from megallm.base.output import say
from megallm.data.text.preprocess import Stats
from megallm.launch.start import started_by_others
from megallm.training import from_text
from megallm.training.config import PretrainConfig


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --text and --preset."""
    parser.add_argument(
        "--text",
        metavar="DIR",
        help="instead of CONFIG: a folder of text files (or one file) to train on, all in one",
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="with --text: model size of `megallm presets`, or tiny (the default): the tiny one "
        "that fits the text",
    )


def run(args: argparse.Namespace, train: Callable[[argparse.Namespace], int]) -> int:
    """Prepare what is missing, train (or go on) with the configuration that came of it, and name
    the next command.
    """
    if (
        args.config is not None and "=" in args.config
    ):  # no CONFIG: the first setting stands in its place
        args.overrides.insert(0, args.config)
        args.config = None
    if args.config is not None:
        raise UsageError(
            f"Give either a CONFIG ({args.config}) or --text {args.text}: --text makes its own."
        )
    request = _request(args)
    load(PretrainConfig, None, args.overrides)  # a misspelt key is said before the text is read
    prepared = from_text.is_prepared(request)
    if not prepared and started_by_others() is not None:
        raise UsageError(
            "--text prepares in one process: call `megallm pretrain --text "
            f"{shlex.quote(args.text)}` once outside torchrun and srun (with train.stop_at=1), "
            "then start the same command there."
        )
    if not prepared:
        _prepare(request)
    args.config = str(request.config)
    args.overrides = [*_shorter(args), *args.overrides]
    _say(
        f"configuration: {request.config} (any key can follow the command, such as train.steps=500)"
    )
    code = train(args)
    if code == 0:
        folder = shlex.quote(request.run_dir)
        _say(f"next: megallm generate --model {folder} --prompt The --temperature 0.8 --top-k 40")
    return code


def _prepare(request: from_text.FromTextRequest) -> None:
    """Prepare with a line of counts on a terminal; an interrupt says what the same command does."""
    shown = 0.0

    def show(stats: Stats) -> None:
        nonlocal shown
        if sys.stderr.isatty() and time.monotonic() - shown > 0.3:
            shown = time.monotonic()
            print(
                f"\r{stats.documents:,} documents, {sum(stats.tokens.values()):,} tokens ",
                end="",
                file=sys.stderr,
            )

    try:
        from_text.prepare_run(request, _say, show)
    except KeyboardInterrupt:
        print(
            f"megallm: nothing is trained yet; the same command prepares {request.text} anew.",
            file=sys.stderr,
        )
        raise
    if shown:
        print(file=sys.stderr)


def _shorter(args: argparse.Namespace) -> list[str]:
    """Returns a warm-up that fits `train.steps=N` of the command line, where the chosen one does
    not.
    """
    given = load(PretrainConfig, args.config, args.overrides)
    if given.optim.warmup_steps < given.train.steps or any(
        "optim.warmup_steps" in one for one in args.overrides
    ):
        return []
    return [f"optim.warmup_steps={given.train.steps // 10}"]


def _request(args: argparse.Namespace) -> from_text.FromTextRequest:
    """Returns the command as a request; `run.dir=` among the settings says where the run lives."""
    preset = args.preset or from_text.TINY
    from_text.check_preset(preset)
    given = [
        word.partition("=")[2].strip()
        for word in args.overrides
        if word.partition("=")[0].strip() == "run.dir"
    ]
    return from_text.FromTextRequest(
        args.text,
        preset,
        given[-1] if given else from_text.default_run(args.text),
        from_text.machine(),
    )


def _say(text: str) -> None:
    say(f"megallm: {text}")
