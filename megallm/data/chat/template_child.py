"""Renders chat templates in a process of its own, which may use little memory, no files and, for
each conversation, two seconds of CPU.

A template comes with a model that nobody vouches for. Jinja's sandbox keeps it from reaching
Python; the limits of this process keep it from looping or growing. Run as a script: each line that
comes in is a JSON object and one goes out for it. The first brings the template, each later one a
conversation.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

LIMITS = {
    resource.RLIMIT_AS: 1 << 29,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_CORE: 0,
}
CPU_SECONDS = 2.0  # of a conversation; then the kernel ends this process
MAX_TEXT = 8 << 20  # characters of a rendered conversation


def compiled(source: str, date: str | None) -> Callable[[dict[str, Any]], str]:
    """Returns what renders variables with the template `source`; raises what Jinja raises.

    `date` is what `strftime_now` says (YYYY-MM-DD), None for the clock.
    """
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}` marks the assistant's words for training; here
        it shows them.
        """

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **({"ensure_ascii": False} | options))

    def strftime_now(form: str) -> str:
        return (datetime.fromisoformat(date) if date else datetime.now()).strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    template = environment.from_string(source)

    def render(variables: dict[str, Any]) -> str:
        pieces, length = [], 0
        for piece in template.generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_TEXT:
                raise TemplateError(f"the text is longer than {MAX_TEXT} characters")
        return "".join(pieces)

    return render


def answers(render: Callable[[dict[str, Any]], str], job: dict[str, Any]) -> list[str]:
    """Returns the text of the first n messages for each cut (n, whether the assistant is to speak
    next).
    """
    variables, messages = job["variables"], job["variables"]["messages"]
    return [
        render(variables | {"messages": messages[:count], "add_generation_prompt": prompt})
        for count, prompt in job["cuts"]
    ]


def main() -> None:
    for kind, limit in LIMITS.items():
        resource.setrlimit(kind, (limit, limit))
    render = None
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            job = json.loads(line)
            if render is None:
                answer: dict[str, Any] = {"texts": []}
                render = compiled(job["template"], job["date"])
            else:
                answer = {"texts": answers(render, job)}
        except MemoryError:
            answer = {"error": "it needs too much memory"}
        except Exception as error:  # the boundary of this process: told in one line
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
