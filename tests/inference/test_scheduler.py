"""The pure half of generation: the rotation of groups never deadlocks, blocks are never mixed up, none is lost."""

from __future__ import annotations

from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallm.inference.blocks import BLOCK, BlockPool, blocks_of
from megallm.inference.rotation import RUN, SEND, Operation, Rotation
from megallm.inference.samples import Request
from megallm.inference.scheduler import Scheduler, Sequence
from megallm.parallel.schedule import Placement

PLACEMENTS = [
    *(Placement(pp, chunks) for pp in (1, 2, 3, 4, 5) for chunks in (1, 2, 3)),
    *(Placement(pp, 2, vee=True) for pp in (1, 2, 3, 4, 5)),
]  # fmt: skip


def blocked(lists: list[list[Operation]]) -> list[Operation]:
    """Play the operations of all ranks where nothing ends before every participant has come to it: a send waits
    for its receive. Returns what the ranks wait for in the end, [] when all is done.
    """
    places = [0] * len(lists)
    while True:
        heads = [mine[place] if place < len(mine) else None for mine, place in zip(lists, places, strict=True)]
        ready = [one for one in heads if one is not None and all(heads[rank] == one for rank in one.ranks)]
        if not ready:
            return [one for one in heads if one is not None]
        for rank in ready[0].ranks:
            places[rank] += 1


def of_ranks(operations: list[Operation], pp: int) -> list[list[Operation]]:
    return [[one for one in operations if rank in one.ranks] for rank in range(pp)]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_no_placement_deadlocks_where_sends_wait(placement):
    rotation = Rotation(placement)
    ticks = [list(rotation.operations(tick)) for tick in range(6 * placement.num_stages)]
    assert blocked(of_ranks([one for tick in ticks for one in tick], placement.pp)) == []
    runs: dict[int, list[int]] = {group: [] for group in range(rotation.num_groups)}
    for number, tick in enumerate(ticks):
        busy = Counter(one.ranks[0] for one in tick if one.kind == RUN)
        assert max(busy.values()) == 1, "a rank has two groups in one tick"
        if number >= rotation.distance * placement.pp:
            assert len(busy) == placement.pp, "in the steady state no rank is idle"
        for one in tick:
            if one.kind == RUN:
                runs[one.group].append(one.stage)
    for stages in runs.values():
        assert stages == [n % placement.num_stages for n in range(len(stages))]


def test_the_simulation_finds_deadlocks():
    """The control: each rank of a ring sends before it receives, as the former generator's ranks did."""
    placement = Placement(3, 2)
    tick = list(Rotation(placement).operations(8))
    lists = of_ranks(tick, 3)
    assert blocked(lists) == []
    for rank, mine in enumerate(lists):
        mine.sort(key=lambda one: (one.kind == SEND, one.kind == SEND and one.ranks[0] != rank))
    assert {one.kind for one in blocked(lists)} == {SEND}


class Device:
    """Stands for the tensors: what every block holds, and what each sequence sees when a token is drawn."""

    def __init__(self, pool: BlockPool) -> None:
        self.cells: list[list[int | None]] = [[None] * BLOCK for _ in range(pool.count)]

    def run(self, step) -> None:
        copied = [(target, list(self.cells[source])) for source, target in step.copies]
        for target, cells in copied:
            self.cells[target] = cells
        for one in step.passes:
            for sequence in one.sequences:
                begin = sequence.stored - one.count
                for at, token in enumerate(sequence.request.tokens(begin, sequence.stored), begin):
                    self.cells[sequence.table[at // BLOCK]][at % BLOCK] = token
            for _, sequence in one.outputs:
                request = sequence.request
                seen = [self.cells[sequence.table[at // BLOCK]][at % BLOCK] for at in range(request.length)]
                assert seen == request.prompt + request.answer.tokens


def play(requests: list[Request], rows: int, blocks: int, chunk: int) -> tuple[Scheduler, int]:
    """Let a scheduler serve requests to the end; each token is a function of request and position."""
    pool = BlockPool(blocks)
    scheduler = Scheduler(deque(Sequence(request) for request in requests), rows, pool, chunk)
    device, prefilled = Device(pool), 0
    for _ in range(1000):
        step = scheduler.step()
        prefilled += sum(one.count * len(one.sequences) for one in step.passes if one.begin is not None)
        assert sum(one.count * len(one.sequences) for one in step.passes if one.begin is not None) <= chunk
        device.run(step)
        for sequence in step.outputs:
            request = sequence.request
            request.answer.push(1000 * request.id + request.length, 0.0)
        if not scheduler.waiting and not scheduler.busy:
            break
    scheduler.step()
    assert len(pool.free) == blocks and not any(pool.holders), "every block comes back"
    for request in requests:
        begin = len(request.prompt)
        places = range(begin, begin + len(request.answer.tokens))
        assert request.answer.tokens == [1000 * request.id + place for place in places]
        assert request.answer.done
    return scheduler, prefilled


groups = st.lists(st.tuples(st.integers(1, 36), st.integers(1, 4), st.integers(1, 20)), min_size=1, max_size=4)


def made(of_groups: list[tuple[int, int, int]]) -> list[Request]:
    """`(length of the prompt, samples, new tokens of the first)`."""
    found = []
    for number, (size, count, limit) in enumerate(of_groups):
        prompt = [number * 100 + n for n in range(size)]
        found += [Request.of(len(found) + n, prompt, limit + n) for n in range(count)]
    return found


@settings(deadline=None, max_examples=80)
@given(groups, st.integers(1, 6), st.integers(0, 12), st.integers(1, 50))
def test_every_token_sees_its_own_text(of_groups, rows, spare, chunk):
    """Whatever leaves, joins, is shared, copied or preempted; a pool of hardly one sequence is enough."""
    requests = made(of_groups)
    play(requests, rows, max(blocks_of(request.most) for request in requests) + spare, chunk)


def test_a_group_is_prefilled_once():
    _, prefilled = play(made([(37, 8, 20)]), 8, 100, 64)
    assert prefilled == 37
    _, prefilled = play(made([(37, 8, 20)]), 3, 100, 64)
    assert prefilled == 37, "those that join later share the prompt, too"


def test_blocks_bound_the_memory_and_preemption_happens():
    scheduler, _ = play(made([(30, 4, 60)]), 4, 9, 64)
    assert scheduler.preempted > 0
    scheduler, _ = play(made([(30, 4, 60)]), 4, 40, 64)
    assert scheduler.preempted == 0


def test_a_block_that_is_shared_when_written_is_noticed(monkeypatch):
    """The control: without copy on write siblings write into one another's text."""
    real = BlockPool.extend

    def extend(self, table, begin, end):
        return real(self, table, len(table) * BLOCK if len(table) * BLOCK >= begin else begin, end)

    monkeypatch.setattr(BlockPool, "extend", extend)
    with pytest.raises(AssertionError):
        play(made([(5, 3, 9)]), 3, 20, 64)


def test_a_wrong_block_copied_is_noticed(monkeypatch):
    monkeypatch.setattr(Device, "run", _copying_backwards(Device.run))
    with pytest.raises(AssertionError):
        play(made([(5, 3, 9)]), 3, 20, 64)


def _copying_backwards(run):
    def backwards(self, step):
        step.copies[:] = [(target, source) for source, target in step.copies]
        run(self, step)

    return backwards
