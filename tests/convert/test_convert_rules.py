"""Rules are reversible, for random shapes, splits, stacks and transposes; and tables with holes are refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.base.errors import InternalError
from megallm.convert.families import FAMILIES
from megallm.convert.rules import Counts, plan_bridge, rule
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
    bridge = plan_bridge(rules, shapes, Counts(1))
    for links in bridge.by_ours.values():
        for link in links:
            part = inner(data.draw, link.theirs_box)
            ours, slices = link.part_in(part)
            assert slices == tuple(slice(0, n, 1) for n in part.shape)
            assert link.to_theirs(ours) == part
            assert ours.size == part.size and ours.intersect(link.ours_box) == ours
            assert link.part_in(link.theirs_box)[0] == link.ours_box


HEADS, PLAIN, ROTATED, VALUE, WIDTH, EXPERTS = 3, 2, 4, 5, 3, 2
REORDERED = [
    rule("q", "q", by_head=True, pairs=True),
    rule("kv_b", "k_up", "v_up", by_head=True),
    rule("kv_a", "kv_down", "k_rope", pairs=True),
    rule("gate_up[{x}]", "experts[{x},0]", "experts[{x},1]"),
]
SHAPES = {
    "q": (HEADS * (PLAIN + ROTATED), WIDTH),
    "k_up": (HEADS * PLAIN, WIDTH),
    "v_up": (HEADS * VALUE, WIDTH),
    "kv_down": (7, WIDTH),
    "k_rope": (ROTATED, WIDTH),
    "experts": (EXPERTS, 2, 4, WIDTH),
}


def their_tensors(ours: dict) -> dict:
    """What the rules above mean, said with whole tensors."""
    import torch

    def neighbours(x):
        return x.unflatten(-2, (2, -1)).transpose(-2, -3).flatten(-3, -2)

    q = ours["q"].unflatten(0, (HEADS, -1))
    q = torch.cat((q[:, :PLAIN], neighbours(q[:, PLAIN:])), 1).flatten(0, 1)
    kv = torch.cat([ours[name].unflatten(0, (HEADS, -1)) for name in ("k_up", "v_up")], 1).flatten(0, 1)
    kv_a = torch.cat((ours["kv_down"], neighbours(ours["k_rope"])))
    return {"q": q, "kv_b": kv, "kv_a": kv_a, "gate_up": ours["experts"].flatten(1, 2)}


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_reordered_rows_and_stacks_of_theirs(data):
    """Any box of theirs is filled, and any box of ours finds its rows, as whole tensors say."""
    import torch

    from megallm.convert.weights import fill_theirs

    bridge = plan_bridge(REORDERED, SHAPES, Counts(1, experts=EXPERTS, heads=HEADS, rotated=ROTATED))
    ours = {name: torch.arange(torch.Size(full).numel()).view(full) for name, full in SHAPES.items()}
    wanted = their_tensors(ours)
    assert {name: tuple(x.shape) for name, x in wanted.items()} == dict(bridge.theirs)

    class Memory:
        def read_into(self, name, offset, tensor):
            tensor.copy_(ours[name][Box(tuple(offset), tuple(tensor.shape)).slices()])

    name = data.draw(st.sampled_from(sorted(wanted)))
    full = bridge.theirs[name]
    box = inner(data.draw, Box((0,) * len(full), full))
    found = torch.full(box.shape, -1)
    fill_theirs(bridge, Memory(), name, box, found)
    assert torch.equal(found, wanted[name][box.slices()])
    for link in bridge.by_ours[data.draw(st.sampled_from(sorted(SHAPES)))]:
        mine = inner(data.draw, link.ours_box)
        there = link.to_theirs(mine)
        rows = [slice(o, o + n) for o, n in zip(there.offset, there.shape, strict=True)]
        first = link.their_stack_dims
        rows[first] = slice(
            there.offset[first], there.offset[first] + (there.shape[first] - 1) * link.step + 1, link.step
        )
        assert torch.equal(wanted[link.theirs][tuple(rows)].flatten(), ours[link.ours][mine.slices()].flatten())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"heads": 5}, "no equal share for 5 heads"),
        ({"experts": 1}, "do not hold experts"),
        ({"rotated": 6}, None),
    ],
)
def test_wrong_counts_are_found_or_move_rows(change, sentence):
    counts = {"experts": EXPERTS, "heads": HEADS, "rotated": ROTATED} | change
    shapes = SHAPES | {"k_rope": (counts["rotated"], WIDTH)}
    if sentence is not None:
        with pytest.raises(InternalError, match=sentence):
            plan_bridge(REORDERED, shapes, Counts(1, **counts))
        return
    steps = {(link.theirs_box.offset[0], link.step) for link in
             plan_bridge(REORDERED, shapes, Counts(1, **counts)).by_theirs["q"]}  # fmt: skip
    assert (0, 2) in steps  # six rotated rows leave none that are plain


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_numbers_survive_the_round_trip(data):
    """Ours -> theirs -> ours with real numbers, whole tensors one way and random boxes the other."""
    import torch

    from megallm.convert.weights import fill_theirs

    rules, shapes = data.draw(tables())
    bridge = plan_bridge(rules, shapes, Counts(1))
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
        plan_bridge(rules, {"a": (2, 3, 4)}, Counts(1))


def test_layers_are_spelled_out_and_absent_biases_left_out():
    shapes = {f"layers.{n}.attention.q.weight": (4, 4) for n in range(12)}
    rules = [each for each in FAMILIES["llama"].rules if "q_proj" in each.theirs]
    bridge = plan_bridge(rules, shapes, Counts(12))
    assert list(bridge.theirs) == [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(12)]
