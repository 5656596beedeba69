"""The readable text of an HTML page: blocks on lines of their own, preformatted text as it is, no scripts or menus."""

from __future__ import annotations

import re

from megallm.curate import optional

_SKIPPED = ("script", "style", "noscript", "template", "head", "nav", "svg", "iframe", "form", "button", "select")
_PARAGRAPHS = frozenset(
    ("p", "div", "section", "article", "main", "aside", "header", "footer", "h1", "h2", "h3", "h4", "h5", "h6", "ul",
     "ol", "dl", "table", "blockquote", "pre", "figure", "hr", "body")
)  # fmt: skip
_LINES = frozenset(("br", "li", "dt", "dd", "tr", "caption", "figcaption"))
_CELLS = frozenset(("td", "th"))
_SPACE = re.compile(r"[ \t\r\n\f]+")
_BLANKS = re.compile(r"[ \t]*\n[ \t]*")
_MANY = re.compile(r"\n{3,}")
_KEPT_SPACE = "\ue000"  # a private character stands for a line break of preformatted text until the end


def text_of_html(html: str) -> str:
    """Plain text: a blank line between blocks, one line an item or row. Errors: `UsageError` without selectolax."""
    lexbor = optional.need("selectolax.lexbor", "give text or JSONL files")
    tree = lexbor.LexborHTMLParser(html)
    tree.strip_tags(list(_SKIPPED))
    pieces: list[str] = []
    if tree.root is not None:
        _collect(tree.root, pieces)
    text = _BLANKS.sub("\n", "".join(pieces))
    return _MANY.sub("\n\n", text).replace(_KEPT_SPACE, "\n").strip()


def _collect(root: object, pieces: list[str]) -> None:
    """Depth first without recursion: a page may be nested as deeply as it likes."""
    stack: list[object] = [root]
    while stack:
        node = stack.pop()
        if isinstance(node, str):
            pieces.append(node)
            continue
        tag = node.tag  # type: ignore[attr-defined]
        if tag == "-text":
            pieces.append(_SPACE.sub(" ", node.text_content or ""))  # type: ignore[attr-defined]
            continue
        if tag == "pre":
            pieces.append(f"\n\n{node.text().strip(chr(10)).replace(chr(10), _KEPT_SPACE)}\n\n")  # type: ignore[attr-defined]
            continue
        mark = "\n\n" if tag in _PARAGRAPHS else "\n" if tag in _LINES else " " if tag in _CELLS else ""
        children = list(node.iter(include_text=True)) if tag != "-comment" else []  # type: ignore[attr-defined]
        if mark:
            stack.append(mark)  # comes after the children
            if tag in _PARAGRAPHS:
                pieces.append(mark)
        stack.extend(reversed(children))
