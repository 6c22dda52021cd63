"""The commands of one step, in the order in which they are to be carried out."""

import msgspec

from scheduler.events import Abort, Assign, Command, Finish, Forget, Note, Reclaim
from scheduler.state import Endpoint, Ticket
from scheduler.wire.client import Request
from scheduler.wire.dispatcher import Decision
from scheduler.wire.words import Outcome
from scheduler.wire.worker import Result


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How the core ends a request that no worker holds."""

    outcome: Outcome
    reason: str
    retry_after_s: float | None = None
    is_dead: bool = False
    "Keep its fields for people: what cannot be served, or failed for good."


class Outbox:
    """Commands until the driver takes them; whatever ends or moves is also noted for `explain`."""

    def __init__(self, policy: str) -> None:
        """Sign decisions with this policy's name."""
        self._policy = policy
        self._commands: list[Command] = []
        self._read: dict[str, tuple[Ticket, int, float]] = {}
        "Who was read since the last `take` and is still here, how many waited then, and when."

    def __len__(self) -> int:
        return len(self._commands) + len(self._read)

    def take(self) -> list[Command]:
        """All of them; the box is empty then."""
        commands = [*map(self._noted, self._read.values()), *self._commands]
        self._read.clear()
        self._commands.clear()
        return commands

    def read(self, ticket: Ticket, waiting: int, now: float) -> None:
        """Log that it was read and waits, unless it is handed over before the next `take`: that says it all."""
        self._read[ticket.id] = ticket, waiting, now

    def assign(self, command: Assign) -> None:
        """Hand a request over."""
        self._read.pop(command.job.id, None)
        self._commands.append(command)

    def forget(self, request_id: str, entry: str) -> None:
        """Acknowledge an entry that repeats another."""
        self._commands.append(Forget(id=request_id, entry=entry))

    def abort(self, ticket: Ticket) -> None:
        """Ask its worker to end it."""
        self._commands.append(Abort(id=ticket.id, endpoint=ticket.endpoint, attempt=ticket.attempt))

    def reclaim(self, ticket: Ticket, endpoint: Endpoint, reason: str, now: float) -> None:
        """Take it back from an endpoint that is lost, and fence what that may still write."""
        self._commands.append(
            Reclaim(
                id=ticket.id,
                entry=ticket.entry,
                endpoint=endpoint.name,
                attempt=ticket.attempt,
                deadline_at=ticket.promise.deadline_at,
                decision=Decision(
                    id=ticket.id,
                    kind="reclaimed",
                    at=now,
                    policy=self._policy,
                    attempt=ticket.attempt,
                    endpoint=endpoint.name,
                    reason=reason,
                ),
            )
        )

    def end(
        self,
        request: Request,
        entry: str,
        enqueued_at: float,
        ending: Ending,
        *,
        attempt: int,
        now: float,
    ) -> None:
        """Write its terminal record."""
        is_dead = ending.is_dead or ending.outcome == "invalid"
        result = Result(
            id=request.id,
            outcome=ending.outcome,
            reason=ending.reason,
            retry_after_s=ending.retry_after_s,
            attempt=attempt,
            enqueued_at=enqueued_at,
            finished_at=now,
        )
        self._commands.append(
            Finish(
                entry=entry,
                reply_to=request.reply_to,
                result=result,
                is_dead=is_dead,
                request=request if is_dead else None,
            )
        )
        self.note(
            request.id, "finished", f"{ending.outcome}: {ending.reason}", now, attempt=attempt
        )

    def note(
        self,
        request_id: str,
        kind: str,
        reason: str,
        now: float,
        *,
        attempt: int = 0,
        slack_s: float | None = None,
        waiting: int = 0,
    ) -> None:
        """Log a turn that moves nothing in Redis."""
        decision = Decision(
            id=request_id,
            kind=kind,  # type: ignore[arg-type]
            at=now,
            policy=self._policy,
            attempt=attempt,
            slack_s=slack_s,
            waiting=waiting,
            reason=reason,
        )
        self._commands.append(Note(decision=decision))

    def _noted(self, read: tuple[Ticket, int, float]) -> Note:
        ticket, waiting, at = read
        decision = Decision(
            id=ticket.id,
            kind="read",
            at=at,
            policy=self._policy,
            waiting=waiting,
            reason=f"waits as number {waiting}",
        )
        return Note(decision=decision, deadline_at=ticket.promise.deadline_at)
