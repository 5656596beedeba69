"""`report.html`: one file without scripts or outside links; every text in it is escaped."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import jinja2
import yaml

from megallm.base.redact import redacted, redacted_text
from megallm.parallel.layout import Layout
from megallm.report import chart
from megallm.report.facts import RunFacts
from megallm.report.goodput import PARTS, attempts, goodput
from megallm.run.console import MetricRow
from megallm.run.rows import LONG_FIELDS

# Charts that stand first: title, and the metrics that share it. Every other number has its own.
FIRST = (
    ("loss", ("train/loss", "val/loss")),
    ("gradient norm", ("train/grad_norm",)),
    ("learning rate", ("train/lr",)),
    ("tokens a second", ("perf/tokens_per_sec",)),
)
LEFT_OUT = {"step", "perf/unix_time", "consumed_tokens", "train/skipped_steps"}
INCIDENTS = ("saved", "not_saved")  # events that are no incidents
MAX_RANKS = 64  # of a layout that is drawn rank by rank
MAX_IMAGE_BYTES = 4 << 20
_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]"
)

_TEMPLATE = Path(__file__).with_name("page.html")


def render_page(facts: RunFacts) -> str:
    """Returns the page of a run."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    spent = goodput(facts.events, facts.rows)
    first, rest = _charts(facts.rows)
    ledger = [
        (part, colour, _span(spent.seconds[part]), f"{spent.seconds[part] / (spent.wall or 1):.1%}")
        for part, colour in zip(PARTS, chart.COLOURS, strict=False)
    ]
    layout, grid = _layout(facts)
    text = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"Run {facts.path.resolve().name}",
        state=facts.state,
        told=f"as of {_time(_latest(facts))}" if facts.events else "",
        figures=_figures(facts),
        charts=first,
        rest=rest,
        wall=_span(spent.wall) if spent.wall else "",
        fraction=spent.fraction,
        bar=chart.stacked_bar(spent.seconds),
        ledger=ledger,
        starts=[
            (
                _time(one.began),
                f"{one.first_step + 1} to {one.last_step}",
                one.lost_steps or "",
                _span(one.ended - one.began),
            )
            for one in attempts(facts.events, facts.rows)
        ],
        incidents=list(_incidents(facts.events)),
        layout=layout,
        grid=grid,
        images=list(_images(facts.path / "plots")),
        samples=[_sample(row) for row in reversed(facts.samples)],
        config=yaml.safe_dump(redacted(facts.config), sort_keys=False, allow_unicode=True),
        environment=json.dumps(redacted(facts.environment), indent=2, ensure_ascii=False),
    )
    return redacted_text(_FORBIDDEN.sub("\ufffd", text))


def _latest(facts: RunFacts) -> float:
    times = [float(event["time"]) for event in facts.events[-1:]]
    return max(times + [float(row.get("perf/unix_time") or 0) for row in facts.rows[-1:]])


def _figures(facts: RunFacts) -> list[tuple[str, str]]:
    """The numbers that a reader looks for first."""
    found = [("steps", f"{facts.step:,} of {facts.steps:,}")]
    last = facts.rows[-1] if facts.rows else {}
    named = (
        ("train/loss", "training loss", "{:.4f}"), ("val/loss", "held-out loss", "{:.4f}"),
        ("rl/reward_mean", "mean reward", "{:.4f}"), ("perf/mfu", "MFU", "{:.1%}"),
        ("mem/peak_gib", "peak memory of a rank", "{:.2f} GiB"),
    )  # fmt: skip
    for key, name, form in named:
        values = [row[key] for row in facts.rows if row.get(key) is not None]
        if values:
            found.append((name, form.format(values[-1])))
    if last.get("consumed_tokens"):
        found.append(("tokens consumed", f"{last['consumed_tokens']:,}"))
    rates = sorted(
        row["perf/tokens_per_sec"] for row in facts.rows if row.get("perf/tokens_per_sec")
    )
    if rates:
        found.append(("tokens a second, median", f"{rates[len(rates) // 2]:,.0f}"))
    if facts.checkpoints:
        found.append(("newest checkpoint", f"step {facts.checkpoints[0]}"))
    return found


def _charts(rows: Sequence[MetricRow]) -> tuple[list[str], list[str]]:
    """The charts of every number in the rows: those that stand first, and the others."""
    names = {key for row in rows for key, value in row.items() if type(value) in (int, float)}
    shown = {name for _, group in FIRST for name in group}
    first = [
        chart.line_chart(title, {name: _points(rows, name) for name in group})
        for title, group in FIRST
    ]
    rest = [
        chart.line_chart(name, {name: _points(rows, name)})
        for name in sorted(names - shown - LEFT_OUT)
    ]
    return [svg for svg in first if svg], [svg for svg in rest if svg]


def _points(rows: Sequence[MetricRow], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if type(row.get(name)) in (int, float)]


def _incidents(events: Sequence[MetricRow]) -> Iterator[tuple[str, str, str, str]]:
    for event in events:
        if event["event"] in INCIDENTS[:1]:
            continue
        hidden = ("time", "event", "step", *LONG_FIELDS)
        told = {key: value for key, value in event.items() if key not in hidden}
        words = "; ".join(f"{key}: {value}" for key, value in told.items())
        yield _time(float(event["time"])), event["event"], str(event.get("step", "")), words


def _layout(facts: RunFacts) -> tuple[str, list[list[str]]]:
    """The layout in words, and the ranks as a grid of pipeline stages by the other axes."""
    sizes = facts.environment.get("layout")
    if not isinstance(sizes, dict):
        return "unknown", []
    axes = {key: value for key, value in sizes.items() if type(value) is int}
    schedule = facts.config.get("layout", {}).get("schedule")
    words = " x ".join(f"{axis}={size}" for axis, size in axes.items() if size > 1) or "one process"
    words += f", schedule {schedule}" if axes.get("pp", 1) > 1 and schedule else ""
    layout = Layout(**axes)
    if layout.world > MAX_RANKS or layout.world == 1:
        return words, []
    return words, list(_grid(layout))


def _grid(layout: Layout) -> Iterator[list[str]]:
    across = layout.world // layout.pp
    yield ["", *(f"{_place(layout, column)}" for column in range(across))]
    for stage in range(layout.pp):
        yield [f"pp {stage}", *(f"rank {stage * across + column}" for column in range(across))]


def _place(layout: Layout, column: int) -> str:
    """The coordinates of a column of the grid over dp, cp and tp."""
    tp, rest = column % layout.tp, column // layout.tp
    cp, dp = rest % layout.cp, rest // layout.cp
    named = (("dp", layout.dp, dp), ("cp", layout.cp, cp), ("tp", layout.tp, tp))
    return " ".join(f"{axis} {at}" for axis, size, at in named if size > 1)


def _images(plots: Path) -> Iterator[tuple[str, str]]:
    """The pictures of a run as data; in an image no script of an SVG runs."""
    kinds = {".svg": "image/svg+xml", ".png": "image/png"}
    for path in sorted(plots.glob("*")) if plots.is_dir() else ():
        if path.suffix in kinds and path.is_file() and path.stat().st_size <= MAX_IMAGE_BYTES:
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            yield path.name, f"data:{kinds[path.suffix]};base64,{data}"


def _sample(row: MetricRow) -> dict[str, str]:
    texts = [
        f"{key}: {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in row.items()
        if key != "tokens"
    ]
    return {"title": f"step {row.get('step', '?')}", "text": "\n".join(texts)[:4000]}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _span(seconds: float) -> str:
    """Returns seconds as a person says them: 12.3 s, 41 min 20 s, 4 h 41 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
