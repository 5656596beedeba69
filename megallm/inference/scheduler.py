"""Continuous batching: which sequences step together, and which blocks they write. Pure.

Every rank of a replica plans the same steps from the same requests and tokens. A step feeds one
token to each sequence that decodes, and a chunk of its text to each one that is being prefilled
(chunked prefill: Sarathi, arXiv 2308.16369). Sequences leave when they end and others take their
rows. When blocks run out the youngest sequence is preempted: it gives its blocks back, waits, and
is recomputed later; since a draw is a function of request and position, its tokens stay the same.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from megallm.inference.blocks import BlockPool, blocks_of
from megallm.inference.samples import Request


@dataclass(eq=False)
class Sequence:
    """A request with its block table; positions up to `stored` are (or are about to be) cached.

    A sequence that waits for another one's prefill of the same prompt has that one as `leader` and
    no blocks of its own.
    """

    request: Request
    table: list[int] = field(default_factory=list)
    stored: int = 0
    leader: Sequence | None = None

    @property
    def remaining(self) -> int:
        """Tokens that are not cached: 1 when only the newest one is to be fed."""
        return self.request.length - self.stored


@dataclass(frozen=True)
class Pass:
    """One forward pass: positions `begin` to `begin + count` of each of `sequences`, or with
    `begin` None the newest token of each. `outputs` says which sequences take a token from the
    logits of which row.
    """

    sequences: list[Sequence]
    begin: int | None
    count: int
    outputs: list[tuple[int, Sequence]]

    @property
    def tokens(self) -> int:
        return len(self.sequences) * self.count


@dataclass(frozen=True)
class Step:
    """Block copies that come first, then passes in their order."""

    copies: list[tuple[int, int]]
    passes: list[Pass]

    @property
    def outputs(self) -> list[Sequence]:
        """The sequences that get a token, in the order of the logits that they take."""
        return [sequence for one in self.passes for _, sequence in one.outputs]


class Scheduler:
    """Plans the steps of one group of at most `rows` sequences, which share a pool of blocks.

    `waiting` is shared with other groups. A step prefills at most `chunk` tokens. With `keep`
    sequences that have ended are parked with their blocks until these are needed: `resume` lets a
    longer request of the same id go on there.
    """

    def __init__(
        self,
        waiting: deque[Sequence],
        rows: int,
        pool: BlockPool,
        chunk: int = 2048,
        keep: bool = False,
    ) -> None:
        self.waiting, self.rows, self.pool, self.chunk = waiting, rows, pool, chunk
        self.running: list[Sequence] = []  # the oldest first
        self.keep = keep
        self.parked: dict[int, Sequence] = {}  # by the id of the request
        self.returning: deque[Sequence] = deque()  # with blocks, or without where others took them
        self.preempted = self.resumed = 0

    @property
    def busy(self) -> bool:
        """Whether any of its sequences has not ended."""
        running = any(not sequence.request.answer.done for sequence in self.running)
        return running or bool(self.returning)

    def park(self) -> None:
        """Take all sequences that have ended out of their rows."""
        self._retire()

    def resume(self, request: Request) -> bool:
        """Returns whether a parked sequence holds the beginning of this request, which goes on with
        its blocks.
        """
        known = self.parked.get(request.id)
        if known is None or not 0 < known.stored < request.length:
            return False
        if known.request.tokens(0, known.stored) != request.tokens(0, known.stored):
            return False
        del self.parked[request.id]
        self.returning.append(Sequence(request, known.table, known.stored))
        self.resumed += 1
        return True

    def forget(self) -> None:
        """Give back the blocks of parked sequences."""
        while self.parked:
            self._reclaim()

    def _reclaim(self) -> bool:
        """Take the blocks of one sequence that has none to run on now: of a parked one, else of the
        last that returns, which is computed again.
        """
        if self.parked:
            self.pool.release(self.parked.popitem()[1].table)
            return True
        for sequence in reversed(self.returning):
            if sequence.table:
                self.pool.release(sequence.table)
                sequence.stored = 0
                return True
        return False

    def step(self) -> Step:
        """Plan the next step and take what it needs; the tokens of the step before are known."""
        self._retire()
        self._admit()
        copies: list[tuple[int, int]] = []
        decoding: list[Sequence] = []
        prefills: dict[tuple[int, int], list[Sequence]] = {}
        left, place = self.chunk, 0
        while place < len(self.running):
            sequence = self.running[place]
            place += 1
            one = sequence.remaining == 1
            count = 1 if one else min(sequence.remaining, left)
            if sequence.leader is not None or not count:
                continue
            made = self._reserve(sequence, count)
            if made is None:
                break
            copies += made
            if one:
                decoding.append(sequence)
            else:
                prefills.setdefault((sequence.stored, count), []).append(sequence)
                left -= count
            sequence.stored += count
        passes = [Pass(decoding, None, 1, self._outputs(decoding))] if decoding else []
        for (begin, count), sequences in prefills.items():
            passes.append(Pass(sequences, begin, count, self._outputs(sequences)))
        return Step(copies, passes)

    def _reserve(self, sequence: Sequence, count: int) -> list[tuple[int, int]] | None:
        """Blocks for the next `count` positions, preempting the youngest until there are enough.

        Returns the copies to make; None when the sequence itself had to go.
        """
        while True:
            end = sequence.stored + count
            copies = self.pool.extend(sequence.table, sequence.stored, end)
            if copies is not None:
                return copies
            if self._reclaim():
                continue
            victim = self.running.pop()
            self.pool.release(victim.table)
            victim.stored, victim.leader = 0, None
            self.waiting.appendleft(victim)
            self.preempted += 1
            if victim is sequence:
                return None

    def _outputs(self, sequences: list[Sequence]) -> list[tuple[int, Sequence]]:
        """Who takes a token from a row: its sequence when its text is complete, and those that
        waited for it, which now share its blocks.
        """
        outputs = []
        followers = [each for each in self.running if each.leader is not None]
        for row, sequence in enumerate(sequences):
            if sequence.remaining:
                continue
            outputs.append((row, sequence))
            for follower in followers:
                if follower.leader is sequence:
                    follower.leader, follower.stored = None, sequence.stored
                    follower.table = self.pool.share(sequence.table)
                    outputs.append((row, follower))
        return outputs

    def _retire(self) -> None:
        """Let go of sequences that have ended."""
        for sequence in self.running:
            if sequence.request.answer.done and self.keep and sequence.table:
                self.parked[sequence.request.id] = sequence
            elif sequence.request.answer.done:
                self.pool.release(sequence.table)
        self.running = [each for each in self.running if not each.request.answer.done]

    def _admit(self) -> None:
        """Give free rows to waiting sequences while blocks for their text are free.

        The prompt of a running sequence is not computed again: it is shared, all but its last token
        (whose logits are needed), or waited for.
        """
        spare = len(self.pool.free) - len(self.running)
        while (self.returning or self.waiting) and len(self.running) < self.rows:
            queue = self.returning or self.waiting
            sequence = queue.popleft()
            source = None if sequence.table else self._same_prompt(sequence.request)
            need = blocks_of(sequence.request.length) + 1 - len(sequence.table)
            need = 1 if source is not None else need
            while need > spare and self._reclaim():
                spare = len(self.pool.free) - len(self.running)
            if self.running and need > spare:
                queue.appendleft(sequence)
                return
            spare -= need
            self.running.append(sequence)
            if source is None:
                continue
            size = sequence.request.prefill
            if source.stored >= size:
                sequence.stored = min(size, sequence.request.length - 1)
                sequence.table = self.pool.share(source.table[: blocks_of(sequence.stored)])
            elif sequence.request.length == size:
                sequence.leader = source

    def _same_prompt(self, request: Request) -> Sequence | None:
        """A running sequence with the same prompt that has cached it or is about to.

        One whose answer has begun to be recomputed leads nobody: its last logits are not those of
        the prompt.
        """
        for each in self.running:
            if each.leader is None and each.request.prompt == request.prompt:
                size = request.prefill
                if each.stored >= size or (each.request.length == size == request.length > 1):
                    return each
        return None
