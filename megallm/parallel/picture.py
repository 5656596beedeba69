"""Draw a pipeline's timeline, simulated or measured: SVG, PNG, and a trace for chrome://tracing or
Perfetto.

The drawing is laid out once, as rectangles and words in pixels; SVG and PNG only write them down.
Pure: no torch, and matplotlib is imported when a PNG is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from megallm.base.errors import UsageError
from megallm.base.files import atomic_path, atomic_write_text, writing
from megallm.parallel.schedule import BACKWARD, FORWARD, WEIGHT, Action, Placement
from megallm.parallel.simulate import TimedAction, Timeline

COLOURS = {
    FORWARD: "#0072b2",
    BACKWARD: "#d55e00",
    WEIGHT: "#009e73",
}  # told apart by colour-blind eyes too
INK, FAINT, IDLE, PAPER = "#1f2430", "#6b7280", "#eceef1", "#ffffff"
MAX_BOXES = 20_000

LEFT, RIGHT, TOP, BOTTOM = 58, 66, 78, 40  # margins around the rows
ROW, GAP = 24, 5  # height of a rank's row, and the space below it
NARROWEST, WIDEST = 520, 1800  # of the time axis
DIGIT = 6.2  # width of a digit of the numbers in the boxes
SMALL, NORMAL, LARGE = 10, 11, 13  # sizes of words


@dataclass(frozen=True)
class Picture:
    """What is drawn. `unit` is the unit of the timeline: "" for a simulated one, "s" for a measured
    one.
    """

    timeline: Timeline
    placement: Placement
    title: str = ""
    unit: str = ""


@dataclass(frozen=True)
class Rect:
    """A filled rectangle, in pixels from the upper left; `hint` is shown when a reader points at
    it.
    """

    x: float
    y: float
    width: float
    height: float
    fill: str
    hint: str = ""


@dataclass(frozen=True)
class Words:
    """One line of text around the height `y`, at, before or after `x` (`anchor` middle, end or
    start).
    """

    x: float
    y: float
    text: str
    size: int = NORMAL
    fill: str = INK
    anchor: str = "start"
    bold: bool = False


@dataclass(frozen=True)
class Drawing:
    """A laid-out picture."""

    width: float
    height: float
    rects: list[Rect]
    words: list[Words]


def chunk_colour(op: str, chunk: int, chunks: int) -> str:
    """Returns the colour of an operation, `#rrggbb`: the first chunk is darkest, later ones lean
    towards white.
    """
    share = 0.62 * chunk / max(1, chunks - 1)
    parts = [int(COLOURS[op][i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in parts)


def text_colour(fill: str) -> str:
    """Returns black or white, whichever reads better on `fill`."""
    red, green, blue = (int(fill[i : i + 2], 16) for i in (1, 3, 5))
    return PAPER if 0.30 * red + 0.59 * green + 0.11 * blue < 140 else INK


def lay_out(picture: Picture) -> Drawing:
    """Place a row of boxes for each rank, the time axis below, the legend above. Raises UsageError
    when too large.
    """
    slots = [slot for rank in picture.timeline.ranks for slot in rank]
    if len(slots) > MAX_BOXES:
        raise UsageError(
            f"The picture would have {len(slots)} boxes, at most {MAX_BOXES} can be read: draw "
            "fewer microbatches."
        )
    begin = min(slot.start for slot in slots)
    span = (picture.timeline.makespan - begin) or 1.0
    shortest = min((slot.end - slot.start for slot in slots if slot.end > slot.start), default=span)
    digits = max(len(str(slot.action.micro)) for slot in slots)
    plot = min(max(span / shortest * (DIGIT * digits + 6), NARROWEST), WIDEST)
    height = TOP + len(picture.timeline.ranks) * (ROW + GAP) + BOTTOM
    drawing = Drawing(
        LEFT + plot + RIGHT, height, [Rect(0, 0, LEFT + plot + RIGHT, height, PAPER)], []
    )
    _head(drawing, picture)
    for rank, row in enumerate(picture.timeline.ranks):
        top = TOP + rank * (ROW + GAP)
        drawing.rects.append(Rect(LEFT, top, plot, ROW, IDLE))
        drawing.words.append(Words(LEFT - 8, top + ROW / 2, f"rank {rank}", anchor="end"))
        peak = picture.timeline.peak_live[rank]
        drawing.words.append(
            Words(LEFT + plot + RIGHT / 2, top + ROW / 2, str(peak), anchor="middle")
        )
        for slot in row:
            _box(drawing, picture, slot, (begin, plot / span, top))
    _axis(drawing, span, plot, picture.unit)
    return drawing


def _box(
    drawing: Drawing, picture: Picture, slot: TimedAction, frame: tuple[float, float, float]
) -> None:
    begin, scale, top = frame
    action, placement = slot.action, picture.placement
    x, width = LEFT + (slot.start - begin) * scale, (slot.end - slot.start) * scale
    fill = chunk_colour(action.op, action.stage // placement.pp, placement.chunks)
    hint = (
        f"{action}: {slot.start - begin:.6g} to "
        f"{slot.end - begin:.6g}{picture.unit and ' ' + picture.unit}"
    )
    drawing.rects.append(Rect(x, top, max(width - 1, 0.4), ROW, fill, hint))
    label = str(action.micro)
    if width >= DIGIT * len(label) + 1:
        centre = x + (width - 1) / 2
        drawing.words.append(
            Words(centre, top + ROW / 2, label, SMALL, text_colour(fill), anchor="middle")
        )


def _head(drawing: Drawing, picture: Picture) -> None:
    """The title, the legend: operations with a shade for each chunk (of many: two), and what
    numbers mean.
    """
    timeline, chunks = picture.timeline, picture.placement.chunks
    shown = range(chunks) if chunks <= 8 else (0, chunks - 1)
    drawing.words.append(Words(LEFT, 16, picture.title, LARGE, bold=True))
    ops = {slot.action.op for row in timeline.ranks for slot in row}
    names = {
        FORWARD: "forward",
        BACKWARD: "backward: input gradient" if WEIGHT in ops else "backward",
        WEIGHT: "weight gradient",
    }
    x = float(LEFT)
    for op in (op for op in names if op in ops):
        for chunk in shown:
            drawing.rects.append(Rect(x, 34, 15, 13, chunk_colour(op, chunk, chunks)))
            x += 16
        drawing.words.append(Words(x + 4, 40.5, names[op]))
        x += 4 + 5.6 * len(names[op]) + 16
    note = "number in a box: microbatch"
    if chunks > 1:
        note += f"; shade: model chunk of the rank, from 0 (dark) to {chunks - 1} (light)"
    drawing.words.append(Words(LEFT, 58, note, SMALL, FAINT))
    drawing.words.append(
        Words(drawing.width - RIGHT / 2, TOP - 14, "peak live", SMALL, FAINT, anchor="middle")
    )


def _axis(drawing: Drawing, span: float, plot: float, unit: str) -> None:
    bottom = drawing.height - BOTTOM
    for tick in ticks(span):
        x = LEFT + tick / span * plot
        drawing.rects.append(Rect(x - 0.5, bottom, 1, 4, FAINT))
        drawing.words.append(Words(x, bottom + 12, f"{tick:g}", SMALL, FAINT, anchor="middle"))
    label = f"time [{unit}]" if unit else "time"
    drawing.words.append(Words(LEFT + plot / 2, bottom + 28, label, SMALL, FAINT, "middle"))


def ticks(span: float) -> list[float]:
    """Returns multiples of 1, 2 or 5 times a power of ten from 0 to `span`, at most 13 of them."""
    power = 10.0 ** math.floor(math.log10(span / 12))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) <= 12)
    return [index * step for index in range(int(span / step * (1 + 1e-12)) + 1)]


# --- writing it down
# -----------------------------------------------------------------------------------------------


def to_svg(drawing: Drawing) -> str:
    """Returns the drawing as one self-contained SVG file."""
    width, height = _number(drawing.width), _number(drawing.height)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 '
        f'{width} {height}" '
        'font-family="Helvetica,Arial,sans-serif">'
    ]
    for fill, rects in _grouped((rect.fill, rect) for rect in drawing.rects):
        lines.append(f'<g fill="{fill}">')
        for rect in rects:
            numbers = {"x": rect.x, "y": rect.y, "width": rect.width, "height": rect.height}
            body = " ".join(f'{name}="{_number(value)}"' for name, value in numbers.items())
            lines.append(
                f"<rect {body}><title>{escape(rect.hint)}</title></rect>"
                if rect.hint
                else f"<rect {body}/>"
            )
        lines.append("</g>")
    for (size, fill, anchor, bold), words in _grouped(
        ((w.size, w.fill, w.anchor, w.bold), w) for w in drawing.words
    ):
        weight = ' font-weight="bold"' if bold else ""
        lines.append(
            f'<g font-size="{size}" fill="{fill}" text-anchor={quoteattr(anchor)}{weight}>'
        )
        lines += [
            f'<text x="{_number(w.x)}" y="{_number(w.y + 0.35 * size)}">{escape(w.text)}</text>'
            for w in words
        ]
        lines.append("</g>")
    return "\n".join([*lines, "</svg>\n"])


def _grouped(pairs: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, list[Any]]]:
    groups: dict[Any, list[Any]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    yield from groups.items()


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def write_png(drawing: Drawing, path: Path) -> None:
    """Write the drawing as a PNG of twice its size in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second to import
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(
        figsize=(drawing.width / 72, drawing.height / 72), dpi=144
    )  # 72 points an inch: sizes are pixels
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, drawing.width), ylim=(drawing.height, 0))
    axes.axis("off")
    for rect in drawing.rects:
        axes.add_patch(
            Rectangle((rect.x, rect.y), rect.width, rect.height, facecolor=rect.fill, linewidth=0)
        )
    sides = {"start": "left", "middle": "center", "end": "right"}
    for words in drawing.words:
        style = {
            "fontsize": words.size,
            "color": words.fill,
            "weight": "bold" if words.bold else "normal",
        }
        y = words.y + 0.35 * words.size
        axes.text(
            words.x, y, words.text, ha=sides[words.anchor], va="baseline", parse_math=False, **style
        )
    figure.savefig(path, format="png")


