"""`megallm chat` on the ranks: conversations come as JSON lines over a socket, answers go back
piece by piece.

Rank 0 talks to the front end. The other ranks wait for what it broadcasts, and hear from it at
least once a minute, so that no collective times out while a person thinks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megallm.base.errors import DataError, UsageError
from megallm.data.chat.template import ChatTemplate, find_template
from megallm.inference import generate
from megallm.inference.generate import Loaded, Opener
from megallm.inference.line import QUIT, STOP, Line
from megallm.inference.request import GenerateRequest
from megallm.inference.samples import Request
from megallm.parallel.mesh import Mesh

IDLE_SECONDS = 60.0


def serve(
    request: GenerateRequest, mesh: Mesh, line: Line | None, opener: Opener = generate.open_plain
) -> None:
    """Answer conversations until the front end leaves; `line` is rank 0's. Collective over the
    world.
    """
    loaded = generate.load(request, mesh, opener)
    template = find_template(loaded.folder, loaded.words.special_texts)
    if line is not None:
        line.send(ready=True, template=template.origin)
    while True:
        work = mesh.broadcast_json(_next_work(line, loaded, template) if line is not None else None)
        if work["do"] == QUIT:
            return
        if work["do"] == "answer":
            _answer(work, request, loaded, line)


def _next_work(line: Line, loaded: Loaded, template: ChatTemplate) -> dict[str, Any]:
    """What all ranks do next: answer a conversation given as tokens, wait, or quit."""
    message = line.receive(IDLE_SECONDS)
    if (
        message is None or message["do"] == STOP
    ):  # nobody spoke, or an answer was stopped when it had just ended
        return {"do": "wait"}
    if message["do"] == QUIT:
        return message
    try:
        text = template.render(message["messages"])
        tokens = loaded.words.encode(text, special=True)
    except DataError as error:
        line.send(error=str(error))
        return {"do": "wait"}
    return {"do": "answer", "tokens": tokens, "number": message["number"], "stops": template.stops}


def _answer(
    work: dict[str, Any], request: GenerateRequest, loaded: Loaded, line: Line | None
) -> None:
    """Generate one answer; the front end may stop it. Every rank passes through here with the same
    work.
    """
    asked = loaded.request(work["number"], work["tokens"], request, tuple(work["stops"]))

    def listen(asked: Request) -> None:
        line.send(piece=asked.answer.fresh())

    stopped = _stop_asker(line) if line is not None else _never
    try:
        loaded.generator.generate(
            [asked], generate.sampling_of(request), listen if line is not None else None, stopped
        )
    except UsageError as error:
        # raised alike on every rank, before anything runs: the text does not fit the model
        if line is not None:
            line.send(error=str(error))
        return
    if line is not None:
        line.send(done=asked.answer.reason, text=asked.answer.text, tokens=len(asked.answer.tokens))


def _stop_asker(line: Line) -> Callable[[], bool]:
    """Whether the front end has asked to stop this answer, or is gone; stays so."""
    asked = False

    def stopped() -> bool:
        nonlocal asked
        message = None if asked else line.receive(0.0)
        asked = asked or (message is not None and message["do"] in (STOP, QUIT))
        return asked

    return stopped


def _never() -> bool:
    return False
