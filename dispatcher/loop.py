"""The live loop: read all, receive all, decide once, send, acknowledge.

One reign of one leader. Two blocked reads fill a bounded inbox; each turn empties it, asks the core once, and sends
all that follows in one pipeline. What comes while nothing is under way does not wait for its turn: it begins one, and
what follows is sent before anything else happens. What Redis refuses is told to the core before the next
turn. Whoever is fenced leaves by `FencedError`; what was read and not carried out stays pending in Redis for the next
leader.
"""

import asyncio
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import structlog

from dispatcher.delivery import Delivery
from dispatcher.intake import Intake, Unreadable, stamped_at
from dispatcher.journal import Core
from dispatcher.metrics import Meter
from dispatcher.moves import Move, Moves, whose
from dispatcher.reading import Reading
from dispatcher.recovery import FORMAT, Recovery, Saved
from dispatcher.streams.connection import Begun, Connection, Read
from scheduler.errors import FencedError, StreamError
from scheduler.events import (
    Arrived,
    Assign,
    Command,
    Event,
    Finish,
    Forget,
    Note,
    Reclaim,
    Refused,
)
from scheduler.keys import DISPATCHER_GROUP, Keys
from scheduler.settings import LoopSettings
from scheduler.wire.client import Control

if TYPE_CHECKING:
    from scheduler.wire.dispatcher import Decision

INBOX_MAX = 8
"Reads that may wait for the next turn; then the readers wait, and Redis keeps the rest."

TURN_MIN_S = 0.001
"Between two turns that news does not call for."

REASONS_S = 0.02
"How long the log of decisions may lack why a job was handed over, where nothing else happens; a kill takes that along."

REASONS_MAX = 64
"So many are logged whoever arrives."

TROUBLE_S = 0.1
"Before a turn that follows a call the server would not do, so that a lasting complaint is not a hot loop."

STRAYS_EVERY_S = 1.0
"Between two looks at what other consumers hold."

log = structlog.get_logger()


class _Turn(NamedTuple):
    """What one look at the news comes to, perhaps on its way already."""

    moves: list[Move]
    unreadable: Sequence[Unreadable]
    commands: Sequence[Command]
    begun: Begun | None


