"""Where the time of a step goes: the account of `megallm profile`, its table and its picture. Pure.

A rank's step is divided into spans without gaps, so that the parts sum to its seconds: the phases
that it is in, and inside them what it waits for other ranks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from megallm.parallel.picture import FAINT, IDLE, LARGE, SMALL, Drawing, Rect, Words, ticks

WAIT = "wait"  # the first word of a span in a collective: `wait tp all_reduce`
HOST = "Python and launches"
# What phases of the heartbeat count as.
PARTS = {
    "data": "data", "forward": "compute", "backward": "compute", "score": "compute", "update": "compute",
    "reduce": "optimizer", "optimizer": "optimizer", "rollout": "rollout", "reward": "reward functions",
}  # fmt: skip
COMPUTE, BUBBLE, IDLE_PART = "compute", "bubble", "idle"
COLOURS = {
    "forward": "#0072b2", "backward": "#d55e00", "optimizer": "#009e73", "reduce": "#66c2a5", "data": "#f0e442",
    "rollout": "#56b4e9", "reward": "#b8860b", "score": "#7a9cc6", "update": "#8c6bb1", BUBBLE: "#c9ced6",
    "communication": "#cc79a7",
}  # fmt: skip
LEFT, TOP, ROW, GAP, PLOT = 58, 66, 24, 5, 1000


@dataclass(frozen=True)
class StepSpan:
    """A stretch of a step, in seconds: a phase, or `wait AXIS OPERATION`."""

    name: str
    begin: float
    end: float


def part_of(name: str) -> str:
    """Returns the part of the account that a span belongs to."""
    kind, *words = name.split()
    if kind != WAIT:
        return PARTS.get(name, "other")
    axis, operation = words
    return BUBBLE if (axis, operation) == ("pp", "recv") else f"communication {axis}"


@dataclass
class RankProfile:
    """What a rank has recorded: the spans of each measured step; of one step its traffic by (axis,
    operation), and the seconds of operations inside the part compute.
    """

    steps: list[list[StepSpan]] = field(default_factory=list)
    traffic: dict[str, list[int]] = field(default_factory=dict)  # "tp all_reduce" -> calls, bytes
    operations: dict[str, float] = field(default_factory=dict)
    traced_compute: float = 0.0  # seconds of compute in the step of `operations`
    device: dict[str, float] = field(default_factory=dict)  # parts of that step on a GPU

    def seconds(self) -> float:
        """Returns the mean seconds of a measured step."""
        return fmean(spans[-1].end - spans[0].begin for spans in self.steps)

    def parts(self) -> dict[str, float]:
        """Returns the seconds of each part, which sum to those of a step."""
        found: Counter[str] = Counter()
        for spans in self.steps:
            for span in spans:
                found[part_of(span.name)] += (span.end - span.begin) / len(self.steps)
        return dict(found)

    def shares(self) -> dict[str, float]:
        """Returns the share of each operation in compute, and of what is no operation."""
        if not self.traced_compute:
            return {}
        made = {name: value / self.traced_compute for name, value in self.operations.items()}
        return made | {HOST: max(0.0, 1.0 - sum(made.values()))}


def device_parts(
    kernels: Sequence[tuple[str, float, float]], begin: float, end: float
) -> dict[str, float]:
    """Returns how long a GPU computes, exchanges while nothing is computed (of kernels whose name
    says nccl), and is idle, from (name, begin, end) of its kernels; they sum to `end - begin`.
    """
    edges: list[tuple[float, int, int]] = []
    for name, start, stop in kernels:
        kind = int("nccl" in name.lower())
        start, stop = max(start, begin), min(stop, end)
        edges += [(start, kind, 1), (stop, kind, -1)] if stop > start else []
    open_kernels, last = [0, 0], begin
    found = {COMPUTE: 0.0, "communication": 0.0, IDLE_PART: 0.0}
    for at, kind, change in [*sorted(edges), (end, 0, 0)]:
        part = COMPUTE if open_kernels[0] else "communication" if open_kernels[1] else IDLE_PART
        found[part] += at - last
        open_kernels[kind] += change
        last = at
    return found


def table(ranks: Sequence[RankProfile], most: int = 12) -> Iterator[str]:
    """Yields the lines that a person reads: parts as means over the ranks, with the least and the
    most of a rank.
    """
    step = fmean(rank.seconds() for rank in ranks)
    count = len(ranks[0].steps)
    of = f"mean of {count} steps, {len(ranks)} ranks; then least and most of a rank"
    yield f"step {step:.4f} s ({of})"
    parts = [rank.parts() for rank in ranks]
    means = _means(parts)
    shares = _means([rank.shares() for rank in ranks])
    for name in sorted(means, key=lambda name: -means[name]):
        yield _line(name, [rank.get(name, 0.0) for rank in parts], step)
        kept = sorted(shares, key=lambda one: -shares[one])[:most] if name == COMPUTE else ()
        rest = 1.0 - sum(shares[one] for one in kept)
        for one in kept:
            yield _line(f"  {one}", [shares[one] * means[name]], step)
        if kept and rest > 5e-4:
            yield _line("  other operations", [rest * means[name]], step)
        yield from _traffic(ranks, name)
    yield _line("sum", [sum(means.values())], step)
    if any(rank.device for rank in ranks):
        yield "on the GPU, in the traced step:"
        device = _means([rank.device for rank in ranks])
        for name, seconds in device.items():
            yield _line(f"  {name}", [seconds], sum(device.values()))


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        for name, value in row.items():
            total[name] += value / len(rows)
    return dict(total)


def _line(name: str, seconds: Sequence[float], step: float) -> str:
    mean = fmean(seconds)
    spread = f"   [{min(seconds):.4f}, {max(seconds):.4f}]" if len(seconds) > 1 else ""
    return f"  {name[:44]:44} {mean:9.4f} s {mean / step:6.1%}{spread}"


def _traffic(ranks: Sequence[RankProfile], part: str) -> Iterator[str]:
    """Yields a line for each operation of the axis that a part waits for."""
    names = sorted({name for rank in ranks for name in rank.traffic})
    for name in names:
        axis, operation = name.split()
        if part_of(f"{WAIT} {name}") != part:
            continue
        calls = fmean(rank.traffic.get(name, [0, 0])[0] for rank in ranks)
        size = fmean(rank.traffic.get(name, [0, 0])[1] for rank in ranks) / 2**20
        yield f"    {axis} {operation}: {calls:g} calls, {size:.3f} MiB a step and rank"


def draw_step(ranks: Sequence[Sequence[StepSpan]]) -> Drawing:
    """Returns a picture of a step: a row of spans for each rank, one time axis."""
    begin = min(spans[0].begin for spans in ranks)
    span = max(spans[-1].end for spans in ranks) - begin or 1.0
    width, height = LEFT + PLOT + 40, TOP + len(ranks) * (ROW + GAP) + 40
    drawing = Drawing(width, height, [Rect(0, 0, width, height, "#ffffff")], [])
    drawing.words.append(Words(LEFT, 16, "One step, measured", LARGE, bold=True))
    seen = dict.fromkeys(_kind(one.name) for spans in ranks for one in spans)
    x = float(LEFT)
    for kind in (kind for kind in COLOURS if kind in seen):
        drawing.rects.append(Rect(x, 34, 15, 13, COLOURS[kind]))
        drawing.words.append(Words(x + 19, 40.5, kind))
        x += 35 + 6 * len(kind)
    for rank, spans in enumerate(ranks):
        top = TOP + rank * (ROW + GAP)
        drawing.rects.append(Rect(LEFT, top, PLOT, ROW, IDLE))
        drawing.words.append(Words(LEFT - 8, top + ROW / 2, f"rank {rank}", anchor="end"))
        for one in spans:
            at, size = (one.begin - begin) / span * PLOT, (one.end - one.begin) / span * PLOT
            hint = f"{one.name}: {(one.end - one.begin) * 1e3:.3f} ms"
            colour = COLOURS.get(_kind(one.name), IDLE)
            drawing.rects.append(Rect(LEFT + at, top, size, ROW, colour, hint))
    for tick in ticks(span):
        x, bottom = LEFT + tick / span * PLOT, height - 36
        drawing.rects.append(Rect(x - 0.5, bottom, 1, 4, FAINT))
        drawing.words.append(Words(x, bottom + 12, f"{tick:g}", SMALL, FAINT, anchor="middle"))
    drawing.words.append(Words(LEFT + PLOT / 2, height - 8, "time [s]", SMALL, FAINT, "middle"))
    return drawing


def _kind(name: str) -> str:
    part = part_of(name)
    return part.split()[0] if name.startswith(f"{WAIT} ") else name
