"""What a new leader must know: where every request stands that somebody read before it.

    1. `saved`     the last snapshot, if it can still be read; else a cold start
    2. `past`      rewards since the snapshot, controls of endpoints, the beats of the last seconds
    3. `claim_all` every pending entry of `requests`, whoever read it, with where its hash says that it stands
    4. `strays`    again and again: what a frozen old leader's blocked read still swallowed

A request in a living worker's hands stays there: only its endpoint's lease decides about it.
"""

from collections.abc import AsyncIterator, Sequence
from typing import TypeGuard, get_args

import msgspec

from dispatcher.delivery import Delivery
from dispatcher.intake import Intake, Unreadable, order, stamped_at
from dispatcher.moves import Moves
from dispatcher.streams import dispatch
from dispatcher.streams.connection import Call, Connection, Entry
from scheduler.errors import UNREADABLE
from scheduler.events import Arrived, Event, Recovered
from scheduler.keys import DISPATCHER_GROUP, Keys
from scheduler.view import Snapshot
from scheduler.wire.client import Control
from scheduler.wire.words import Leg
from scheduler.wire.worker import Reward

CLAIM_COUNT = 500
"Pending entries claimed in one call; about 3 ms of the server's time."

REPLAY_MAX = 5_000
"Rewards learned again at a takeover, newest: half a second; older ones are worth little."

CONTROLS_KEPT = 10_000
"Controls kept, and read again at a takeover to know who is drained."

FORMAT = 1
"Of the snapshot's envelope."

STANDING = ("state", "attempt", "endpoint", "epoch", "cancelled", "leg", "handovers", "kept")


_LEGS: dict[bytes, Leg] = {leg.encode(): leg for leg in get_args(Leg)}


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """What the key `snapshot` holds, as JSON."""

    format: int = FORMAT
    at: float
    "When, on Redis' clock."
    rewards: str
    "The last entry of `rewards` that is in it."
    core: Snapshot


class Past(msgspec.Struct, frozen=True):
    """Facts from before this reign, and from which entry of each stream to read on."""

    events: list[Event | Unreadable]
    cursors: dict[str, str]


