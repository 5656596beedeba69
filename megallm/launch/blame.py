"""Which rank the others wait for: pure functions of the ranks' heartbeats and process states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megallm.launch.board import Issued, KnownGroup, RankState

STOPPED = ("T", "t")  # of /proc/PID/stat: by a signal, by a debugger
ONE_SIDED = ("send", "recv")  # both ends count one message, each under its own name


@dataclass(frozen=True)
class Finding:
    """Why ranks wait: the one to blame (None: nobody can be named), and the reasons in words."""

    kind: str  # stopped | outside | mismatch | unknown
    rank: int | None
    sentence: str
    waits: tuple[str, ...] = ()  # a line for each rank
    table: tuple[str, ...] = ()  # who issued what, where they do not agree


def find_culprit(states: Sequence[RankState], process_states: Mapping[int, str]) -> Finding:
    """Returns whom to blame for a hang.

    A rank that is stopped comes first; then collectives that do not match; then the rank that
    others wait for, directly or through ranks that wait themselves, and that waits for nobody; of
    several the one that was silent first.
    """
    waits = tuple(describe_wait(state, states) for state in states)
    stopped = [state for state in states if process_states.get(state.rank, "") in STOPPED]
    if stopped:
        first = min(stopped, key=lambda state: state.beat_at)
        more = f" (so {_are(stopped[1:])} stopped)" if len(stopped) > 1 else ""
        sentence = f"rank {first.rank} (process {first.pid}) is stopped {first.place}{more}"
        return Finding("stopped", first.rank, sentence, waits)
    differing = find_mismatch(states)
    if differing is not None:
        return Finding("mismatch", differing.rank, differing.sentence, waits, differing.table)
    outside = [state for state in states if state.waits is None]
    reached = _reached(states)
    candidates = [state for state in outside if reached.get(state.rank)] or outside
    if not candidates:
        return Finding("unknown", *_all_wait(states), waits)
    first = min(candidates, key=lambda state: state.beat_at)
    number = len(states) - len(outside)
    sentence = (
        f"rank {first.rank} (process {first.pid}) has not moved {first.place}, outside of any "
        f"collective, and {number} of {len(states)} ranks wait in one"
    )
    return Finding("outside", first.rank, sentence, waits)


def describe_wait(state: RankState, states: Sequence[RankState]) -> str:
    """Returns `rank 0 waits in all_reduce of 64 bytes, number 7 of dp [0-1], for rank 1`."""
    if state.waits is None or state.group is None:
        return f"rank {state.rank} waits for nobody, {state.place}"
    late = missing_ranks(state, states)
    whom = f", for {_are(late, verb=False)}" if late else ""
    return (
        f"rank {state.rank} waits in {state.waits.text}, number {state.waits.number} of "
        f"{state.group.text}, {state.place}{whom}"
    )


def missing_ranks(state: RankState, states: Sequence[RankState]) -> list[RankState]:
    """Returns the ranks that have not issued the collective that `state` waits in."""
    group, waits = state.group, state.waits
    if group is None or waits is None:
        return []
    return [
        other
        for other in states
        if other.rank in group.ranks
        and other.rank != state.rank
        and (group.key not in other.groups or other.groups[group.key].count < waits.number)
    ]


def _reached(states: Sequence[RankState]) -> Counter[int]:
    """How many ranks wait for each rank, through others or directly."""
    edges = {state.rank: [one.rank for one in missing_ranks(state, states)] for state in states}
    found: Counter[int] = Counter()
    for begin in edges:
        seen, queue = {begin}, [begin]
        while queue:
            for rank in edges[queue.pop()]:
                if rank not in seen:
                    seen.add(rank)
                    queue.append(rank)
        found.update(seen - {begin})
    return found


def _all_wait(states: Sequence[RankState]) -> tuple[int | None, str]:
    """Whom to name when every rank is inside a collective: the one that most wait for directly."""
    late = Counter(one.rank for state in states for one in missing_ranks(state, states))
    most = late.most_common(2)
    if most and (len(most) == 1 or most[0][1] > most[1][1]):
        rank = most[0][0]
        return rank, f"every rank waits in a collective, and {most[0][1]} of them for rank {rank}"
    return None, "every rank waits in a collective: a link between them may be cut"


@dataclass(frozen=True)
class _Difference:
    rank: int | None
    sentence: str
    table: tuple[str, ...]


def find_mismatch(states: Sequence[RankState]) -> _Difference | None:
    """Returns the first collective of a group that its ranks did not issue alike; None without."""
    keys = {key: group for state in states for key, group in state.groups.items()}
    found = []
    for group in keys.values():
        different = _first_difference(group, states)
        if different is not None:
            found.append(different)
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _first_difference(
    group: KnownGroup, states: Sequence[RankState]
) -> tuple[float, _Difference] | None:
    members = [state for state in states if group.key in state.groups]
    issued = {state.rank: state.groups[group.key].issued for state in members}
    numbers = sorted({number for each in issued.values() for number in each})
    for number in numbers:
        here = {rank: each[number] for rank, each in issued.items() if number in each}
        texts = {rank: _comparable(one) for rank, one in here.items()}
        kinds = Counter(texts.values())
        if len(kinds) > 1:
            at = min(one.at for one in here.values())
            return at, _difference(group, number, here, kinds)
    return None


def _comparable(one: Issued) -> tuple[str, int]:
    operation = "message" if one.operation in ONE_SIDED else one.operation
    return operation, one.nbytes


def _difference(
    group: KnownGroup, number: int, here: Mapping[int, Issued], kinds: Counter[tuple[str, int]]
) -> _Difference:
    usual, most = kinds.most_common(1)[0]
    odd = [rank for rank, one in here.items() if _comparable(one) != usual]
    culprit = odd[0] if len(odd) == 1 and most > 1 else None
    table = tuple(
        f"{group.text} number {number}: rank {rank} issued {one.text}"
        for rank, one in sorted(here.items())
    )
    rest = next(one for one in here.values() if _comparable(one) == usual)
    sentence = (
        f"collective {number} of {group.text} does not match: "
        + ", ".join(f"rank {rank} issued {here[rank].text}" for rank in odd)
        + f" while the others issued {rest.text}"
    )
    return _Difference(culprit, sentence, table)


def _are(states: Sequence[RankState], verb: bool = True) -> str:
    """Returns `rank 1`, `ranks 1 and 2`, with `is` or `are`."""
    names = " and ".join(str(state.rank) for state in states)
    word = "rank" if len(states) == 1 else "ranks"
    return f"{word} {names}" + (" is" if len(states) == 1 else " are") * verb