def save_picture(picture: Picture, path: Path) -> None:
    """Draw into a `.svg` or `.png` file, whole or not at all."""
    check_name(path)
    drawing = lay_out(picture)
    if path.suffix == ".svg":
        atomic_write_text(path, to_svg(drawing))
        return
    with writing(path), atomic_path(path) as temporary:
        write_png(drawing, temporary)


def check_name(path: Path) -> None:
    """Raises UsageError for a name that ends neither in .svg nor in .png."""
    if path.suffix not in (".svg", ".png"):
        raise UsageError(f"A picture's name ends in .svg or .png; '{path.name}' does not.")


def chrome_trace(picture: Picture) -> dict[str, Any]:
    """Returns the timeline in the Trace Event Format: a thread for each rank, an arrow for each
    message between ranks.

    The format counts microseconds; a simulated unit of time is shown as one millisecond.
    """
    scale = 1e6 if picture.unit == "s" else 1e3
    begin = min(slot.start for row in picture.timeline.ranks for slot in row)
    ended = {
        slot.action: (rank, slot) for rank, row in enumerate(picture.timeline.ranks) for slot in row
    }
    events: list[dict[str, Any]] = []
    for rank, row in enumerate(picture.timeline.ranks):
        events.append(
            {
                "ph": "M",
                "pid": 0,
                "tid": rank,
                "name": "thread_name",
                "args": {"name": f"rank {rank}"},
            }
        )
        for slot in row:
            action, at = slot.action, (slot.start - begin) * scale
            event = {"pid": 0, "tid": rank, "ts": at, "cat": action.op}
            arguments = {"micro": action.micro, "stage": action.stage}
            duration = (slot.end - slot.start) * scale
            events.append(
                {**event, "ph": "X", "name": str(action), "dur": duration, "args": arguments}
            )
            source = _source(action)
            if source in ended and ended[source][0] != rank:
                there, sent = ended[source]
                arrow = {"pid": 0, "cat": "message", "name": "message", "id": len(events)}
                events.append({**arrow, "ph": "s", "tid": there, "ts": (sent.end - begin) * scale})
                events.append({**arrow, "ph": "f", "bp": "e", "tid": rank, "ts": at})
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"title": picture.title}}


def _source(action: Action) -> Action | None:
    """The action whose message an action waits for."""
    if action.op == WEIGHT:
        return None
    return Action(action.op, action.micro, action.stage + (-1 if action.op == FORWARD else 1))
