"""The measuring of bench/: the order of rounds, the interval, and systems that die or hang."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from ratio import Ratio, SystemFailed, Workers, abba, machine, paired_ratio, peak_bytes, resident_bytes


def test_a_round_is_a_b_b_a_and_cancels_drift():
    calls, clock = [], iter(range(1, 100))  # every call is a second slower than the one before

    def system(name: str):
        def run() -> float:
            calls.append(name)
            return float(next(clock))

        return run

    assert abba(system("a"), system("b"), rounds=3) == [1.0, 1.0, 1.0]
    assert "".join(calls) == "abba" * 3


def test_the_interval_covers_the_truth_and_narrows():
    draw, covered, widths = random.Random(5), 0, []
    for _ in range(100):
        rounds = [1.3 * draw.lognormvariate(0, 0.1) for _ in range(15)]
        found = paired_ratio(rounds, samples=400)
        assert found.low <= found.median <= found.high
        covered += found.low <= 1.3 <= found.high
        widths.append(found.high - found.low)
    assert 85 <= covered <= 100
    many = paired_ratio([1.3 * draw.lognormvariate(0, 0.1) for _ in range(400)], samples=400)
    assert many.high - many.low < sum(widths) / len(widths) / 2
    assert str(Ratio(1.234, 1.1, 1.3, 15)) == "1.23x [1.10, 1.30]"


def program(tmp_path, body: str) -> list[str]:
    path = tmp_path / "system.py"
    path.write_text(f"import json, sys, time\nrank = int(sys.argv[sys.argv.index('--rank') + 1])\n{body}")
    return [str(path)]


def test_workers_answer_by_rank(tmp_path):
    body = "for line in sys.stdin:\n    print(json.dumps({'rank': rank, **json.loads(line)}), flush=True)\n"
    with Workers(program(tmp_path, body), [0, 0], tmp_path, {}) as workers:
        assert workers.ask(steps=3) == [{"rank": 0, "steps": 3}, {"rank": 1, "steps": 3}]
        assert workers.ask(steps=4)[1] == {"rank": 1, "steps": 4}
    assert all(process.returncode is not None for process in workers.processes)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("if rank: raise ValueError('out of luck')\ntime.sleep(60)", "ValueError: out of luck"),
        ("time.sleep(60)", "no answer in 1 s"),
    ],
)
def test_a_system_that_dies_or_hangs_is_noticed_at_once(body, says, tmp_path):
    with Workers(program(tmp_path, body), [0, 0], tmp_path, {}, timeout=1.0) as workers:
        workers.timeout = 1.0 if "no answer" in says else 30.0
        with pytest.raises(SystemFailed, match=says):
            workers.ask(steps=1)


def test_what_a_figure_says_of_its_origin():
    assert {"cpu", "cores", "date", "load"} <= machine().keys()
    assert peak_bytes() >= resident_bytes() * 0.5 > 1e6
