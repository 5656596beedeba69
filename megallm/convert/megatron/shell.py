"""The words of the commands in a shell script, read without running anything. No torch.

Understood: comments, line continuations, quotes, `NAME=value`, `export`, arrays and `+=`, `$NAME`,
`${NAME}`, `${NAME:-default}`, `${NAME[@]}` and whole-number `$((...))`. Anything else that a shell
would work out (`$(command)`, backticks, `$1`, unknown variables) stays as it is written, and the
word says so. Of `if` and `case` every branch is read, one after the other.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from megallm.base.errors import UsageError

MAX_BYTES = 1 << 20
MAX_WORDS = 20_000  # after variables are followed

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_ASSIGNMENT = re.compile(rf"({_NAME})(\+?)=")
_VARIABLE = re.compile(rf"\$(?:({_NAME})|\{{({_NAME}|[0-9]+)(\[[@*]\])?(?::?-([^}}]*))?\}})")
_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}  # fmt: skip
_SEPARATORS = (";", "&", "|", "(", ")", "<", ">")
_OPENING, _CLOSING = ("if", "case", "for", "while", "until", "select"), ("fi", "esac", "done")
_SKIPPED = ("export", "declare", "local", "readonly", "then", "else", "do", "(", ")")


@dataclass
class Shell:
    """Variables and arrays so far, and the words of every command.

    `branches` are the lines that assign flags (words with `--`) inside an `if`, a `case` or a loop.
    """

    variables: dict[str, list[str]] = field(default_factory=dict)
    commands: list[list[str]] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    words: int = 0


def read_script(text: str, name: str) -> Shell:
    """Returns the commands of a script with variables filled in. Errors: UsageError `name:line:
    reason`.
    """
    if len(text) > MAX_BYTES:
        raise UsageError(f"{name} is larger than {MAX_BYTES} bytes; a launch script is short.")
    shell, depth = Shell(), 0
    for line, command in _commands(text, name):
        for tokens in _simple(list(_split(command))):
            first = next((token for token in tokens if token not in _SKIPPED), "")
            depth += (first in _OPENING) - (first in _CLOSING)
            if depth > 0 and _ASSIGNMENT.match(first) and any("--" in token for token in tokens):
                shell.branches.append(line)
            words = list(_words(tokens, f"{name}:{line}", shell))
            if words:
                shell.commands.append(words)
    return shell


def unresolved(word: str) -> bool:
    """Returns whether a shell would still have to work something out in this word."""
    return "$" in word or "`" in word


def _commands(text: str, name: str) -> Iterator[tuple[int, str]]:
    """Logical lines with the number of their first line: continued, or inside quotes, an array or
    `$(...)`.
    """
    held, begin = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        begin = begin or number
        if line.endswith("\\") and not line.endswith("\\\\"):
            held += line[:-1] + " "
            continue
        held += line
        if _open(held):
            held += "\n"
            continue
        yield begin, held
        held, begin = "", 0
    if held.strip():
        if _open(held):
            raise UsageError(
                f"{name}:{begin}: a quote or a bracket that opens here is never closed."
            )
        yield begin, held


def _open(text: str) -> bool:
    """Whether a quote or a bracket is still open at the end of the text."""
    try:
        depth = sum(
            {"(": 1, ")": -1}.get(piece, 0) for piece, quote, _ in _pieces(text) if not quote
        )
    except _Unclosed:
        return True
    return depth > 0 and re.match(rf"\s*(?:export\s+)?{_NAME}\+?=\(", text) is not None


class _Unclosed(Exception):
    """A quote, `$(`, `${` or backtick without its end."""


def _pieces(text: str) -> Iterator[tuple[str, str, str]]:
    """(piece, quote, as written): quotes, `$(...)`, `${...}` and backticks whole, else a character;
    no comments.
    """
    at = 0
    while at < len(text):
        char, quote, end = text[at], "", at + 1
        if char == "#" and (at == 0 or text[at - 1] in " \t\n;("):
            newline = text.find("\n", at)
            at = len(text) if newline < 0 else newline
            continue
        piece = char
        if char == "\\" and at + 1 < len(text):
            piece, quote, end = text[at + 1], "'", at + 2
        elif char in "'\"`":
            while end < len(text) and text[end] != char:
                end += 2 if text[end] == "\\" and char == '"' else 1
            if end >= len(text):
                raise _Unclosed
            end += 1
            piece, quote = text[at:end] if char == "`" else text[at + 1 : end - 1], char
        elif text.startswith(("$(", "${"), at):
            end = _closing(text, at + 1)
            piece, quote = text[at:end], "$"
        yield piece, quote, text[at:end]
        at = end


def _closing(text: str, at: int) -> int:
    """The index behind the bracket that closes the one at `at`."""
    opening, closing = text[at], {"(": ")", "{": "}"}[text[at]]
    depth = 0
    for index in range(at, len(text)):
        depth += (text[index] == opening) - (text[index] == closing)
        if depth == 0:
            return index + 1
    raise _Unclosed


def _simple(tokens: list[str]) -> Iterator[list[str]]:
    """Commands between `;`, `&`, `|`; what follows a redirection is left out, with the number
    before it.
    """
    command: list[str] = []
    redirected = False
    for token in [*tokens, ";"]:
        if token in ("<", ">"):
            redirected = True
            if command and command[-1] in ("1", "2"):
                command.pop()
        elif token in (";", "|") or (token == "&" and not redirected):
            yield command
            command, redirected = [], False
        elif not redirected:
            command.append(token)


def _words(tokens: list[str], where: str, shell: Shell) -> Iterator[str]:
    """Words of one command; assignments at its beginning are remembered instead."""
    at = 0
    while at < len(tokens):
        raw = tokens[at]
        if raw in _SKIPPED:
            at += 1
            continue
        found = _ASSIGNMENT.match(raw)
        if found is None:
            break
        value = raw[found.end() :]
        if value == "" and tokens[at + 1 : at + 2] == ["("]:
            end = tokens.index(")", at) if ")" in tokens[at:] else len(tokens)
            values = [
                word for token in tokens[at + 2 : end] for word in _expand(token, shell, where)
            ]
            at = end + 1
        else:
            values = [" ".join(_expand(value, shell, where, split=False))]
            at += 1
        old = shell.variables.get(found[1], []) if found[2] else []
        shell.variables[found[1]] = (
            old + values if value == "" or not old else ["".join(old + values)]
        )
    for token in tokens[at:]:
        yield from _expand(token, shell, where)


def _split(command: str) -> Iterator[str]:
    """Raw words, quotes kept; the shell's separators are words of their own."""
    word = ""
    for piece, quote, written in _pieces(command):
        if quote or not (piece in " \t\n" or piece in _SEPARATORS):
            word += written
            continue
        if word:
            yield word
        word = ""
        if piece in _SEPARATORS:
            yield piece
    if word:
        yield word


