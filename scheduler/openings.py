"""Which endpoints could begin something at once, and which request is the last in line that fits on one.

A line is looked at only as far as its last who fits: in deep overload endpoints have time and seats, and no KV for
any of those who wait. Time and KV only become less while a step is planned, so whoever cannot start now cannot later
in the step, and to place what is behind the last who can would change nothing that is handed over.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from scheduler.prefix import BLOCK_TOKENS
from scheduler.room import Room
from scheduler.state import Floats, Ticket


class Openings:
    """Of one line, in one step."""

    def __init__(
        self,
        line: Sequence[Ticket],
        room: Room,
        *,
        barrier: Callable[[str], Floats],
        within_s: float,
    ) -> None:
        """Look at this line.

        Args:
            line: most urgent first.
            room: what there is; looked at anew each time.
            barrier: by model, 0 for each slot where a request may go, `inf` where not.
            within_s: what starts so soon, starts now.
        """
        self._line = line
        self._room = room
        self._barrier = barrier
        self._within_s = within_s
        self._known: tuple[Floats, Floats] | None = None
        self._bounds: dict[int, tuple[float, int, bool]] = {}
        "By slot: its free KV then, the place behind which nobody fits there, and whether the request at that place does."
        self._seen = -1
        self._last = -1

    def last(self) -> int:
        """The place of the last who could start; -1: nobody can."""
        if self._seen != self._room.version:
            self._seen = self._room.version
            self._last = self._find()
        return self._last

    def _find(self) -> int:
        """Slot by slot, the last who fits there; what was found for a slot holds while its free KV is the same."""
        room, end = self._room, len(self._line) - 1
        if end < 0:
            return -1
        last = self._line[end]
        if not room.is_tight(room.asked_kv(last)):
            open_s = room.open_s + self._barrier(last.request.model)
            if open_s.item(open_s.argmin()) <= self._within_s:
                return end
        found = -1
        for slot in (room.open_s <= self._within_s).nonzero()[0].tolist():
            kv = float(room.kv[slot])
            known_kv, bound, is_exact = self._bounds.get(slot, (-1.0, end, False))
            if known_kv != kv or (bound > found and not is_exact):
                at = self._last_at(slot, found)
                bound, is_exact = max(at, found), at > found
                self._bounds[slot] = kv, bound, is_exact
            found = max(found, bound)
            if found == end:
                break
        return found

    def _last_at(self, slot: int, known: int) -> int:
        """The place of the last who fits there, if it is behind the one already known; else -1."""
        room, after = self._room, known + 1
        free, most = room.kv.item(slot), room.kv_max.item(slot)
        wanted, shared = (np.minimum(sizes[after:], most) for sizes in self._sizes())
        rows = (wanted - shared <= free).nonzero()[0][::-1]
        held = room.pins.held(slot)
        for at, size in zip(rows.tolist(), wanted[rows].tolist(), strict=True):
            request = self._line[after + at].request
            depth = math.ceil(max(0.0, size - free) / BLOCK_TOKENS)
            if depth > size // BLOCK_TOKENS or (depth and request.blocks[depth - 1] not in held):
                continue
            if self._barrier(request.model)[slot] == 0:
                return int(after + at)
        return -1

    def _sizes(self) -> tuple[Floats, Floats]:
        """The KV tokens that each of the line wants, and how many of them others may hold; float64[n_line] both."""
        if self._known is None:
            wanted = self._room.asked_by(self._line)
            blocks = np.array([len(ticket.request.blocks) for ticket in self._line], dtype=float)
            self._known = wanted, BLOCK_TOKENS * np.minimum(blocks, wanted // BLOCK_TOKENS)
        return self._known
