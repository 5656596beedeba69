"""report.html: one file without scripts or outside links; every text that came from data is
escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape as _escape
from typing import Any

from megallm.curate.stats import BINS, bins_of

_WIDTH, _HEIGHT, _FOOT = 330, 90, 18
_NOTE_CHARS = 300
_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]"
)
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#1c2430}
h1{font-size:1.5em}h2{font-size:1.2em;border-bottom:1px solid #d5dbe3;margin-top:2em}
table{border-collapse:collapse;width:100%}td,th{padding:.25em .7em;text-align:right;border-bottom:1px solid #e8ecf1}
td:first-child,th:first-child,th:last-child{text-align:left}
.bar{background:#4878b0;height:.8em}.gone{background:#d98a4b;height:.8em}
.track{display:flex;width:220px;background:#eef1f5}.plots{display:flex;flex-wrap:wrap;gap:1.6em 2em}
figure{margin:0;width:330px}figcaption{font-size:.8em;color:#556}i{color:#4878b0;font-style:normal}i~i{color:#d98a4b}
pre{white-space:pre-wrap;word-break:break-word;background:#f6f8fa;padding:.6em;font-size:.8em;
max-height:14em;overflow:auto;margin:.2em 0 .8em}del{background:#f6d5c3}
ins{background:#cfe8d0;text-decoration:none}.where{font-size:.8em;color:#667}summary{cursor:pointer}
"""


def escape(text: str) -> str:
    """Returns text for a page; characters that no page may hold become replacement characters."""
    return _escape(_FORBIDDEN.sub("\ufffd", text))


def render_report(stats: dict[str, Any], examples: dict[str, list[dict[str, Any]]]) -> str:
    """Returns the report of a run from its stats.json and the examples of what each rule
    removed.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Curation report</title>",
        f"<style>{_STYLE}</style><h1>Curation report</h1>",
        _totals(stats["totals"]),
        "<h2>Steps</h2>",
        _steps(stats["steps"], stats["totals"]["documents"]),
        "<h2>Reasons and examples</h2>",
        *(_reasons(name, row, examples) for name, row in stats["steps"].items()),
        "<h2>Distributions</h2><p>Each document that came to the step, by the value that its "
        "rule looks at; a bar says its own count when pointed at. The line is the limit.</p><div "
        "class=plots>",
        *(
            _histogram(name, entry["counts"], entry["limits"])
            for name, entry in stats["histograms"].items()
        ),
        "</div></html>\n",
    ]
    return "\n".join(parts)


def _totals(totals: dict[str, int]) -> str:
    kept = _percent(totals["kept"], totals["documents"])
    chars = _percent(totals["characters_kept"], totals["characters"])
    return (
        f"<p><b>{totals['kept']:,}</b> of {totals['documents']:,} documents kept ({kept}), "
        f"<b>{totals['characters_kept']:,}</b> of {totals['characters']:,} characters ({chars}); "
        f"{totals['lines_rejected']:,} lines could not be read"
        f"{f', and {bad:,} files not to their end' if (bad := totals.get('files_rejected', 0)) else ''}.</p>"
    )


def _steps(steps: dict[str, dict[str, Any]], documents: int) -> str:
    rows = []
    for name, row in steps.items():
        dropped = sum(row["dropped"].values())
        left = row["in"] - dropped
        bars = (
            "<div "
            f"class=track>{_bar('bar', left, documents)}{_bar('gone', dropped, documents)}</div>"
        )
        rows.append(
            _row(
                escape(name),
                f"{row['in']:,}",
                f"{dropped:,}",
                _percent(dropped, row["in"]),
                f"{row['edited_documents']:,}",
                f"{row['characters_dropped'] + row['characters_cut']:,}",
                bars,
            )
        )
    titles = (
        "step",
        "in",
        "dropped",
        "share",
        "edited",
        "characters removed",
        "<i>left</i>, <i>dropped</i>",
    )
    head = "".join(f"<th>{title}</th>" for title in titles)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _bar(kind: str, part: int, whole: int) -> str:
    return f'<div class={kind} style="width:{100 * part / max(whole, 1):.2f}%"></div>'


def _row(*cells: str) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"


def _reasons(step: str, row: dict[str, Any], examples: dict[str, list[dict[str, Any]]]) -> str:
    parts = []
    counts = [("dropped", reason, number) for reason, number in row["dropped"].items()]
    counts += [("edited", reason, number) for reason, number in row["edited"].items()]
    for action, reason, number in sorted(counts, key=lambda item: (-item[2], item[1])):
        unit = (
            f"{'document' if action == 'dropped' else 'span'}{'s' if number != 1 else ''} {action}"
        )
        shown = "".join(_example(one) for one in examples.get(f"{step}/{reason}", ()))
        parts.append(
            f"<details><summary><b>{escape(step)} / {escape(reason)}</b>: {number:,} "
            f"{unit}</summary>{shown}</details>"
        )
    return "".join(parts)


def _example(row: dict[str, Any]) -> str:
    note = ", ".join(f"{name} {value}" for name, value in row.get("note", {}).items())
    note = note if len(note) <= _NOTE_CHARS else f"{note[:_NOTE_CHARS]}..."
    where = escape(
        f"{row['file']}:{row['line']}  {row['id'] if row['id'] != row['file'] else ''}  {note}"
    )
    if "text" in row:
        body = escape(row["text"])
    else:
        body = f"{escape(row['before'])}<del>{escape(row['cut'])}</del>"
        body += f"<ins>{escape(row['replacement'])}</ins>"
        body += escape(row["after"])
    return f"<div class=where>{where}</div><pre>{body}</pre>"


def _histogram(name: str, counts: Sequence[int], limits: Sequence[float]) -> str:
    edges, most = bins_of(name), max([*counts, 1])
    step = _WIDTH / BINS
    bars = "".join(
        f'<rect x="{k * step:.1f}" y="{_HEIGHT - _HEIGHT * count / most:.1f}" '
        f'width="{step - 1:.1f}" '
        f'height="{_HEIGHT * count / most:.1f}" fill="#4878b0"><title>{_short(edges[k])} to '
        f"{_short(edges[k + 1])}: {count:,}</title></rect>"
        for k, count in enumerate(counts)
        if count
    )
    ticks = "".join(
        f'<text x="{k * step:.1f}" y="{_HEIGHT + 15}" font-size="10" '
        f'fill="#556">{_short(edges[k])}</text>'
        for k in range(0, BINS, BINS // 5)
    )
    line = "".join(_limit_line(edges, limit) for limit in limits)
    axis = f'<path d="M0 {_HEIGHT}H{_WIDTH}" stroke="#aab4c0"/>'
    limit = f", limit {' and '.join(map(_short, limits))}" if limits else ""
    return (
        f"<figure><figcaption>{escape(name)}{limit}; tallest bar "
        f"{max(counts, default=0):,}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + _FOOT}" width="{_WIDTH}" '
        f'height="{_HEIGHT + _FOOT}" role="img">'
        f"{bars}{line}{axis}{ticks}</svg></figure>"
    )


def _limit_line(edges: Iterable[float], limit: float) -> str:
    held = list(edges)
    below = sum(edge <= limit for edge in held) - 1
    if not 0 <= below < BINS:
        return ""
    x = _WIDTH / BINS * (below + (limit - held[below]) / (held[below + 1] - held[below]))
    ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HEIGHT}"'
    return f'<line {ends} stroke="#c0392b" stroke-width="1.5"/>'


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 10_000 else f"{value:.0e}".replace("e+0", "e")
