"""Renders chat templates in a process of its own, which may use little memory, no files and two seconds of CPU.

A template comes with a model that nobody vouches for. Jinja's sandbox keeps it from reaching Python; the limits
of this process keep it from looping or growing. Run as a script: one JSON object comes in, one goes out.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any

LIMITS = {
    resource.RLIMIT_AS: 1 << 29,
    resource.RLIMIT_CPU: 2,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_CORE: 0,
}
MAX_TEXT = 8 << 20  # characters of a rendered conversation


def render(job: dict[str, Any]) -> str:
    """The text of `job["template"]` over `job["variables"]`; raises what Jinja raises."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}` marks the assistant's words for training; here it shows them."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **({"ensure_ascii": False} | options))

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    pieces, length = [], 0
    for piece in environment.from_string(job["template"]).generate(**job["variables"]):
        pieces.append(piece)
        length += len(piece)
        if length > MAX_TEXT:
            raise TemplateError(f"the text is longer than {MAX_TEXT} characters")
    return "".join(pieces)


def main() -> None:
    for kind, limit in LIMITS.items():
        resource.setrlimit(kind, (limit, limit))
    job = json.load(sys.stdin)
    try:
        answer = {"text": render(job)}
    except MemoryError:
        answer = {"error": "it needs too much memory"}
    except Exception as error:  # the boundary of this process: whatever a template does wrong is told in one line
        answer = {"error": f"{type(error).__name__}: {error}"[:500]}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
