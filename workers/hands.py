"""What a worker has in hand for one engine: everything read and not gone, held back or running."""

import asyncio

from scheduler.wire.dispatcher import Job
from workers.attempt import Attempt


class Hands:
    """Attempts by request id, in the order they came."""

    def __init__(self, room: int) -> None:
        """At most `room` of them, which the reader is to respect."""
        self._room = room
        self.all: dict[str, Attempt] = {}
        "Everything not gone."
        self.held: dict[str, Attempt] = {}
        "Those that wait outside the engine."
        self.running: dict[str, Attempt] = {}
        "Those in it."
        self.has_room = asyncio.Event()
        self.has_room.set()
        self.empty = asyncio.Event()
        self.empty.set()

    @property
    def room(self) -> int:
        """How many more may come."""
        return self._room - len(self.all)

    def knows(self, job: Job) -> bool:
        """Whether this very attempt is here; of another entry it is another job, of a request that Redis lost and got again."""
        known = self.all.get(job.id)
        return known is not None and (known.job.attempt, known.job.entry) == (
            job.attempt,
            job.entry,
        )

    def take(self, attempt: Attempt) -> None:
        """It is here."""
        self.all[attempt.job.id] = attempt
        self.empty.clear()
        if self.room <= 0:
            self.has_room.clear()

    def hold(self, attempt: Attempt) -> None:
        """It waits for its admission."""
        self.held[attempt.job.id] = attempt

    def start(self, attempt: Attempt) -> None:
        """It goes into the engine."""
        del self.held[attempt.job.id]
        self.running[attempt.job.id] = attempt
        attempt.stage = "running"

    def leave(self, attempt: Attempt) -> None:
        """The engine has done with it."""
        if self.running.get(attempt.job.id) is attempt:
            del self.running[attempt.job.id]

    def forget(self, attempt: Attempt) -> None:
        """It is gone, wherever it stood."""
        attempt.stage = "gone"
        for some in (self.held, self.all):
            if some.get(attempt.job.id) is attempt:
                del some[attempt.job.id]
        if self.room > 0:
            self.has_room.set()
        if not self.all:
            self.empty.set()