class Recovery:
    """Reads back what Redis holds, under one leader's epoch."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        *,
        node: str,
        reader: Intake,
        moves: Moves,
        delivery: Delivery,
    ) -> None:
        """`node` is the name under which entries are claimed."""
        self._connection = connection
        self._keys = keys
        self._node = node
        self._reader = reader
        self._moves = moves
        self._delivery = delivery
        self._cancels: dict[str, str] = {}
        "What people asked to cancel before this reign, and in which entry: by hand there is no tombstone."

    async def saved(self) -> Saved | None:
        """The last snapshot; None where there is none that we can read."""
        data = await self._connection.command("GET", self._keys.snapshot)
        try:
            found = msgspec.json.decode(data or b"", type=Saved)
        except UNREADABLE:
            return None
        return found if found.format == FORMAT else None

    async def past(self, saved: Saved | None, *, beats_since: float) -> Past:
        """Rewards that the snapshot does not know, controls of endpoints, and beats since a moment."""
        keys, newest = self._keys, self._connection.newest
        beats_after = f"{round(max(0.0, beats_since) * 1e3)}-0"
        read = {
            # Endpoints first: a reward teaches only whom the core knows.
            keys.beats: await newest(keys.beats, after=beats_after, count=REPLAY_MAX),
            keys.rewards: await newest(
                keys.rewards, after=saved.rewards if saved else "0-0", count=REPLAY_MAX
            ),
            keys.controls: await newest(keys.controls, after="0-0", count=CONTROLS_KEPT),
        }
        before = {keys.rewards: saved.rewards if saved else "0-0", keys.beats: beats_after}
        told = [
            (entry[0], self._reader.fact(stream, entry))
            for stream, found in read.items()
            for entry in found
        ]
        self._cancels = {fact.id: entry for entry, fact in told if _is_cancel(fact)}
        return Past(
            events=[fact for _, fact in told if not _is_cancel(fact)],
            cursors={
                stream: found[-1][0] if found else before.get(stream, "0-0")
                for stream, found in read.items()
            },
        )

    async def claim_all(self) -> AsyncIterator[list[Recovered | Unreadable]]:
        """Every pending entry, oldest first, a part at a time."""
        start = "0-0"
        while True:
            start, entries = await self._connection.claim(
                self._keys.requests, DISPATCHER_GROUP, self._node, start=start, count=CLAIM_COUNT
            )
            yield await self.recall(entries)
            if start == "0-0":
                return

    async def strays(self) -> list[Recovered | Unreadable]:
        """What other consumers hold: entries that an old leader's blocked read took after its end."""
        found: list[Recovered | Unreadable] = []
        consumers = await self._connection.consumers(self._keys.requests, DISPATCHER_GROUP)
        for name, (pending, _) in consumers.items():
            if name != self._node and pending:
                entries = await self._connection.take(
                    self._keys.requests,
                    DISPATCHER_GROUP,
                    self._node,
                    other=name,
                    count=CLAIM_COUNT,
                )
                found += await self.recall(entries)
        return found

    async def entry(self, entry_id: str) -> list[Recovered | Unreadable]:
        """How one request stands, by its entry."""
        found = await self._connection.entries(self._keys.requests, entry_id, entry_id)
        return await self.recall(found)

    async def recall(self, entries: Sequence[Entry]) -> list[Recovered | Unreadable]:
        """Where these requests stand; duplicates and those that have ended are left out."""
        read = [self._reader.request(entry) for entry in entries]
        arrived = [event for event in read if isinstance(event, Arrived)]
        accepted = await self._delivery.send([self._moves.recall(event) for event in arrived])
        living = [event for event, reply in zip(arrived, accepted, strict=True) if reply in (1, 2)]
        standings = await self._connection.hashes(
            [self._keys.request(event.request.id) for event in living], STANDING
        )
        prefilled = await self._prefilled(standings)
        recovered = [
            _recovered(
                event,
                standing,
                prefilled.get((standing[-1], standing[1])),
                was_unwanted=self.is_unwanted(event),
            )
            for event, standing in zip(living, standings, strict=True)
        ]
        return [*recovered, *(event for event in read if isinstance(event, Unreadable))]

    def is_unwanted(self, event: Arrived) -> bool:
        """Whether somebody asked to cancel it before this reign; what was asked of an earlier one of its id is over."""
        cancel = self._cancels.get(event.request.id)
        return cancel is not None and order(cancel) > order(event.entry)

    async def _prefilled(
        self, standings: Sequence[Sequence[bytes | None]]
    ) -> dict[tuple[bytes | None, bytes | None], Reward]:
        """What prefill legs said that have done their part and that nothing came after; by entry and attempt."""
        kept = [str(one[-1], "ascii") for one in standings if one[0] == b"waiting" and one[-1]]
        found = await self._connection.some(self._keys.rewards, kept)
        facts = [(entry, self._reader.fact(self._keys.rewards, entry)) for entry in found]
        return {
            (entry[0].encode(), str(fact.attempt).encode()): fact
            for entry, fact in facts
            if isinstance(fact, Reward)
        }


def saving(keys: Keys, epoch: int, saved: Saved) -> Call:
    """The fenced call that keeps a snapshot."""
    return dispatch.save(keys, epoch, msgspec.json.encode(saved))


def _recovered(
    event: Arrived,
    standing: Sequence[bytes | None],
    prefilled: Reward | None,
    *,
    was_unwanted: bool,
) -> Recovered:
    state, attempt, endpoint, epoch, cancelled, leg, handovers, _ = standing
    is_held = state in (b"assigned", b"running")
    return Recovered(
        request=event.request,
        entry=event.entry,
        enqueued_at=stamped_at(event.entry),
        attempt=int(attempt or 0),
        endpoint=(endpoint or b"").decode() if is_held else "",
        epoch=int(epoch or 0) if is_held else 0,
        leg=_LEGS.get(leg or b"", "whole"),
        handovers=int(handovers or 0),
        prefilled=prefilled,
        cancelled=bool(cancelled) or was_unwanted,
    )


def _is_cancel(event: Event | Unreadable) -> TypeGuard[Control]:
    """Whether it asks to end a request, which is known once that is claimed."""
    return isinstance(event, Control) and event.action == "cancel"
