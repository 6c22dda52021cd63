"""Jobs and attempts, as a worker has them in hand; a test says what matters to it."""

from dispatcher.streams.sidecar import Held
from scheduler.wire.dispatcher import Job
from scheduler.wire.words import PATHS
from workers.attempt import Attempt
from workers.body import NOTHING, Written


def job(request_id: str = "r1", **fields) -> Job:
    """A completion's first attempt, enqueued and decided at the beginning of time."""
    usual = {
        "id": request_id,
        "entry": "1-0",
        "attempt": 1,
        "epoch": 1,
        "model": "m",
        "path": PATHS[1],
        "enqueued_at": 0.0,
        "decided_at": 0.0,
    }
    return Job(**usual | fields)


def held(
    request_id: str = "r1",
    *,
    pulled_at: float = 0.0,
    parsed: dict | None = None,
    written: Written = NOTHING,
    **fields,
) -> Attempt:
    """It waits outside the engine `e0`; `parsed` is its body."""
    given = Held("e0", job(request_id, **fields), "5-0")
    return Attempt(given, parsed or {}, pulled_at=pulled_at, written=written)