class Loop:
    """Drives one core under one epoch."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        core: Core,
        *,
        node: str,
        settings: LoopSettings,
        reader: Intake,
        moves: Moves,
        recovery: Recovery,
        delivery: Delivery,
        meter: Meter,
    ) -> None:
        """`node` is our consumer name in the group of `requests`."""
        self._connection = connection
        self._keys = keys
        self._core = core
        self._settings = settings
        self._reader = reader
        self._moves = moves
        self._recovery = recovery
        self._delivery = delivery
        self._meter = meter
        self._reading = Reading(
            connection,
            keys,
            node,
            count=settings.read_max,
            came=self._came,
            queue=self._queue,
        )
        self._inbox: asyncio.Queue[Read] = asyncio.Queue(INBOX_MAX)
        self._is_idle = False
        "Nothing is under way and nothing waits: news may begin a turn."
        self._begun: _Turn | None = None
        "The turn that news have begun."
        self._taken: Read | None = None
        "Those news."
        self._woken = asyncio.Event()
        self._reasons: list[Decision] = []
        "Why jobs were handed over: logged with a step in which nobody arrives, since no worker waits for it."
        self._cursors: dict[str, str] = {}
        "The last entry of each log that the core has received."
        self._trouble = False
        self._strays_at = 0.0
        self._delivered = "0-0"
        "Up to which entry `requests` had been given out when this reign began."

    async def take_over(self, *, beats_since: float) -> bool:
        """Bring the core up to what Redis holds; whether it started warm."""
        await self._connection.ensure_group(self._keys.requests, DISPATCHER_GROUP)
        self._delivered = await self._connection.delivered(self._keys.requests, DISPATCHER_GROUP)
        saved = await self._recovery.saved()
        is_warm = saved is not None and self._core.restore(saved.core)
        past = await self._recovery.past(saved if is_warm else None, beats_since=beats_since)
        self._cursors = past.cursors
        # What no snapshot can have seen: the rest was buried when it came, under somebody else.
        since = 0.0 if saved is None else saved.at
        found_bad = self._receive(past.events)
        unreadable = [one for one in found_bad if stamped_at(one.entry) >= since]
        async for found in self._recovery.claim_all():
            unreadable += self._receive(found)
        await self._finish(self._carry([], unreadable, []))
        return is_warm

    async def run(self) -> None:
        """Turn until cancelled or fenced."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._reading.requests(self._delivered))
            tasks.create_task(self._reading.logs(self._cursors))
            while True:
                await self._finish(await self._next())
                if self._connection.now() >= self._strays_at:
                    await self._look_for_strays()

    def saved(self) -> Saved:
        """The state to keep for the next leader's warm start."""
        return Saved(
            format=FORMAT,
            at=self._connection.now(),
            rewards=self._cursors[self._keys.rewards],
            core=self._core.snapshot(with_requests=False),
        )

    async def log_reasons(self) -> None:
        """Log why the last jobs were handed over: the end of a reign that ends in order."""
        reasons, self._reasons = self._reasons, []
        moves = self._moves.of([], [], [], self._connection.now(), reasons=reasons)
        await self._connection.batch([move.call for move in moves])

    # One turn

    async def _next(self) -> _Turn:
        """The turn that somebody has begun, or the one that what was read, or the core's own time, calls for."""
        if self._inbox.empty():
            self._is_idle = True
            try:
                async with asyncio.timeout(self._pause_s()):
                    await self._woken.wait()
            except TimeoutError:
                pass
            finally:
                self._is_idle = False
                self._woken.clear()
            turn, self._begun = self._begun, None
            if turn is not None:
                return turn
        read: Read = {}
        while not self._inbox.empty():
            for stream, entries in self._inbox.get_nowait().items():
                read.setdefault(stream, []).extend(entries)
        return self._turn(read)

    def _came(self, read: Read) -> None:
        """News, the moment they are here: they begin a turn, unless something is under way."""
        if read and self._is_idle and self._taken is None:
            self._is_idle = False
            self._taken = read
            self._begun = self._turn(read)
            self._woken.set()

    async def _queue(self, read: Read) -> None:
        """The same news, from their reader: they wait for the next turn, unless they have begun one."""
        if read is self._taken:
            self._taken = None
            return
        if read:
            await self._inbox.put(read)
        await asyncio.sleep(0)  # what came is planned before more is asked for

    def _pause_s(self) -> float:
        wakeup_at = self._core.wakeup_at()
        longest_s = REASONS_S if self._reasons else self._settings.step_s
        if wakeup_at is None:
            return longest_s
        shortest_s = TROUBLE_S if self._trouble else TURN_MIN_S
        return min(longest_s, max(shortest_s, wakeup_at - self._connection.now()))

    def _turn(self, read: Read) -> _Turn:
        """Begin a turn: no other task has its own between the news and what follows from them."""
        self._trouble = False
        events, arrived, unreadable = self._decoded(read)
        now = self._connection.now()
        for event in events:
            self._core.receive(event, now)
        began_at = perf_counter()
        commands = self._core.decide(self._connection.now())
        took_s = perf_counter() - began_at
        turn = self._carry(arrived, unreadable, commands)
        # What is remembered and counted can wait until what was decided is on its way.
        self._core.settle()
        self._meter.turned(took_s)
        for event in events:
            self._meter.event(event, now)
        return turn

    def _decoded(self, read: Read) -> tuple[list[Event], list[Arrived], list[Unreadable]]:
        """Events in the order requests, rewards, beats, controls: causes before what they cause."""
        arrived: list[Arrived] = []
        unreadable: list[Unreadable] = []
        for entry in read.get(self._keys.requests, ()):
            request = self._reader.request(entry)
            if isinstance(request, Arrived):
                arrived.append(request)
            else:
                unreadable.append(request)
        events: list[Event] = list(arrived)
        unwanted = filter(self._recovery.is_unwanted, arrived)
        events += [Control(action="cancel", id=one.request.id) for one in unwanted]
        for stream in (self._keys.rewards, self._keys.beats, self._keys.controls):
            entries = read.get(stream)
            if not entries:
                continue
            for entry in entries:
                fact = self._reader.fact(stream, entry)
                if isinstance(fact, Unreadable):
                    unreadable.append(fact)
                else:
                    events.append(fact)
            self._cursors[stream] = entries[-1][0]
        return events, arrived, unreadable

    def _receive(self, events: Sequence[Event | Unreadable]) -> list[Unreadable]:
        """Tell the core; what is unreadable is handed back."""
        now = self._connection.now()
        for event in events:
            if not isinstance(event, Unreadable):
                self._meter.event(event, now)
                self._core.receive(event, now)
        return [event for event in events if isinstance(event, Unreadable)]

    async def _look_for_strays(self) -> None:
        """Between two turns, so that no reward can come between the look and the telling."""
        self._strays_at = self._connection.now() + STRAYS_EVERY_S
        try:
            found = await self._recovery.strays()
        except FencedError:
            raise
        except StreamError as error:
            log.warning("strays_not_seen", reason=str(error))
            return
        await self._finish(self._carry([], self._receive(found), []))

    # What follows from it

    def _carry(
        self,
        arrived: Sequence[Arrived],
        unreadable: Sequence[Unreadable],
        commands: Sequence[Command],
    ) -> _Turn:
        """Send off what a turn comes to."""
        reasons: list[Decision] = []
        # Where something is logged anyway they go before it: the log tells things in the order in which they were decided.
        is_told = any(isinstance(command, Note | Reclaim) for command in commands)
        if not arrived or is_told or len(self._reasons) >= REASONS_MAX:
            reasons, self._reasons = self._reasons, []
        moves = self._moves.of(
            arrived, unreadable, commands, self._connection.now(), reasons=reasons
        )
        begun = self._delivery.begin([move.call for move in moves])
        return _Turn(moves, unreadable, commands, begun)

    async def _finish(self, turn: _Turn) -> None:
        """Carry out a turn, and tell the core which of its commands Redis refused."""
        moves, unreadable, commands, begun = turn
        self._meter.unreadable += len(unreadable)
        replies = await self._delivery.send([move.call for move in moves], begun)
        self._meter.commands(commands)
        refused: list[Move] = []
        for move, reply in zip(moves, replies, strict=True):
            if not self._is_done(move, reply):
                refused.append(move)
            elif isinstance(move.subject, Assign):
                self._reasons.append(move.subject.decision)
        for command in commands:
            _say(command)
        for entry in unreadable:
            log.warning("unreadable", stream=entry.stream, entry=entry.entry, reason=entry.reason)
        if refused:
            await self._explain(refused)

    def _is_done(self, move: Move, reply: object) -> bool:
        """Whether the reply is what the core expects; complaints are said aloud."""
        if isinstance(reply, StreamError):
            log.error("move_failed", function=move.call.function, reason=str(reply))
            self._trouble = True
            return move.subject is None
        if isinstance(move.subject, Arrived) and reply == 2:
            self._receive([Control(action="cancel", id=move.subject.request.id)])
        if isinstance(move.subject, Forget):
            return reply == 0  # else Redis knows it under this very entry: the dead came back
        return move.subject is None or reply != 0

    async def _explain(self, refused: Sequence[Move]) -> None:
        """Redis knows better: the core forgets these requests, and learns anew where the living ones stand."""
        unreadable: list[Unreadable] = []
        for move in refused:
            subject = move.subject
            if isinstance(subject, Unreadable):
                await self._delivery.send(
                    [self._moves.refuse(subject, self._connection.now(), own_id=True)]
                )
                continue
            request_id, entry = whose(subject)
            reason = f"redis refused to {move.call.function} it"
            self._receive([Refused(id=request_id, entry=entry, reason=reason)])
            self._meter.refusals[move.call.function] += 1
            if not isinstance(subject, Arrived):  # a duplicate entry has nothing more to tell
                unreadable += self._receive(await self._recovery.entry(entry))
        assert not unreadable, "what was read once can be read again"


def _say(command: Command) -> None:
    """One line for what ends here or must be tried again; a worker says the rest."""
    match command:
        case Finish(result=result):
            log.info("ended", request_id=result.id, outcome=result.outcome, reason=result.reason)
        case Reclaim():
            log.warning(
                "reclaimed",
                request_id=command.id,
                endpoint=command.endpoint,
                attempt=command.attempt,
                reason=command.decision.reason,
            )
        case _:
            pass