def _expand(raw: str, shell: Shell, where: str, split: bool = True) -> list[str]:
    """The words that a raw word becomes: variables filled in, unquoted ones split at blanks."""
    parts: list[tuple[str, bool]] = []  # (text, whether blanks in it separate words)
    for piece, quote, _ in _pieces(raw):
        if quote == "'":
            parts.append((piece, False))
        elif quote in ('"', "$"):
            piece = re.sub(r'\\(["\\`])', r"\1", piece)
            arrays = _VARIABLE.fullmatch(piece)
            if arrays is not None and arrays[3] and (arrays[2] in shell.variables):
                elements = shell.variables[arrays[2]]
                loose = (
                    quote == "$"
                )  # without quotes around it, elements are split at blanks like everything else
                parted = (
                    [word for element in elements for word in element.split()]
                    if loose
                    else list(elements)
                )
                return _counted(parted, shell, where)
            parts.append((_filled(piece, shell), quote == "$"))
        else:
            parts.append((piece, True))
    text = "".join(piece if loose else piece.replace(" ", "\0") for piece, loose in parts)
    text = _filled(text, shell)
    words = text.split() if split else [text]
    return _counted([word.replace("\0", " ") for word in words], shell, where)


def _counted(words: list[str], shell: Shell, where: str) -> list[str]:
    shell.words += len(words)
    if shell.words > MAX_WORDS or sum(map(len, words)) > MAX_BYTES:
        raise UsageError(
            f"{where}: variables expand to more than {MAX_WORDS} words; this is no launch script."
        )
    return words


def _filled(text: str, shell: Shell) -> str:
    """The text with variables and sums filled in, as far as they are known."""

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name in shell.variables and (shell.variables[name] != [""] or found[4] is None):
            return " ".join(shell.variables[name])
        return found[0] if found[4] is None else found[4].strip("'\"")

    text = _VARIABLE.sub(value, text)
    return re.sub(
        r"\$\(\(([^()]*(?:\([^()]*\)[^()]*)*)\)\)", lambda found: _sum(found, shell), text
    )


def _sum(found: re.Match[str], shell: Shell) -> str:
    """The value of `$((...))` over whole numbers; as written when it is something else."""

    def name_or_number(word: re.Match[str]) -> str:
        return " ".join(shell.variables.get(word[0], [word[0]]))

    text = re.sub(_NAME, name_or_number, found[1])
    try:
        return str(_value(ast.parse(text.strip().replace("/", "//"), mode="eval").body))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return found[0]


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError
