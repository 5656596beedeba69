"""The readable text of an HTML page: blocks on lines of their own, preformatted text as it is.

Scripts, menus, the page's header and footer, asides, form controls and what a browser does not
show are left out.
"""

from __future__ import annotations

import re
from typing import Any

from megallm.base import optional

_SKIPPED = (
    "script", "style", "noscript", "template", "head", "nav", "svg", "iframe", "object", "embed",
    "canvas", "audio", "video",
    "aside", "dialog", "menu", "button", "select", "input", "textarea", "datalist", "output",
    "progress", "meter", "map",
)  # fmt: skip
# What a browser does not show, and boilerplate by its role.
_ROLES = (
    "navigation", "search", "dialog", "alertdialog", "menu", "menubar", "toolbar", "banner",
    "contentinfo", "complementary", "tablist", "tooltip",
)  # fmt: skip
_HIDDEN = ", ".join((
    "[hidden]", "label", ".sr-only", ".visually-hidden", ".visuallyhidden", ".screen-reader-text",
    ".element-invisible",
    *(f'[role~="{role}" i]' for role in _ROLES),
))  # fmt: skip
_NOT_SHOWN = re.compile(
    r"(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*(?:hidden|collapse))\b", re.IGNORECASE
)
_WHOLE = ("html", "body")  # hidden until a script has run, to avoid flicker
_OWN_HEADERS = ("article", "main")  # the header of an article is its headline, a page's is not
_FORM_PROSE = 400  # characters of paragraphs in a form that is wrapped around a whole page
_PARAGRAPHS = frozenset(
    ("p", "div", "section", "article", "main", "aside", "header", "footer", "h1", "h2", "h3", "h4", "h5", "h6", "ul",
     "ol", "dl", "table", "blockquote", "pre", "figure", "hr", "body")
)  # fmt: skip
_LINES = frozenset(("br", "li", "dt", "dd", "tr", "caption", "figcaption"))
_CELLS = frozenset(("td", "th"))
_SPACE = re.compile(r"[ \t\r\n\f]+")
_BLANKS = re.compile(r"[ \t]*\n[ \t]*")
_MANY = re.compile(r"\n{3,}")
_KEPT_SPACE = (
    "\ue000"  # a private character stands for a line break of preformatted text until the end
)


def text_of_html(html: str) -> str:
    """Returns plain text: a blank line between blocks, one line an item or row. Errors:
    `UsageError` without selectolax.
    """
    lexbor = optional.need("selectolax.lexbor", "give text or JSONL files")
    tree = lexbor.LexborHTMLParser(html)
    tree.strip_tags(list(_SKIPPED))
    # From the end, so that no part of what is gone is looked at.
    for node in reversed(tree.css(_HIDDEN)):
        if node.tag not in _WHOLE:
            node.decompose()
    for node in reversed(tree.css("[style], header, footer, form")):
        if _is_boilerplate(node):
            node.decompose()
    pieces: list[str] = []
    if tree.root is not None:
        _collect(tree.root, pieces)
    text = _BLANKS.sub("\n", "".join(pieces))
    return _MANY.sub("\n\n", text).replace(_KEPT_SPACE, "\n").strip()


def _is_boilerplate(node: Any) -> bool:
    """Returns whether an element with a style, a header, a footer or a form is left out."""
    if node.tag not in _WHOLE and _NOT_SHOWN.search(node.attributes.get("style") or ""):
        return True
    if node.tag == "header":
        return not _is_inside(node, _OWN_HEADERS)
    if node.tag == "footer":
        return not _is_inside(node, ("blockquote",))  # whom it quotes
    if node.tag == "form":
        return sum(len(part.text()) for part in node.css("p, article, li, td")) < _FORM_PROSE
    return False


def _is_inside(node: Any, tags: tuple[str, ...]) -> bool:
    while node is not None:
        if node.tag in tags:
            return True
        node = node.parent
    return False


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
        mark = (
            "\n\n"
            if tag in _PARAGRAPHS
            else "\n"
            if tag in _LINES
            else " "
            if tag in _CELLS
            else ""
        )
        children = list(node.iter(include_text=True)) if tag != "-comment" else []  # type: ignore[attr-defined]
        if mark:
            stack.append(mark)  # comes after the children
            if tag in _PARAGRAPHS:
                pieces.append(mark)
        stack.extend(reversed(children))
