"""Orders of a central line: who is prefilled next.

Each is given the same late binding (`desk.Lined`) and the same predicted seconds, so that only the order differs.
Predicted seconds of a waiting request are those of its whole prompt on the mean endpoint, fixed when it comes.
"""

from collections.abc import Callable
from heapq import heappop, heappush, nsmallest

from scheduler.sim.baselines.senses import Asked

Service = Callable[[Asked], float]
"Predicted seconds of prefill."

CONSIDERED = 256
"How many of a line an order that must look at all of them looks at."


class Ranked:
    """A line in the order of one number, fixed when a request comes; ties to the older."""

    def __init__(self, rank: Callable[[Asked], float]) -> None:
        self._rank = rank
        self._heap: list[tuple[float, float, str, Asked]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, asked: Asked) -> None:
        heappush(self._heap, (self._rank(asked), asked.enqueued_at, asked.id, asked))

    def pop(self, now: float) -> Asked | None:  # noqa: ARG002
        return heappop(self._heap)[3] if self._heap else None

    def dropped(self) -> list[Asked]:
        return []


class Dropping(Ranked):
    """Earliest due first; who cannot make it any more when its turn comes is refused."""

    def __init__(self, finish_s: Service) -> None:
        """`finish_s` says how long a request takes if it goes next."""
        super().__init__(lambda asked: asked.due_at)
        self._finish_s = finish_s
        self._lost: list[Asked] = []

    def pop(self, now: float) -> Asked | None:
        while self._heap:
            asked = heappop(self._heap)[3]
            if now + self._finish_s(asked) <= asked.due_at:
                return asked
            self._lost.append(asked)
        return None

    def dropped(self) -> list[Asked]:
        lost, self._lost = self._lost, []
        return lost


def moore_hodgson(due: list[float], service_s: list[float], now: float, speed: float) -> list[int]:
    """Places of the most requests that can all be on time on one server of `speed` (Moore 1968), in due order.

    In due order each is taken; where one is late, the longest taken so far is given up.

    >>> moore_hodgson([3.0, 4.0, 5.0], [2.0, 3.0, 1.5], now=0.0, speed=1.0)
    [0, 2]
    """
    taken: list[tuple[float, int]] = []
    end_s = 0.0
    for at in sorted(range(len(due)), key=lambda place: (due[place], place)):
        heappush(taken, (-service_s[at], at))
        end_s += service_s[at] / speed
        if now + end_s > due[at]:
            longest, _ = heappop(taken)
            end_s += longest / speed
    return sorted((at for _, at in taken), key=lambda place: (due[place], place))


class MooreHodgson:
    """The most on time of those who wait, by their due moments; the others when nothing else waits, shortest first."""

    def __init__(self, service_s: Service, finish_s: Service, speed: Callable[[], float]) -> None:
        """`finish_s` says how long one takes if it goes next, `speed` how many mean endpoints serve the line."""
        self._service_s, self._finish_s, self._speed = service_s, finish_s, speed
        self._line: dict[str, tuple[float, float, Asked, float]] = {}

    def __len__(self) -> int:
        return len(self._line)

    def add(self, asked: Asked) -> None:
        last_at = asked.due_at - self._finish_s(asked)
        self._line[asked.id] = (asked.due_at, self._service_s(asked), asked, last_at)

    def pop(self, now: float) -> Asked | None:
        if not self._line:
            return None
        able = [entry for entry in self._line.values() if now <= entry[3]]
        seen = nsmallest(CONSIDERED, able, key=lambda entry: (entry[0], entry[2].enqueued_at))
        taken = moore_hodgson(
            [entry[0] for entry in seen], [entry[1] for entry in seen], now, self._speed()
        )
        if taken:
            chosen = seen[taken[0]][2]
        else:
            chosen = min(self._line.values(), key=lambda e: (e[1], e[2].enqueued_at))[2]
        del self._line[chosen.id]
        return chosen

    def dropped(self) -> list[Asked]:
        return []


class Relegating(Ranked):
    """Any rank, with one-shot relegation.

    Whoever is found unable to make it when its turn comes goes behind everybody for good (Niyama's eager
    relegation, arXiv 2503.22562, section 3); among those the order is the same.
    """

    def __init__(self, rank: Callable[[Asked], float], finish_s: Service) -> None:
        super().__init__(rank)
        self._finish_s = finish_s
        self._relegated: list[tuple[float, float, str, Asked]] = []

    def __len__(self) -> int:
        return len(self._heap) + len(self._relegated)

    def pop(self, now: float) -> Asked | None:
        while self._heap:
            entry = heappop(self._heap)
            if now + self._finish_s(entry[3]) <= entry[3].due_at:
                return entry[3]
            heappush(self._relegated, entry)
        return heappop(self._relegated)[3] if self._relegated else None


class UrgencyFirst:
    """Kairos, our reconstruction from its abstract: the most urgent first, urgency = own work / time left.

    Below 1 a request can make it and the one nearest to 1 goes first; those beyond wait behind all who can, the
    shortest first. Decoding is packed by the worker's slack-guided admission.
    """

    def __init__(self, finish_s: Service) -> None:
        self._finish_s = finish_s
        self._line: dict[str, tuple[float, Asked]] = {}
        self._late: list[tuple[float, float, str, Asked]] = []

    def __len__(self) -> int:
        return len(self._line) + len(self._late)

    def add(self, asked: Asked) -> None:
        self._line[asked.id] = (self._finish_s(asked), asked)

    def pop(self, now: float) -> Asked | None:
        best: tuple[float, float, str] | None = None
        for cost_s, asked in list(self._line.values()):
            left_s = asked.due_at - now
            if cost_s > left_s:
                del self._line[asked.id]
                heappush(self._late, (cost_s, asked.enqueued_at, asked.id, asked))
                continue
            place = (-cost_s / left_s, asked.enqueued_at, asked.id)
            best = place if best is None else min(best, place)
        if best is not None:
            return self._line.pop(best[2])[1]
        return heappop(self._late)[3] if self._late else None

    def dropped(self) -> list[Asked]:
        return []
