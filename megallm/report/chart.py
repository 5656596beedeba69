"""Line charts and bars as SVG, made of numbers and escaped words only. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 190, 56, 10, 26, 22
POINTS = 400  # of a line; more are averaged, and their range is drawn behind it
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b7280")


@dataclass(frozen=True)
class CurveBin:
    """Neighbouring points of a curve: their mean place, and the mean and range of their values."""

    x: float
    mean: float
    low: float
    high: float


def bin_points(points: Sequence[tuple[float, float]], count: int = POINTS) -> list[CurveBin]:
    """Returns at most `count` buckets of the finite points, in order."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = max(1, -(-len(finite) // count))
    found = []
    for begin in range(0, len(finite), size):
        xs, ys = zip(*finite[begin : begin + size], strict=True)
        found.append(CurveBin(sum(xs) / len(xs), sum(ys) / len(ys), min(ys), max(ys)))
    return found


def round_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Returns round numbers between `low` and `high`, about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(title: str, series: dict[str, Sequence[tuple[float, float]]]) -> str:
    """Returns an SVG of one or more curves over one axis; "" when no curve has a finite point."""
    lines = {name: bin_points(points) for name, points in series.items()}
    lines = {name: found for name, found in lines.items() if found}
    every = [bucket for found in lines.values() for bucket in found]
    if not every:
        return ""
    low, high = _room(min(b.low for b in every), max(b.high for b in every))
    left, right = min(b.x for b in every), max(b.x for b in every)

    def x_at(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (
            (value - left) / (right - left) if right > left else 0.5
        )

    def y_at(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    parts = [_words(LEFT, 14, title, "start", "b")]
    for value in round_ticks(low, high):
        y = y_at(value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e5e8ec"/>')
        parts.append(_words(LEFT - 5, y + 3.5, f"{value:.6g}", "end"))
    parts += [
        _words(x_at(value), HEIGHT - 6, f"{value:.6g}", "middle")
        for value in round_ticks(left, right)
    ]
    for (name, found), colour in zip(lines.items(), COLOURS * len(lines), strict=False):
        band = [f"{x_at(b.x):.1f} {y_at(b.high):.1f}" for b in found]
        band += [f"{x_at(b.x):.1f} {y_at(b.low):.1f}" for b in reversed(found)]
        path = " L".join(f"{x_at(b.x):.1f} {y_at(b.mean):.1f}" for b in found)
        parts.append(f'<path d="M{" L".join(band)}Z" fill="{colour}" opacity=".18"/>')
        hint = f"<title>{escape(name)}: last {found[-1].mean:.6g}</title>"
        parts.append(
            f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.6">{hint}</path>'
        )
        if len(found) == 1:
            place = f'cx="{x_at(found[0].x):.1f}" cy="{y_at(found[0].mean):.1f}"'
            parts.append(f'<circle {place} r="3" fill="{colour}"/>')
    if len(lines) > 1:
        parts += _legend(list(lines))
    return _svg(WIDTH, HEIGHT, parts)


def stacked_bar(parts: dict[str, float]) -> str:
    """Returns an SVG of one bar that is divided like `parts`; "" when they are all zero."""
    total = sum(parts.values())
    if total <= 0:
        return ""
    width, position, drawn = 2 * WIDTH, 0.0, []
    for (name, value), colour in zip(parts.items(), COLOURS, strict=False):
        span = width * value / total
        hint = f"<title>{escape(name)}: {value:.1f} s, {value / total:.1%}</title>"
        place = f'x="{position:.1f}" y="0" width="{span:.1f}" height="22"'
        drawn.append(f'<rect {place} fill="{colour}">{hint}</rect>')
        position += span
    return _svg(width, 22, drawn)


def _room(low: float, high: float) -> tuple[float, float]:
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _legend(names: Sequence[str]) -> list[str]:
    parts, x = [], WIDTH - RIGHT
    for name, colour in reversed(list(zip(names, COLOURS * len(names), strict=False))):
        parts.append(
            f'<text x="{x}" y="14" text-anchor="end" fill="{colour}">{escape(name)}</text>'
        )
        x -= 7 * len(name) + 12
    return parts


def _words(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    weight = ' font-weight="600"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui,sans-serif" font-size="11" fill="#374151">'
        f"{''.join(parts)}</svg>"
    )
