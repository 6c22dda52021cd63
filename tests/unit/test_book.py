"""What is remembered of requests is bounded by those who live."""

from scheduler.book import ENDS_MIN, Book
from scheduler.fairness import FairnessSettings
from scheduler.slo import Promise
from scheduler.state import Ticket
from scheduler.wire.client import Request

FINISHED_MAX = 100


def book() -> Book:
    return Book(FINISHED_MAX, FairnessSettings())


def ticket(number: int, deadline_at: float) -> Ticket:
    promise = Promise(
        ttft_s=None, tpot_s=None, deadline_at=deadline_at, priority=0, weight=1.0, refuse_at=None
    )
    return Ticket(
        request=Request(id=f"r{number}", model="m"),
        entry=f"{number}-0",
        enqueued_at=float(number),
        promise=promise,
        prompt_tokens=1,
        output_tokens=1,
        due_at=deadline_at,
        rank=deadline_at,
        max_attempts=3,
    )


def test_moments_of_those_who_have_left_do_not_pile_up():
    """Deadlines are hours away and answers come in seconds; whoever still waits is ended at his time."""
    made = book()
    patient = ticket(0, deadline_at=5_000.0)
    made.read(patient)
    for number in range(1, 5 * ENDS_MIN):
        served = ticket(number, deadline_at=9_000.0 + number)
        made.read(served)
        made.finish(served, now=1.0)

    assert len(made._ends) <= 2 * ENDS_MIN + 1
    assert made.next_end_at() == 5_000.0
    assert made.ended(5_000.0, limit=10) == [patient]


def test_the_latest_ids_are_remembered():
    """So many as was said, the oldest go first."""
    made = book()
    for number in range(2 * FINISHED_MAX):
        made.remember(f"r{number}")

    assert list(made.finished) == [f"r{n}" for n in range(FINISHED_MAX, 2 * FINISHED_MAX)]
