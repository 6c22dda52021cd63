"""Prompts computed here whose KV waits to be fetched, each for so long."""

import math
from collections import deque


class Leases:
    """1. `keep` begins a lease. 2. `claim` holds it until told otherwise. 3. `end`, or `ended` where nobody claimed."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._kept: dict[str, int] = {}
        "By request, the attempt."
        self._until: deque[tuple[float, str, int]] = deque()
        "Of those that nobody has claimed, in order of time."

    def clear(self) -> None:
        """All is lost."""
        self._kept.clear()
        self._until.clear()

    def keep(self, request_id: str, attempt: int, now: float) -> None:
        self._kept[request_id] = attempt
        self._until.append((now + self._lease_s, request_id, attempt))

    def has(self, request_id: str, attempt: int) -> bool:
        return self._kept.get(request_id) == attempt

    def attempt(self, request_id: str) -> int:
        """Which attempt's KV is kept; 0: none."""
        return self._kept.get(request_id, 0)

    def claim(self, request_id: str, attempt: int) -> bool:
        """Keep it until told otherwise; False: it is gone."""
        if not self.has(request_id, attempt):
            return False
        self._until = deque(lease for lease in self._until if lease[1] != request_id)
        return True

    def end(self, request_id: str, attempt: int) -> bool:
        """Keep it no more; False where it was not kept."""
        if not self.has(request_id, attempt):
            return False
        del self._kept[request_id]
        return True

    def next_at(self) -> float:
        """When the next lease ends; `inf`: none will."""
        return self._until[0][0] if self._until else math.inf

    def ended(self, now: float) -> list[str]:
        """Requests whose lease ends by now; they are kept no more."""
        found = []
        while self._until and self._until[0][0] <= now:
            _, request_id, attempt = self._until.popleft()
            if self.end(request_id, attempt):
                found.append(request_id)
        return found
