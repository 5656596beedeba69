"""Pictures of timelines: boxes stand where and as long as the actions ran, in SVG, PNG and the trace alike."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from megallm.base.errors import CannotWrite, UsageError
from megallm.cli import main as cli
from megallm.parallel import picture
from megallm.parallel.picture import Picture, chrome_trace, lay_out, save_picture, ticks, to_svg
from megallm.parallel.schedule import Action, Placement
from megallm.parallel.simulate import Cost, TimedAction, Timeline, simulate
from tests.parallel.plans import Case, cases, traffic

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def drawn(case: Case, cost: Cost | None = None) -> Picture:
    title = f"{case.kind}: {case.pp} ranks, {case.chunks} chunks, {case.micros} microbatches; bubble 12.3%, idle 45.6%"
    return Picture(simulate(case.plans, case.placement, cost), case.placement, title)


@settings(max_examples=40, deadline=None, database=None)
@given(cases(), st.integers(1, 9), st.integers(1, 9))
def test_boxes_stand_where_the_actions_ran(case, forward, weight):
    shown = drawn(case, Cost(forward, 2.5, weight))
    drawing = lay_out(shown)
    boxes = [rect for rect in drawing.rects if rect.hint]
    slots = [(rank, slot) for rank, row in enumerate(shown.timeline.ranks) for slot in row]
    assert len(boxes) == len(slots)
    left = min(box.x for box in boxes)
    longest = max((slot.end, box.x + box.width) for (_, slot), box in zip(slots, boxes, strict=True))
    scale = (longest[1] + 1 - left) / shown.timeline.makespan  # a pixel is left between boxes
    for (rank, slot), box in zip(slots, boxes, strict=True):
        assert box.x - left == pytest.approx(slot.start * scale)
        assert box.width + 1 == pytest.approx((slot.end - slot.start) * scale) or box.width == 0.4
        assert box.hint.startswith(f"{slot.action}: ")
        assert box.y == picture.TOP + rank * (picture.ROW + picture.GAP)
        chunk = slot.action.stage // case.placement.pp
        assert box.fill == picture.chunk_colour(slot.action.op, chunk, case.placement.chunks)


@settings(max_examples=40, deadline=None, database=None)
@given(cases())
def test_nothing_hangs_over_the_edge(case):
    drawing = lay_out(drawn(case))
    for rect in drawing.rects:
        assert rect.x >= 0 and rect.y >= 0
        assert rect.x + rect.width <= drawing.width + 1e-6 and rect.y + rect.height <= drawing.height + 1e-6
    for words in drawing.words:
        width = 0.6 * words.size * len(words.text)
        left = words.x - {"start": 0, "middle": width / 2, "end": width}[words.anchor]
        assert left >= 0 and left + width <= drawing.width
        assert words.size / 2 <= words.y <= drawing.height - words.size / 2


def test_svg_is_xml_and_complete():
    shown = drawn(Case("zb-v", 2, 2, 4))
    shown = Picture(shown.timeline, shown.placement, 'a < b & "c"')
    tree = ElementTree.fromstring(to_svg(lay_out(shown)))
    texts = [text.text for text in tree.iter(f"{SVG}text")]
    hints = [title.text for title in tree.iter(f"{SVG}title")]
    assert 'a < b & "c"' in texts and {"rank 0", "rank 1", "peak live", "time"} <= set(texts)
    assert {hint.partition(":")[0] for hint in hints} == {
        f"{op}{micro}@{stage}" for op in "FBW" for micro in range(4) for stage in range(4)
    }
    assert hints[0] == "F0@0: 0 to 1"
    assert texts.count("3") >= 12  # microbatch 3 in F, B and W of four stages
    assert len({group.get("fill") for group in tree.iter(f"{SVG}g")}) >= 6 + 3  # two shades of three, and the rest


def test_png_shows_the_same(tmp_path):
    shown = drawn(Case("1f1b", 2, 1, 3))
    save_picture(shown, tmp_path / "a.png")
    drawing, pixels = lay_out(shown), imread(tmp_path / "a.png")
    assert pixels.shape[:2] == (round(2 * drawing.height), round(2 * drawing.width))

    def colour(x: float, y: float) -> str:
        return "#" + "".join(f"{round(255 * part):02x}" for part in pixels[round(2 * y), round(2 * x), :3])

    boxes = [rect for rect in drawing.rects if rect.hint]
    assert len(boxes) == 12
    for rect in boxes:
        assert colour(rect.x + rect.width - 3, rect.y + 3) == rect.fill
    assert colour(drawing.width - 2, 2) == picture.PAPER
    waits = max((rect for rect in boxes if rect.hint.startswith("F1@0")), key=lambda rect: rect.x)
    assert colour(waits.x + waits.width + 5, waits.y + 3) == picture.IDLE


def test_a_measured_timeline_begins_at_nought():
    """Seconds of a clock that began long ago."""
    ranks = [
        [TimedAction(Action("F", 0, 0), 5000.0, 5000.25), TimedAction(Action("B", 0, 0), 5000.5, 5001.0)],
        [
            TimedAction(Action("F", 0, 1), 5000.25, 5000.25),
            TimedAction(Action("B", 0, 1), 5000.25, 5000.5),
        ],  # an empty one too
    ]
    shown = Picture(Timeline(ranks, [1, 1]), Placement(2), "measured", unit="s")
    svg = to_svg(lay_out(shown))
    assert "<title>B0@0: 0.5 to 1 s</title>" in svg and ">time [s]</text>" in svg
    events = {event["name"]: event for event in chrome_trace(shown)["traceEvents"] if event["ph"] == "X"}
    assert events["B0@0"]["ts"] == pytest.approx(500_000) and events["B0@0"]["dur"] == pytest.approx(500_000)


@settings(max_examples=30, deadline=None, database=None)
@given(cases())
def test_trace_has_every_action_and_every_message(case):
    shown = drawn(case)
    trace = json.loads(json.dumps(chrome_trace(shown)))["traceEvents"]
    slots = {str(slot.action): (rank, slot) for rank, row in enumerate(shown.timeline.ranks) for slot in row}
    spans = {event["name"]: event for event in trace if event["ph"] == "X"}
    assert spans.keys() == slots.keys()
    for name, (rank, slot) in slots.items():
        event = spans[name]
        assert (event["tid"], event["ts"], event["dur"]) == (rank, slot.start * 1000, (slot.end - slot.start) * 1000)
        assert event["args"] == {"micro": slot.action.micro, "stage": slot.action.stage}
    made = sum(len(messages) for messages, _ in traffic(case.plans, case.placement).values())
    starts = {event["id"]: event for event in trace if event["ph"] == "s"}
    ends = {event["id"]: event for event in trace if event["ph"] == "f"}
    assert len(starts) == len(ends) == made and starts.keys() == ends.keys()
    assert all(starts[key]["ts"] <= ends[key]["ts"] and starts[key]["tid"] != ends[key]["tid"] for key in starts)


@given(st.floats(1e-6, 1e9))
def test_ticks_are_round_and_few(span):
    marks = ticks(span)
    assert marks[0] == 0 and 5 <= len(marks) <= 14 and marks[-1] <= span * (1 + 1e-9)
    assert re.fullmatch(r"[125](\.0+)?e[-+]\d+", f"{marks[1]:.3e}")


def test_bad_names_and_sizes(tmp_path):
    shown = drawn(Case("1f1b", 2, 1, 2))
    with pytest.raises(UsageError, match=r"ends in .svg or .png; 'a.jpeg' does not"):
        save_picture(shown, tmp_path / "a.jpeg")
    for name in ("missing/a.svg", "missing/a.png"):
        with pytest.raises(CannotWrite, match="folder"):
            save_picture(shown, tmp_path / name)
    many = [TimedAction(Action("F", micro, 0), micro, micro + 1) for micro in range(picture.MAX_BOXES + 1)]
    with pytest.raises(UsageError, match="fewer microbatches"):
        save_picture(Picture(Timeline([many], [0]), Placement(1)), tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []


PAGE = (ROOT / "docs/parallelism.md").read_text()
DOCUMENTED = re.findall(r"^ +megallm (schedule .* --draw (docs/pictures/\S+))$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("command", "path"), DOCUMENTED, ids=[path for _, path in DOCUMENTED])
def test_the_documents_pictures_are_what_their_commands_draw(command, path, tmp_path, monkeypatch, capsys):
    (tmp_path / path).parent.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(command)) == 0
    assert (tmp_path / path).read_bytes() == (ROOT / path).read_bytes()


def test_every_checked_in_picture_has_its_command():
    assert sorted(path for _, path in DOCUMENTED) == sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "docs/pictures").iterdir()
    )


def test_the_documents_table_is_what_the_simulator_says():
    rows = re.findall(r"^\| `([\w-]+)`.* \| ([\d.]+%) \| ([\d.]+%) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 5
    for kind, *figures in rows:
        case = Case(kind, 4, 2 if kind in ("interleaved", "zb-v") else 1, 8)
        timeline = drawn(case).timeline
        live = f"{timeline.peak_live[0] / case.chunks:g}"
        assert figures == [f"{timeline.bubble_fraction:.1%}", f"{timeline.idle_fraction:.1%}", live]


def test_the_document_names_files_that_exist():
    named = set(re.findall(r"`((?:megallm|tests)/[\w/]+\.py)`", PAGE))
    assert len(named) > 15 and all((ROOT / name).is_file() for name in named)
