"""The core's wishes as fenced calls, in the order in which they must happen.

Every call recognises its own repetition, so all of them may be said again until Redis answers.
"""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

import msgspec

from dispatcher import intake
from dispatcher.intake import Intake, Unreadable
from dispatcher.streams import dispatch
from dispatcher.streams.connection import Call
from scheduler import slo
from scheduler.errors import WireError
from scheduler.events import Abort, Arrived, Assign, Command, Finish, Forget, Note, Reclaim
from scheduler.keys import Keys
from scheduler.settings import Objective
from scheduler.wire import Decision

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
    ) -> list[Move]:
        """Everything of one step: first what was read is written down, then why, then what follows from it.

        Of a request that is handed over in the step that reads it, the handing over says all.
        """
        repeated = {command.entry: command for command in commands if isinstance(command, Forget)}
        at_once = {command.job.entry for command in commands if isinstance(command, Assign)}
        at_once &= {event.entry for event in arrived}
        moves = [
            Move(self.accept(event), event)
            for event in arrived
            if event.entry not in at_once and event.entry not in repeated
        ]
        moves += [self._bury(entry, now) for entry in unreadable]
        moves += [
            Move(dispatch.notes(self._keys, self._epoch, part), None)
            for part in _parts(_noted(commands), NOTES_MAX)
        ]
        moves += [
            move
            for command in commands
            for move in (self._carry(command, at_once),)
            if move is not None
        ]
        # Last: only once Redis knows the first entry of an id is another one a repetition.
        moves += [
            Move(self.accept(event), repeated[event.entry])
            for event in arrived
            if event.entry in repeated
        ]
        return moves

    def accept(self, event: Arrived) -> Call:
        """Write down that it is read, with its place among the waiting."""
        return dispatch.accept(self._keys, self._epoch, event, self._deadline_at(event))

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

    def _carry(self, command: Command, at_once: AbstractSet[str]) -> Move | None:
        match command:
            case Assign():
                is_new = command.job.entry in at_once
                return Move(
                    dispatch.assign(self._keys, self._epoch, command, is_new=is_new), command
                )
            case Reclaim():
                return Move(dispatch.reclaim(self._keys, self._epoch, command), command)
            case Finish():
                return Move(self._conclude(command), command)
            case Abort():
                return Move(dispatch.abort(self._keys, self._epoch, command), None)
            case Forget() | Note():
                return (
                    None  # `accept` acknowledges what repeats a living request; notes went together
                )

    def _conclude(self, command: Finish, fields: Mapping[str, str | bytes] | None = None) -> Call:
        return dispatch.conclude(
            self._keys, self._epoch, command, ttl_s=self._retention_s, fields=fields
        )

    def _deadline_at(self, event: Arrived) -> float | None:
        try:
            return slo.promise(event.request, event.enqueued_at, self._objectives).deadline_at
        except WireError:
            return None  # the core ends it as invalid in this same step


def _noted(commands: Sequence[Command]) -> list[Decision]:
    """What moves nothing and is worth a line: that a request was read goes without saying once it is assigned."""
    assigned = {command.job.id for command in commands if isinstance(command, Assign)}
    decisions = [command.decision for command in commands if isinstance(command, Note)]
    return [one for one in decisions if one.kind != "read" or one.id not in assigned]


def _parts(decisions: Sequence[Decision], size: int) -> Iterator[Sequence[Decision]]:
    for at in range(0, len(decisions), size):
        yield decisions[at : at + size]
