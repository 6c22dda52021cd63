"""Jobs and attempts, as a worker has them in hand; a test says what matters to it."""

from hand import Hand

from dispatcher.streams.sidecar import Held
from scheduler import codec
from scheduler.keys import WORKER_GROUP
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


async def pulled(hand: Hand, request_id: str = "r1", **fields) -> Attempt:
    """The next attempt of `e0`, enqueued and assigned by this dispatcher and read by a worker `w0`; fields as of `submit`."""
    jobs = hand.keys.jobs("e0")
    await hand.redis.ensure_group(jobs, WORKER_GROUP)
    asked = {"prompt": "x"}
    await hand.submit(request_id, asked, 1, **{"path": PATHS[1]} | fields)
    read = await hand.redis.read_group(WORKER_GROUP, "w0", [jobs], count=1, block_s=None)
    [(entry, written)] = read[jobs]
    given = Held("e0", codec.decode(Job, written), entry)
    return Attempt(given, asked, pulled_at=hand.redis.now())
