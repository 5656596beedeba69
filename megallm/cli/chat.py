"""`megallm chat`: talk to a model. This process reads and prints; the ranks answer over a socket.

The ranks run in a session of their own, so Ctrl-C reaches this process only, which asks them to
stop the answer.
"""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megallm.base.errors import UsageError
from megallm.cli.generate import model_arguments, parse_layout, request_of, sampling_arguments
from megallm.cli.table import Command
from megallm.inference.line import QUIT, STOP, Line
from megallm.inference.request import GenerateRequest
from megallm.launch.environment import RankEnv
from megallm.launch.start import start, world_size
from megallm.parallel.layout import Layout

PRELOAD = ("megallm.inference.chat", "megallm.launch.group", "megallm.peft.adapted")
HELP = (
    "/reset forgets the conversation, /system TEXT gives instructions, /quit leaves; Ctrl-C stops "
    "an answer."
)


def _arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments(parser)
    sampling_arguments(parser, temperature=0.7, max_new_tokens=512)
    parser.add_argument(
        "--system", metavar="TEXT", help="instructions that every conversation begins with"
    )
    parser.add_argument(
        "--socket", type=int, help=argparse.SUPPRESS
    )  # the ranks' side of the conversation


def _run(args: argparse.Namespace) -> int:
    request, layout = request_of(args), parse_layout(args.layout)
    if layout.dp != 1:
        raise UsageError("--layout: a conversation has one replica; leave dp out.")
    if world_size(None) is not None:
        raise UsageError("megallm chat starts its own ranks: call it outside torchrun and srun.")
    if args.socket is not None:
        start(_rank, (request, layout, args.socket), layout.world, None, PRELOAD)
        return 0
    ours, theirs = socket.socketpair()
    with ours:
        words = [
            sys.executable,
            "-m",
            "megallm",
            "chat",
            *_passed_on(args),
            "--socket",
            str(theirs.fileno()),
        ]
        ranks = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), start_new_session=True
        )
        theirs.close()
        left = Conversation(ours, args.system).run()
    code = ranks.wait()  # they leave when the socket closes; an error was already printed by them
    return 0 if left else code


def _passed_on(args: argparse.Namespace) -> list[str]:
    """Returns the options that concern the ranks, written out again."""
    words = []
    for name, value in vars(args).items():
        if name in ("system", "socket") or value is None:
            continue
        for item in value if isinstance(value, list) else [value]:
            words.append(f"--{name.replace('_', '-')}={item}")
    return words


class Conversation:
    """The person's side: lines in, text out, the history in between."""

    def __init__(self, connection: socket.socket, system: str | None) -> None:
        self.line = Line(connection)
        self.system = system
        self.history: list[dict[str, str]] = []
        self.asked = 0  # keys the randomness of each answer
        self.terminal = sys.stdin.isatty()

    def run(self) -> bool:
        """Runs the conversation until the person leaves (True) or the ranks end (False)."""
        ready = self._hear()
        if ready is None:
            return False
        if self.terminal:
            print(f"Chat template: {ready['template']}.\n{HELP}", flush=True)
        for text in self._lines():
            if text == "/quit":
                break
            if text.startswith("/"):
                self._command(text)
            elif text and not self._ask(text):
                return False
        return True

    def _lines(self) -> Iterator[str]:
        """Yields what the person says, a line each; the end of the input ends it. Ctrl-C at the
        prompt gives an empty line.
        """
        if not self.terminal:
            for line in sys.stdin:
                yield line.strip()
            return
        import readline  # noqa: F401 - input() then has editing and a history

        while True:
            try:
                yield input("> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n/quit leaves.")

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        if name == "/reset":
            self.history = []
        elif name == "/system":
            self.system, self.history = rest.strip() or None, []
        else:
            print(HELP, file=sys.stderr)

    def _ask(self, text: str) -> bool:
        """One question and its answer; False when the ranks have ended."""
        begin = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*begin, *self.history, {"role": "user", "content": text}]
        self.line.send(do="answer", messages=messages, number=self.asked)
        self.asked += 1
        with _on_interrupt(lambda: self.line.send(do=STOP)):
            answer = self._print_answer()
        if answer is None:
            return False
        if answer:
            self.history += [messages[-1], {"role": "assistant", "content": answer["text"]}]
        return True

    def _print_answer(self) -> dict[str, Any] | None:
        """Print an answer as it comes; what closed it, {} when there is none, None when the ranks
        have ended.
        """
        while (message := self._hear()) is not None:
            if "piece" in message:
                print(message["piece"], end="", flush=True)
            elif "error" in message:
                print(f"megallm: {message['error']}", file=sys.stderr, flush=True)
                return {}
            else:
                print(" [stopped]" if message["done"] == "interrupted" else "", flush=True)
                return message
        return None

    def _hear(self) -> dict[str, Any] | None:
        """Returns the ranks' next message; None when they have ended."""
        message = self.line.receive(None)
        return None if message.get("do") == QUIT else message


@contextmanager
def _on_interrupt(action: Callable[[], None]) -> Iterator[None]:
    """Inside the context Ctrl-C does this and nothing else."""
    before = signal.signal(signal.SIGINT, lambda number, frame: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _rank(env: RankEnv, request: GenerateRequest, layout: Layout, descriptor: int) -> None:
    from megallm.inference.chat import serve
    from megallm.launch.group import process_group
    from megallm.parallel.mesh import Mesh
    from megallm.peft.adapted import open_adapted

    line = Line(socket.socket(fileno=descriptor)) if env.rank == 0 else None
    with process_group(env) as device:
        serve(request, Mesh.start(layout, device), line, open_adapted)


COMMANDS = {"chat": Command(_arguments, _run)}
