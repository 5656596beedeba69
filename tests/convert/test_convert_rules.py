"""Rules are reversible, for random shapes, splits, stacks and transposes; and tables with holes are refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.base.errors import InternalError
from megallm.convert.families import FAMILIES
from megallm.convert.rules import plan_bridge, rule
from megallm.parallel.shard import Box


@st.composite
def tables(draw):
    """Random rules over random logical tensors, each matrix used exactly once, in random groups."""
    width = draw(st.integers(1, 5))
    shapes, pieces = {}, []
    for number in range(draw(st.integers(1, 4))):
        name, rows, stack = f"t{number}.weight", draw(st.integers(1, 6)), draw(st.integers(0, 3))
        shapes[name] = (*([stack] if stack else []), rows, width)
        pieces += [f"{name}[{i}]" for i in range(stack)] or [name]
    pieces = draw(st.permutations(pieces))
    rules = []
    while pieces:
        count = draw(st.integers(1, len(pieces)))
        rules.append(rule(f"x{len(rules)}", *pieces[:count], transpose=draw(st.booleans())))
        pieces = pieces[count:]
    return rules, shapes


def inner(draw, box: Box) -> Box:
    begin = [draw(st.integers(0, n - 1)) for n in box.shape]
    shape = [draw(st.integers(1, n - b)) for n, b in zip(box.shape, begin, strict=True)]
    return Box(tuple(o + b for o, b in zip(box.offset, begin, strict=True)), tuple(shape))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_links_go_both_ways(data):
    rules, shapes = data.draw(tables())
    bridge = plan_bridge(rules, shapes, num_layers=1)
    for links in bridge.by_ours.values():
        for link in links:
            part = inner(data.draw, link.theirs_box)
            ours = link.to_ours(part)
            assert link.to_theirs(ours) == part
            assert link.to_ours(link.to_theirs(ours)) == ours
            assert ours.size == part.size and ours.intersect(link.ours_box) == ours
            assert link.to_ours(link.theirs_box) == link.ours_box


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_numbers_survive_the_round_trip(data):
    """Ours -> theirs -> ours with real numbers, whole tensors one way and random boxes the other."""
    import torch

    from megallm.convert.weights import fill_theirs

    rules, shapes = data.draw(tables())
    bridge = plan_bridge(rules, shapes, num_layers=1)
    count = iter(range(10_000))
    ours = {n: torch.tensor([next(count) for _ in range(torch.Size(s).numel())]).view(s) for n, s in shapes.items()}

    class Memory:
        def read_into(self, name, offset, tensor):
            tensor.copy_(ours[name][Box(tuple(offset), tuple(tensor.shape)).slices()])

    theirs = {name: torch.full(full, -1) for name, full in bridge.theirs.items()}
    for name, full in bridge.theirs.items():
        fill_theirs(bridge, Memory(), name, Box((0,) * len(full), full), theirs[name])
    assert sorted(torch.cat([t.flatten() for t in theirs.values()]).tolist()) == list(range(next(count)))
    for name, links in bridge.by_ours.items():
        back = torch.full(shapes[name], -1)
        for link in links:
            block = theirs[link.theirs][link.theirs_box.slices()]
            back[link.ours_box.slices()] = (block.T if link.transpose else block).view(link.ours_box.shape)
        assert torch.equal(back, ours[name])


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ([rule("x", "a[0]")], "do not hold a of shape"),
        ([rule("x", "a[0]"), rule("y", "a[0]"), rule("z", "a[1]")], "do not hold a of shape .* exactly once"),
        ([rule("x", "a[0]"), rule("x", "a[1]")], "Two rules make x"),
        ([rule("x", "a[0]", "b")], "some are lacking"),
    ],
)
def test_tables_with_holes_are_refused(rules, sentence):
    with pytest.raises(InternalError, match=sentence):
        plan_bridge(rules, {"a": (2, 3, 4)}, num_layers=1)


def test_layers_are_spelled_out_and_absent_biases_left_out():
    shapes = {f"layers.{n}.attention.q.weight": (4, 4) for n in range(12)}
    rules = [each for each in FAMILIES["llama"].rules if "q_proj" in each.theirs]
    bridge = plan_bridge(rules, shapes, num_layers=12)
    assert list(bridge.theirs) == [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(12)]
