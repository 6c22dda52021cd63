"""The core's commands as fenced calls, in the order in which they must happen.

Every call recognises its own repetition, so all of them may be said again until Redis answers.
"""

from collections.abc import Mapping, Sequence

import msgspec

from dispatcher import intake
from dispatcher.intake import Intake, Unreadable
from dispatcher.streams import dispatch
from dispatcher.streams.connection import Call
from scheduler import slo
from scheduler.errors import WireError
from scheduler.events import Abort, Arrived, Assign, Command, Finish, Forget, Note, Reclaim
from scheduler.keys import Keys
from scheduler.slo import Objective
from scheduler.wire.dispatcher import Decision

NOTES_MAX = 128
"Decisions logged by one call; keeps the server's longest single script under a millisecond."

Subject = Arrived | Unreadable | Assign | Reclaim | Finish | Forget | None
"Whom a call is about; None where a refusal would mean nothing."


class Move(msgspec.Struct, frozen=True):
    """A call under way, and whom it is about."""

    call: Call
    subject: Subject


class Moves:
    """Makes the calls of one reign."""

    def __init__(
        self,
        keys: Keys,
        epoch: int,
        reader: Intake,
        *,
        objectives: Mapping[str, Objective],
        retention_s: float,
    ) -> None:
        """`epoch` fences every call; terminal records are kept for `retention_s`."""
        self._keys = keys
        self._epoch = epoch
        self._reader = reader
        self._objectives = objectives
        self._retention_s = retention_s

    def of(
        self,
        arrived: Sequence[Arrived],
        unreadable: Sequence[Unreadable],
        commands: Sequence[Command],
        now: float,
        *,
        reasons: Sequence[Decision] = (),
    ) -> list[Move]:
        """Everything of one step: first what was read is written down, then why, then what follows from it.

        Of a request that is handed over in the step that reads it, the handing over says all. Why it was is not said
        with it, for its worker waits: `reasons` are those of earlier steps.
        """
        unsaid = {event.entry: event for event in arrived}
        decisions = list(reasons)
        deadlines: dict[str, float | None] = {}
        "As the core made them out, of those who wait now."
        carried: list[Move] = []
        repeated: list[Move] = []
        for command in commands:
            match command:
                case Assign():
                    is_new = unsaid.pop(command.job.entry, None) is not None
                    call = dispatch.assign(self._keys, self._epoch, command, is_new=is_new)
                    carried.append(Move(call, command))
                case Note():
                    decisions.append(command.decision)
                    if command.decision.kind == "read":
                        deadlines[command.decision.id] = command.deadline_at
                case Forget():  # `accept` acknowledges what repeats a living request
                    again = unsaid.pop(command.entry, None)
                    if again is not None:
                        repeated.append(Move(self.recall(again), command))
                case _:
                    carried.append(self._carry(command))
        moves: list[Move] = []
        if unsaid:
            moves += [Move(self._read(event, deadlines), event) for event in unsaid.values()]
        if unreadable:
            moves += [self._bury(entry, now) for entry in unreadable]
        for at in range(0, len(decisions), NOTES_MAX):
            call = dispatch.notes(self._keys, self._epoch, decisions[at : at + NOTES_MAX])
            moves.append(Move(call, None))
        moves += carried
        # Last: only once Redis knows the first entry of an id is another one a repetition.
        moves += repeated
        return moves

    def recall(self, event: Arrived) -> Call:
        """Write down that it is read, where the core has not said that it waits."""
        try:
            promise = slo.promise(event.request, event.enqueued_at, self._objectives)
        except WireError:
            return self._accept(event, None)  # the core will end it as invalid
        return self._accept(event, promise.deadline_at)

    def refuse(self, entry: Unreadable, now: float, *, own_id: bool = False) -> Call:
        """The one record of a request that cannot be read.

        Under its entry's `own_id` where the id that it says belongs to another request.
        """
        finish = self._reader.refusal(entry, now)
        if own_id:
            result = msgspec.structs.replace(finish.result, id=entry.entry)
            finish = msgspec.structs.replace(finish, result=result)
        return self._conclude(finish, intake.kept_fields(entry))

    def _bury(self, entry: Unreadable, now: float) -> Move:
        if entry.stream == self._keys.requests:
            return Move(self.refuse(entry, now), entry)
        return Move(dispatch.bury(self._keys, self._epoch, intake.dead(entry)), None)

    def _carry(self, command: Reclaim | Finish | Abort) -> Move:
        match command:
            case Reclaim():
                return Move(dispatch.reclaim(self._keys, self._epoch, command), command)
            case Finish():
                return Move(self._conclude(command), command)
            case Abort():
                return Move(dispatch.abort(self._keys, self._epoch, command), None)

    def _read(self, event: Arrived, deadlines: Mapping[str, float | None]) -> Call:
        request_id = event.request.id
        if request_id not in deadlines:
            return self.recall(event)
        return self._accept(event, deadlines[request_id])

    def _accept(self, event: Arrived, deadline_at: float | None) -> Call:
        return dispatch.accept(self._keys, self._epoch, event, deadline_at)

    def _conclude(self, command: Finish, fields: Mapping[str, str | bytes] | None = None) -> Call:
        return dispatch.conclude(
            self._keys, self._epoch, command, ttl_s=self._retention_s, fields=fields
        )


def whose(subject: Subject) -> tuple[str, str]:
    """The request that somebody is behind, and its entry."""
    match subject:
        case Arrived():
            return subject.request.id, subject.entry
        case Assign():
            return subject.job.id, subject.job.entry
        case Reclaim() | Forget():
            return subject.id, subject.entry
        case Finish():
            return subject.result.id, subject.entry
    raise AssertionError(f"nobody is behind {subject!r}")
