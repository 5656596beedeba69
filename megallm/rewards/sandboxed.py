"""What runs inside the sandbox: model-written code, and in a sandbox of its own the tests of it.

The standard library alone: this file is started by its path, without the package.

The two never share an interpreter. The judge runs the tests; what they call is a stand-in whose
calls go through a pipe to the process with the tested code, and only plain values come back,
rebuilt by the judge. So the tested code has no verdict to write, no harness to read, no builtin or
`==` of the tests to replace, and an early exit is the end of a pipe.
"""

from __future__ import annotations

import builtins
import importlib
import json
import keyword
import os
import resource
import sys
import types
from collections.abc import Callable
from typing import Any, BinaryIO

MAX_REPLY = 4 << 20  # bytes of one value
_OPERATORS = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "getitem", "setitem",
    "delitem", "len", "iter", "next",
)  # fmt: skip
_SEQUENCES = {"l": list, "t": tuple, "s": set, "f": frozenset}


class Unsupported(Exception):
    """The tests pass something that cannot be sent to the tested code."""


def to_json_value(value: Any, reference: Callable[[Any], Any]) -> Any:
    """Returns plain data as JSON values with tags; `reference` stands for everything else."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            whole = kind(value)
            big = kind is int and whole.bit_length() > 63
            return ["i", hex(whole)] if big else whole
    for tag, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return [tag, *(to_json_value(item, reference) for item in kind(value))]
    if isinstance(value, dict):
        items = dict(value).items()
        return [
            "d",
            *(
                [to_json_value(key, reference), to_json_value(item, reference)]
                for key, item in items
            ),
        ]
    if isinstance(value, (bytes, bytearray)):
        return ["b", bytes(value).hex()]
    if isinstance(value, complex):
        return ["c", value.real, value.imag]
    return reference(value)


def from_json_value(value: Any, resolve: Callable[[list[Any]], Any]) -> Any:
    """Returns the value that `to_json_value` was given; `resolve` takes what is no plain data."""
    if not isinstance(value, list):
        return value
    tag, *items = value
    if tag in _SEQUENCES:
        return _SEQUENCES[tag](from_json_value(item, resolve) for item in items)
    if tag == "d":
        return {
            from_json_value(key, resolve): from_json_value(item, resolve) for key, item in items
        }
    if tag == "i":
        return int(items[0], 16)
    if tag == "b":
        return bytes.fromhex(items[0])
    if tag == "c":
        return complex(*items)
    return resolve(value)


class Ended(BaseException):
    """The tested code is gone; no test may catch that as an exception of the code."""


class Pipe:
    """One JSON value a line, in both directions."""

    def __init__(self, inward: int, outward: int) -> None:
        self.ended = ""
        self.inward: BinaryIO = os.fdopen(inward, "rb")
        self.outward: BinaryIO = os.fdopen(outward, "wb")

    def write(self, value: Any) -> None:
        self.outward.write(json.dumps(value).encode() + b"\n")
        self.outward.flush()

    def read(self) -> Any:
        line = self.inward.readline(MAX_REPLY)
        if not line.endswith(b"\n"):
            self.ended = self.ended or (
                "its value is too large" if line else "the tested code ended"
            )
            raise Ended(self.ended)
        return json.loads(line)


def _execute(text: str, space: dict[str, Any], name: str = "tests.py") -> None:
    exec(compile(text, name, "exec"), space)  # not in our own process: in the sandbox


# The side of the tested code.


class Objects:
    """What the tested code gave out that is no plain data, by number."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def reference(self, value: Any) -> list[Any]:
        if isinstance(value, types.ModuleType):
            return ["m", value.__name__]
        if isinstance(value, type) and issubclass(value, Exception):
            return ["e", *_exception_names(value)]
        self.kept.append(value)
        return ["o", len(self.kept) - 1]

    def resolve(self, value: list[Any]) -> Any:
        return self.kept[value[1]]


def _exception_names(kind: type[BaseException]) -> tuple[str, str]:
    """Returns the name of an exception, and of the nearest builtin above it."""
    known = [one.__name__ for one in kind.__mro__ if vars(builtins).get(one.__name__) is one]
    return kind.__name__, known[0]


