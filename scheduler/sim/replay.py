"""The replayer: a recording through a fresh core, and the first thing that comes otherwise (I5).

The third driver of the core, beside the live loop and the lab's heap. What is read is told at the moments at which
it was told; each turn's commands are compared with the recorded ones as bytes, and field by field only to name what
differs. After the first difference the two lives part, so nothing behind it would say more.
"""

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import msgspec
import numpy as np

from scheduler import recording
from scheduler.core import CoreSettings, Scheduler
from scheduler.recording import Line

Plain: TypeAlias = dict[str, dict[str, Any]]
"A command as plain values, under its kind."


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """The first field that comes otherwise."""

    turn: int
    "Counted from 1."
    now: float
    "The core's time."
    field: str
    "Such as `command 3 (assign).job.prefill_s`."
    request: str
    "Whose, where a command says so."
    recorded: str
    replayed: str


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay found."""

    facts: int
    turns: int
    commands: int
    span_s: float
    "Between the first moment and the last."
    end: str
    "Why the recording ends: its own word, or empty where it was cut off."
    difference: Difference | None = None


def replayed(lines: Iterable[Line], settings: CoreSettings, *, seed: int) -> Outcome:
    """Tell a fresh core what is recorded, until it differs or the recording ends."""
    core = Scheduler(settings, np.random.default_rng(seed))
    facts = turns = commands = 0
    first_at, now, end = None, 0.0, ""
    difference = None
    for line in lines:
        event, was_decided = line.event, bytes(line.decided)
        if line.restored is not None:
            core.restore(line.restored)
        if event is not None or was_decided:
            now = line.now
            first_at = now if first_at is None else first_at
        if event is not None:
            facts += 1
            core.receive(event, now)
        elif was_decided:
            turns += 1
            found = recording.encode(recording.plain(core.decide(now))).rstrip()
            if found != was_decided:
                difference = _difference(was_decided, found, turns, now)
                break
            commands += len(recording.commands(found))
        elif line.end is not None:
            end = line.end
    return Outcome(
        facts=facts,
        turns=turns,
        commands=commands,
        span_s=now - (now if first_at is None else first_at),
        end=end,
        difference=difference,
    )


def _difference(recorded: bytes, found: bytes, turn: int, now: float) -> Difference:
    theirs: list[Plain] = msgspec.json.decode(recorded)
    ours: list[Plain] = msgspec.json.decode(found)
    for at, (old, new) in enumerate(zip(theirs, ours, strict=False)):
        apart = next(_apart(old, new, f"command {at + 1}"), None)
        if apart is not None:
            field, was, is_ = apart
            return Difference(
                turn=turn,
                now=now,
                field=field,
                request=_whose(old),
                recorded=_shown(was),
                replayed=_shown(is_),
            )
    at = min(len(theirs), len(ours))
    return Difference(
        turn=turn,
        now=now,
        field="number of commands",
        request=_whose((theirs[at:] + ours[at:])[0]),
        recorded=f"{len(theirs)}{_first(theirs[at:])}",
        replayed=f"{len(ours)}{_first(ours[at:])}",
    )


def _apart(old: object, new: object, place: str) -> Iterator[tuple[str, object, object]]:
    """Every leaf in which two plain values differ, in the order of the fields."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        for name in old:
            yield from _apart(old[name], new[name], f"{place}.{name}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for at, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _apart(one, other, f"{place}[{at}]")
    elif old != new or type(old) is not type(new):
        yield place, old, new


def _whose(command: Plain) -> str:
    """The request that a command is about."""
    [fields] = command.values()
    for part in (fields, *(fields.get(name) or {} for name in ("job", "decision", "result"))):
        if "id" in part:
            return str(part["id"])
    return ""


def _first(extra: list[Plain]) -> str:
    """The first of those that the other side lacks."""
    if not extra:
        return ""
    return f", among them {next(iter(extra[0]))} of {_whose(extra[0])}"


def _shown(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 120 else text[:117] + "..."
