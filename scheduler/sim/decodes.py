"""The sequences that decode, advanced together without touching them.

All gain one token a step. So one clock counts their steps; a sequence remembers where the
clock stood when it joined, its end is a moment on that clock, and the step in which it
needs its next KV block depends only on the clock modulo the block size.
"""

from heapq import heappop, heappush

from scheduler.sim.sequence import Sequence, Status


class Decodes:
    """Who decodes, who ends when, and what the next steps need."""

    __slots__ = ("_base", "_clock", "_ends", "_needs", "members")

    def __init__(self, block_size: int) -> None:
        self.members: dict[str, Sequence] = {}
        "By id, in the order they joined."
        self._clock = 0
        self._ends: list[tuple[int, int, Sequence]] = []
        self._needs = [0] * block_size
        # Sum over members of (computed - clock) at joining.
        self._base = 0

    def __len__(self) -> int:
        return len(self.members)

    @property
    def context(self) -> int:
        """KV tokens read in the next step, the new ones included."""
        return self._base + len(self.members) * (self._clock + 1)

    @property
    def next_end(self) -> int:
        """Steps until the first member ends; there must be one."""
        ends = self._ends
        while not self._is_current(ends[0]):  # preempted and aborted ones leave their end behind
            heappop(ends)
        return ends[0][0] - self._clock

    def gained(self, sequence: Sequence) -> int:
        """Tokens it gained since it joined; 0 for one that does not decode."""
        return self._clock - sequence.joined_step if sequence.status is Status.DECODE else 0

    def blocks(self, n_steps: int) -> int:
        """New blocks that the coming steps need."""
        size = len(self._needs)
        whole, rest = divmod(n_steps, size)
        first = self._clock % size
        wrapped = max(0, first + rest - size)
        needs = sum(self._needs[first : first + rest]) + sum(self._needs[:wrapped])
        return whole * len(self.members) + needs

    def join(self, sequence: Sequence) -> None:
        clock = self._clock
        self.members[sequence.id] = sequence
        sequence.status = Status.DECODE
        sequence.joined_step = clock
        sequence.finish_step = clock + sequence.stop_after - sequence.output_tokens
        self._base += sequence.computed - clock
        self._needs[(clock - sequence.computed) % len(self._needs)] += 1
        heappush(self._ends, (sequence.finish_step, sequence.ticket, sequence))

    def leave(self, sequence: Sequence) -> None:
        """Out of the sums, with its own counts brought up to the clock."""
        del self.members[sequence.id]
        joined, gained = sequence.joined_step, self.gained(sequence)
        self._base -= sequence.computed - joined
        self._needs[(joined - sequence.computed) % len(self._needs)] -= 1
        sequence.computed += gained
        sequence.output_tokens += gained

    def advance(self, n_steps: int) -> list[Sequence]:
        """Let so many steps pass; the members that reached their end, still to leave."""
        self._clock += n_steps
        ended, ends = [], self._ends
        while ends and ends[0][0] <= self._clock:
            end = heappop(ends)
            if self._is_current(end):
                # One that was preempted and came back before the clock moved is here twice.
                end[2].finish_step = -1
                ended.append(end[2])
        return ended

    @staticmethod
    def _is_current(end: tuple[int, int, Sequence]) -> bool:
        sequence = end[2]
        return sequence.status is Status.DECODE and sequence.finish_step == end[0]
