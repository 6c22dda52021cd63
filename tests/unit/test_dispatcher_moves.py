"""What one step of the core becomes in Redis."""

from dispatcher.intake import Intake
from dispatcher.moves import Moves
from scheduler.events import Arrived, Finish, Forget, Note
from scheduler.keys import Keys
from scheduler.slo import Objective
from scheduler.wire.client import Request
from scheduler.wire.dispatcher import Decision
from scheduler.wire.worker import Result

KEYS = Keys()


def moves_of(arrived, commands):
    objectives = {"chat": Objective(deadline_ms=9_000)}
    made = Moves(KEYS, 1, Intake(KEYS, body_bytes=100), objectives=objectives, retention_s=60).of(
        arrived, [], commands, 5.0
    )
    return [(move.call.function, move.call.args) for move in made]


def arrival(entry: str = "1000-0", **fields: object) -> Arrived:
    request = Request(id="r", model="m", **fields)  # type: ignore[arg-type]
    return Arrived(request=request, entry=entry, enqueued_at=1.0)


def note(kind: str, deadline_at: float | None = None) -> Note:
    return Note(decision=Decision(id="r", kind=kind), deadline_at=deadline_at)  # type: ignore[arg-type]


def test_who_waits_is_written_down_with_the_deadline_that_the_core_made_out():
    """Whatever else happens to it in the same step; then why, in one call."""
    [accept, log] = moves_of([arrival()], [note("read", 7.5), note("set_aside")])

    assert (accept[0], accept[1][-1]) == ("accept", "7500")
    assert log[0] == "log"


def test_what_does_not_wait_has_the_deadline_of_its_objective():
    """A repetition's comes last, so that Redis knows the first entry by then; neither is noted as read."""
    ended = Finish(entry="1000-0", reply_to="", result=Result(id="r", outcome="rejected"))
    again = arrival("2000-0", objective="chat")

    calls = moves_of([arrival(), again], [Forget(id="r", entry="2000-0"), ended])

    assert [name for name, _ in calls] == ["accept", "conclude", "accept"]
    assert [args[-1] for name, args in calls if name == "accept"] == ["+inf", "10000"]
