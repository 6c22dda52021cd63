"""What was read from Redis, as events for the core; what cannot be read, as the record its writer gets.

Pure: entries in, facts out. Nothing is dropped: every entry comes out as an event or as `Unreadable`.
"""

from typing import get_args

import msgspec

from dispatcher.streams.connection import Entry
from scheduler import codec, servable
from scheduler.errors import WireError
from scheduler.events import Arrived, Event, Finish
from scheduler.keys import Keys
from scheduler.wire.client import Control, Request
from scheduler.wire.dispatcher import Dead
from scheduler.wire.words import ENDPOINT_PATTERN, ID_PATTERN, Outcome
from scheduler.wire.worker import Beat, Result, Reward

FIELDS_KEPT = 128
"Of an entry that cannot be read, so many fields go to `dead`; more could not pass through one XADD in Lua."

ENDS = (*get_args(Outcome), "returned", "prefilled")
"Of an attempt: each is counted, and strange ones would be counted without end."

AMOUNTS = tuple(field.name for field in msgspec.structs.fields(Beat) if field.type in (int, float))
"Of a beat: the core counts with them, and none can be less than nothing."


class Unreadable(msgspec.Struct, frozen=True):
    """An entry that breaks the wire's rules."""

    stream: str
    entry: str
    fields: dict[bytes, bytes]
    "As they were."
    reason: str


class Intake:
    """Reads the entries of one pool."""

    def __init__(self, keys: Keys, *, body_bytes: int) -> None:
        """`body_bytes` is the longest body accepted."""
        self._keys = keys
        self._body_bytes = body_bytes
        self._kinds: dict[str, type[Beat | Reward | Control]] = {
            keys.rewards: Reward,
            keys.beats: Beat,
            keys.controls: Control,
        }

    def request(self, entry: Entry) -> Arrived | Unreadable:
        """An entry of `requests`. Its id is the client's, else the entry's own."""
        entry_id, fields = entry
        try:
            request = codec.decode(Request, fields)
            if not request.id:
                request = msgspec.structs.replace(request, id=entry_id)
            servable.check(
                request, body_bytes=self._body_bytes, reply_root=self._keys.results + ":"
            )
        except WireError as error:
            return Unreadable(self._keys.requests, entry_id, fields, str(error))
        return Arrived(request=request, entry=entry_id, enqueued_at=stamped_at(entry_id))

    def fact(self, stream: str, entry: Entry) -> Event | Unreadable:
        """An entry of `rewards`, `beats` or `controls`."""
        entry_id, fields = entry
        try:
            fact = codec.decode(self._kinds[stream], fields)
            if isinstance(fact, Beat):
                _check_beat(fact)
            elif isinstance(fact, Reward):
                _check_reward(fact)
            else:
                _check_control(fact)
        except WireError as error:
            return Unreadable(stream, entry_id, fields, str(error))
        return fact

    def refusal(self, unreadable: Unreadable, now: float) -> Finish:
        """The terminal record of an unreadable request, sent where its client looks if that can be made out."""
        fields = unreadable.fields
        said = fields.get(b"id", b"").decode(errors="replace")
        reply_to = fields.get(b"reply_to", b"").decode(errors="replace")
        return Finish(
            entry=unreadable.entry,
            reply_to=reply_to if reply_to.startswith(self._keys.results + ":") else "",
            result=Result(
                id=said if ID_PATTERN.fullmatch(said) else unreadable.entry,
                outcome="invalid",
                reason=unreadable.reason,
                enqueued_at=stamped_at(unreadable.entry),
                finished_at=now,
            ),
            is_dead=True,
        )


def _check_reward(reward: Reward) -> None:
    if reward.outcome not in ENDS:
        raise WireError(
            f"field 'outcome' is {reward.outcome[:60]!r}, wanted one of {', '.join(ENDS)}"
        )


def _check_control(control: Control) -> None:
    field = "id" if control.action == "cancel" else "endpoint"
    if not getattr(control, field):
        raise WireError(f"field {field!r} is missing, wanted whom to {control.action}")


def _check_beat(beat: Beat) -> None:
    """Refuse an endpoint that nobody could name in a list of words, and amounts that are none.

    Raises:
        WireError: names the field, the value found and the value wanted.
    """
    if not ENDPOINT_PATTERN.fullmatch(beat.endpoint):
        raise WireError(
            f"field 'endpoint' is {beat.endpoint[:60]!r}, wanted 1 to 128 characters, none a space or ="
        )
    for name in AMOUNTS:
        if (amount := getattr(beat, name)) < 0:
            said = codec.milliseconds(amount) if name.endswith("_s") else f"{amount:g}"
            raise WireError(f"field {codec.wire_name(name)!r} is {said}, wanted 0 or more")


def stamped_at(entry_id: str) -> float:
    """The moment in an entry's id, unix seconds.

    >>> stamped_at("1731500000123-4")
    1731500000.123
    """
    return int(entry_id.partition("-")[0]) / 1e3


def order(entry_id: str) -> tuple[int, int]:
    """What sorts entries by when they were written.

    >>> max(("1731500000123-9", "1731500000123-10"), key=order)
    '1731500000123-10'
    """
    moment, _, number = entry_id.partition("-")
    return int(moment), int(number)


def kept_fields(unreadable: Unreadable) -> dict[str, str | bytes]:
    """The entry's own fields, for `dead`."""
    first = list(unreadable.fields.items())[:FIELDS_KEPT]
    return {name.decode(errors="replace") or "?": value for name, value in first}


def dead(unreadable: Unreadable) -> dict[str, str | bytes]:
    """The record in `dead` of an entry that nobody waits for."""
    head = Dead(
        dead_stream=unreadable.stream,
        dead_entry=unreadable.entry,
        dead_reason=unreadable.reason,
        dead_outcome="",
    )
    return {**codec.encode(head), **kept_fields(unreadable)}