def run_tested(job: dict[str, Any], pipe: Pipe) -> None:
    """Run the tested code, then answer what the judge asks."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    objects = Objects()
    try:
        _execute(job["code"], vars(module), "solution.py")
    except Exception as error:  # the boundary of the tested code
        pipe.write(["raise", *_exception_names(type(error)), str(error)[:500]])
        return
    names = [name for name in vars(module) if name.isidentifier() and not name.startswith("__")]
    pipe.write(["ok", {name: _told(vars(module)[name], objects) for name in names}])
    while True:
        try:
            request = pipe.read()
        except Ended:
            return
        pipe.write(answer(request, objects))


def _told(value: Any, objects: Objects) -> Any:
    try:
        return to_json_value(value, objects.reference)
    except RecursionError:
        return None


def answer(request: list[Any], objects: Objects) -> list[Any]:
    """Returns the reply to one request: a value and the arguments as they are now, or what was
    raised.
    """
    action, number, *rest = request
    try:
        target = objects.kept[number]
        if action == "get":
            return ["ok", to_json_value(getattr(target, rest[0]), objects.reference)]
        name, args, kwargs = rest
        args = from_json_value(args, objects.resolve)
        kwargs = from_json_value(kwargs, objects.resolve)
        method = f"__{name}__"
        if name != "call" and method not in dir(type(target)):
            raise TypeError(f"{type(target).__name__} has no {method}")
        function = target if name == "call" else getattr(target, method)
        value = function(*args, **kwargs)
        return [
            "ok",
            to_json_value(value, objects.reference),
            to_json_value(args, objects.reference),
        ]
    except Exception as error:  # the boundary of the tested code
        return ["raise", *_exception_names(type(error)), str(error)[:500]]


# The side of the tests.


class Remote:
    """Stands for a function, class or object of the tested code. It equals nothing but itself."""

    def __init__(self, judge: TestRun, number: int) -> None:
        self.__dict__.update(_judge=judge, _number=number)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._judge.ask(["get", self._number, name])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._judge.call(self._number, "call", args, kwargs)

    def __bool__(self) -> bool:
        return True


def _operator(name: str) -> Callable[..., Any]:
    def forward(self: Remote, *args: Any) -> Any:
        return self._judge.call(self._number, name, args, {})

    return forward


for _name in _OPERATORS:
    setattr(Remote, f"__{_name}__", _operator(_name))


class TestRun:
    """Runs tests against the tested code at the other end of a pipe."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self.exceptions: dict[str, type[Exception]] = {}

    def names(self) -> dict[str, Any]:
        """Returns the names of the tested code; a builtin stays what it is."""
        told = self._reply()[0]
        return {
            name: from_json_value(value, self.named)
            for name, value in told.items()
            if name.isidentifier() and not keyword.iskeyword(name) and name not in vars(builtins)
        }

    def named(self, value: list[Any]) -> Any:
        """Returns what a name of the tested code stands for: of a module and of an exception our
        own.
        """
        kind, *rest = value
        if kind == "m":
            return importlib.import_module(rest[0]) if rest[0] in sys.stdlib_module_names else None
        return self.exception(*rest) if kind == "e" else self.resolve(value)

    def resolve(self, value: list[Any]) -> Any:
        """Returns the stand-in of a value that is no plain data."""
        if value[0] != "o":
            raise TypeError("the tested code gives a module or a class of exceptions")
        return Remote(self, value[1])

    def exception(self, name: str, base: str) -> type[Exception]:
        above = vars(builtins).get(base)
        if not (isinstance(above, type) and issubclass(above, Exception)):
            above = RuntimeError  # of SystemExit: what ends the tests is ours to say
        if name == base:
            return above
        return self.exceptions.setdefault(name, type(name, (above,), {}))

    def call(self, number: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns what a call of the tested code gives; lists, dicts and sets among the arguments
        become what it made of them.
        """
        sent = [
            "call",
            number,
            name,
            to_json_value(list(args), _number),
            to_json_value(kwargs, _number),
        ]
        self.pipe.write(sent)
        value, after = self._reply(name == "next")
        for own, new in zip(args, from_json_value(after, self.resolve), strict=True):
            if isinstance(own, list) and isinstance(new, list):
                own[:] = new
            elif isinstance(own, (dict, set)) and type(own) is type(new):
                own.clear()
                own.update(new)
        return from_json_value(value, self.resolve)

    def ask(self, request: list[Any]) -> Any:
        self.pipe.write(request)
        return from_json_value(self._reply()[0], self.resolve)

    def _reply(self, iterating: bool = False) -> list[Any]:
        state, *rest = self.pipe.read()
        if state == "raise":
            name, base, text = rest
            if base in ("StopIteration", "StopAsyncIteration") and not iterating:
                name = base = "RuntimeError"  # it would end a loop of the tests, in silence
            raise self.exception(name, base)(text)
        return rest


def _number(value: Any) -> list[Any]:
    if not isinstance(value, Remote):
        raise Unsupported(
            f"a test passes {type(value).__name__} to the tested code: plain data only"
        )
    return ["o", value._number]


def tests_of(job: dict[str, Any], space: dict[str, Any]) -> list[Callable[[], Any]]:
    """Returns the tests: calls with what they must give, single statements, or a text with `check`
    or `test_` functions.
    """
    entry = job.get("entry_point")
    if "calls" in job:
        function = space[entry] if entry in space else getattr(space["Solution"](), entry)
        return [lambda call=call: _compare(function, *call) for call in job["calls"]]
    if "statements" in job:
        return [lambda text=text: _state(text, space) for text in job["statements"]]
    _execute(job["text"], space)
    own = {name: value for name, value in space.items() if not isinstance(value, Remote)}
    if entry and "check" in own:
        return [lambda: own["check"](space[entry])]
    named = [own[name] for name in own if name.startswith("test_") and callable(own[name])]
    return named or [lambda: None]


def _compare(function: Callable[..., Any], args: list[Any], expected: Any) -> None:
    given = function(*args)
    plain = json.loads(json.dumps(given)) if isinstance(given, (tuple, list, dict)) else given
    if given != expected and plain != expected:  # what stands in a file has no tuples
        raise AssertionError(f"gives {str(given)[:200]} instead of {str(expected)[:200]}")


def _state(text: str, space: dict[str, Any]) -> None:
    try:
        _execute(text, space)
    except AssertionError as error:
        raise AssertionError(f"{text.strip()[:300]} {error}".strip()) from None


def run_tests(job: dict[str, Any], pipe: Pipe, verdict: int) -> None:
    """Run the tests and write {"passed", "total", "error"} to the descriptor `verdict`."""
    space: dict[str, Any] = {"__name__": "tests"}
    passed, total, told = 0, 1, ""
    unsupported = False
    try:
        names = TestRun(pipe).names()
        sys.modules["solution"] = types.ModuleType("solution")
        vars(sys.modules["solution"]).update(names)
        space.update(names)
        _execute(job.get("setup") or "", space)
        tests = tests_of(job, space)
        total = len(tests)
        for test in tests:
            try:
                test()
                passed += 1
            except Unsupported:
                raise
            except Exception as error:  # the boundary of a test: the others still run
                told = told or f"{type(error).__name__}: {error}"[:500]
    except BaseException as error:  # the boundary: whatever ends the tests fails them
        unsupported = isinstance(error, Unsupported)
        told = f"{type(error).__name__}: {error}"[:500]
    if pipe.ended:
        passed, told = min(passed, total - 1), pipe.ended
    line = {"passed": passed, "total": total, "error": told, "unsupported": unsupported}
    line["ended"] = bool(pipe.ended)
    os.write(verdict, json.dumps(line).encode() + b"\n")


def run_alone(job: dict[str, Any]) -> None:
    """Run a program that reads its input and prints its output."""
    space = types.ModuleType("__main__")
    sys.modules["__main__"] = space
    sys.argv = ["program.py"]
    _execute(job["code"], vars(space), "program.py")


def main() -> None:
    role, job_file, started, *files = [sys.argv[1], *map(int, sys.argv[2:])]
    with os.fdopen(job_file, "rb") as file:
        job = json.loads(file.read())
    for name, limit in job["limits"].items():
        resource.setrlimit(vars(resource)[name], (limit, limit))
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # which -S leaves out, and programs call
    os.write(started, b"S")
    os.close(started)
    if role == "program":
        run_alone(job)
    elif role == "serve":
        run_tested(job, Pipe(*files))
    else:
        run_tests(job, Pipe(*files[:2]), files[2])


if __name__ == "__main__":
    main()
