"""Which layers a pipeline stage holds: every layer once, balanced by work, or as the user wrote it down."""

from __future__ import annotations

import re
import time
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.base.errors import UsageError
from megallm.models.config import ModelConfig
from megallm.models.stages import MAX_EXPANDED, head_work, parse_stages, plan_stages

COUNTS = st.lists(st.integers(0, 12), min_size=1, max_size=9)


@given(st.integers(1, 100), st.data(), st.floats(0, 20))
def test_every_layer_once_in_order(num_layers, data, loss_work):
    num_stages = data.draw(st.integers(1, num_layers))
    spans = plan_stages(num_layers, num_stages, loss_work=loss_work)
    assert [layer for span in spans for layer in range(span.begin, span.end)] == list(range(num_layers))
    assert all(span.end > span.begin for span in spans)
    assert [span.first for span in spans] == [True] + [False] * (num_stages - 1)
    assert [span.last for span in spans] == [False] * (num_stages - 1) + [True]


@given(st.integers(1, 100), st.data())
def test_balanced_within_one_layer(num_layers, data):
    num_stages = data.draw(st.integers(1, num_layers))
    counts = [span.end - span.begin for span in plan_stages(num_layers, num_stages)]
    assert max(counts) - min(counts) <= 1


@settings(max_examples=60)
@given(st.integers(1, 11), st.data(), st.sampled_from([0.0, 0.3, 1.0, 1.5, 2.7, 6.0, 40.0]))
def test_no_other_split_has_a_smaller_largest_work(num_layers, data, loss_work):
    """Against all ways to cut the layers."""
    num_stages = data.draw(st.integers(1, min(num_layers, 5)))
    counts = [span.end - span.begin for span in plan_stages(num_layers, num_stages, loss_work=loss_work)]
    best = min(
        max(max(b - a for a, b in zip(cut, cut[1:], strict=False)), cut[-1] - cut[-2] + loss_work)
        for inner in combinations(range(1, num_layers), num_stages - 1)
        for cut in [(0, *inner, num_layers)]
    )
    assert max(*counts, counts[-1] + loss_work) == best
    assert max(counts[:-1], default=0) - min(counts[:-1], default=0) <= 1


def test_the_loss_counts_as_work():
    assert [span.end for span in plan_stages(12, 4)] == [3, 6, 9, 12]
    assert [span.end for span in plan_stages(12, 4, loss_work=2.0)] == [4, 7, 10, 12]
    shape = {"family": "llama", "num_layers": 4, "hidden_size": 64, "num_heads": 4, "ffn_hidden_size": 128}
    small, large = (head_work(ModelConfig(vocab_size=size, **shape).resolve()) for size in (1_000, 100_000))
    # a layer: 4 x 64 x 64 of attention (query, key, value, output) and 3 x 64 x 128 of SwiGLU
    assert small == pytest.approx(64 * 1_000 / (4 * 64 * 64 + 3 * 64 * 128))
    assert large == pytest.approx(100 * small)


def test_more_stages_than_layers_are_refused_unless_written_down():
    with pytest.raises(UsageError, match="5 pipeline stages need at least 5 layers; the model has 3"):
        plan_stages(3, 5)
    assert [span.end - span.begin for span in plan_stages(3, 5, "E|t|tt||L")] == [0, 1, 2, 0, 0]


@given(COUNTS)
def test_a_layout_string_comes_back(counts):
    """Three spellings of the same stages."""
    plain = "E" + "|".join("t" * count for count in counts) + "L"
    starred = "E" + " | ".join(f"t*{count}" if count else "" for count in counts) + "L"
    grouped = "E" + "|".join(f"((t)*{count})" if count else "" for count in counts) + "L"
    for text in (plain, starred, grouped):
        assert parse_stages(text, sum(counts), len(counts)) == counts
        spans = plan_stages(sum(counts), len(counts), text)
        assert [span.end - span.begin for span in spans] == counts


def test_groups_repeat():
    assert parse_stages("Et*3|(t*4|)*2t*3L", 14, 4) == [3, 4, 4, 3]
    assert parse_stages("Et((|t)*2|t*2)*2L", 9, 7) == [1, 1, 1, 2, 1, 1, 2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has 1 stages"),
        ("|", "begin with E"),
        ("t*4|t*4L", "begin with E"),
        ("Et*4|t*4", "end with L"),
        ("Et*4|Et*4L", "begin with E"),
        ("Et*4L|t*4", "end with L"),
        ("Et*8L", "has 1 stages, the layout needs pp x chunks = 2"),
        ("Et*4|t*5L", "has 9 layers t, the model has 8"),
        ("Et*0|t*8L", "between 1 and 9999"),
        ("Et*99999999999999999999|tL", "between 1 and 9999"),
        ("Et*4|x*4L", "'x\\*4L' is not understood"),
        ("Et**4|t*4L", "not understood"),
        ("E(t*4|t*4L", "not understood"),
        ("Et*4)|t*4L", "not understood"),
        ("Et*-4|t*4L", "not understood"),
        ("Et*4|t*4L\n; rm", "not understood"),
    ],
)
def test_nonsense_is_refused(text, says):
    with pytest.raises(UsageError, match=says) as caught:
        parse_stages(text, 8, 2)
    suggested = re.search(r"An even one is '(.*)'", str(caught.value))
    if suggested:
        assert parse_stages(suggested[1], 8, 2) == [4, 4]


@given(st.integers(1, 30), st.integers(1, 30))
def test_the_suggestion_fits(num_layers, num_stages):
    with pytest.raises(UsageError) as caught:
        parse_stages("L", num_layers, num_stages)
    suggested = re.search(r"An even one is '(.*)'", str(caught.value))[1]
    assert sum(parse_stages(suggested, num_layers, num_stages)) == num_layers


@pytest.mark.parametrize(
    "text",
    [
        "E(((((t*9999)*9999)*9999)*9999)*9999)L",
        "E(" + "t" * 4000 + ")*9999L",
        "E" + "t*9999" * 600 + "L",
        "E" + "(t*9999)" * 400 + "L",
        "(" * 2000 + "t" + ")" * 2000,
        "(" * 500_000 + "t" + ")" * 500_000,
        "E" + "t" * 2_000_000 + "L",
    ],
)
def test_bombs_are_refused_at_once(text):
    begin = time.process_time()
    with pytest.raises(UsageError) as caught:
        parse_stages(text, 8, 2)
    assert time.process_time() - begin < 1.0
    assert len(str(caught.value)) < 10_000 and MAX_EXPANDED <= 100_000
