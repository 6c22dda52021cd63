"""A recording: all that one core was told, when, and what it asked for; the core's own language, a JSON line each.

    {"recording": 1, "version": "0.1.0", "pool": "chat", "seed": 7, "settings": {...}}
    {"restored": {...}}                                           what an earlier leader had learned
    {"now": 1731500000.123, "arrived": {...}, "body_bytes": 812}  a fact
    {"now": 1731500000.125, "decided": [{"assign": {...}}, ...]}  a turn, and every command of it
    {"end": "resigned"}                                           or "rolled": the reign's next part goes on

A later part begins with {"now": ..., "standing": [beats], "drained": [names]}, which tells nobody anything new.

With the same seed and settings a fresh core that is told the same at the same moments asks for the same, byte for
byte (I5). Bodies stay out, only their length is kept: the core never looks into one, and a log that people pass
around must not carry prompts. Numbers are written so that reading gives the same bits.

A copy of a pool's streams has the same shape without turns (`seed` is null), its decisions as `noted`: enough to
ask what other policies would have done, too little to repeat the core's own turns.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
from msgspec import structs

from scheduler import policies
from scheduler.core import CoreSettings
from scheduler.errors import UNREADABLE, HeadgateError, SettingsError
from scheduler.events import (
    Abort,
    Arrived,
    Assign,
    Command,
    Event,
    Finish,
    Forget,
    Note,
    Reclaim,
    Recovered,
    Refused,
)
from scheduler.policies import Policy
from scheduler.profile import profile
from scheduler.profile.parts import Part
from scheduler.view import Snapshot
from scheduler.wire.client import Control
from scheduler.wire.dispatcher import Decision, Job
from scheduler.wire.worker import Beat, Reward

FORMAT = 1

LINE_BYTES_MAX = 64 * 2**20
"The longest line read: a snapshot that remembers a thousand endpoints has some 100 KB."


class RecordingError(HeadgateError):
    """A file that is no recording, or a damaged one; the message names file and line."""

    def __init__(self, name: str, line: int, found: str) -> None:
        super().__init__(f"{name}, line {line}: {found}")


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The first line."""

    recording: int = FORMAT
    "The format's number."

    version: str
    "Of Headgate, when it was written."

    pool: str

    seed: int | None = None
    "Of the core's chance: the leader's epoch. None: a copy of streams, without turns."

    part: int = 0
    "Of its reign; the core's turns can be repeated from part 0 on."

    settings: dict[str, Any] = {}
    "The core's, as plain values; infinities as words, which JSON has not."


class Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Any further line: a moment and one of the rest."""

    now: float = 0.0
    "Unix seconds on Redis' clock, as the core was told."

    arrived: Arrived | None = None
    recovered: Recovered | None = None
    refused: Refused | None = None
    beat: Beat | None = None
    reward: Reward | None = None
    control: Control | None = None

    body_bytes: int = 0
    "The length of the body that was left out of `arrived` or `recovered`."

    decided: msgspec.Raw = msgspec.Raw()
    "A turn's commands, as they were written; `commands` reads them. Empty: no turn."

    noted: Decision | None = None
    "From a copy of the streams: a decision as it was logged."

    standing: tuple[Beat, ...] = ()
    "Where a later part begins: the last beat of each endpoint, told before."

    drained: tuple[str, ...] = ()
    "With it: the endpoints that people had drained."

    restored: Snapshot | None = None
    end: str | None = None
    "Why nothing follows: `resigned`, `rolled` or `copied`."

    @property
    def event(self) -> Event | None:
        """The fact that was told, its body as long as it was."""
        asked = self.arrived or self.recovered
        if asked is not None:
            return _with_body(asked, bytes(self.body_bytes))
        return self.refused or self.beat or self.reward or self.control


class _Assigned(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An `Assign` with its decision made out."""

    endpoint: str
    job: Job
    decision: Decision

    @property
    def command(self) -> Assign:
        return Assign(endpoint=self.endpoint, job=self.job, explain=lambda: self.decision)


class _Recorded(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One command of a turn: exactly one is there."""

    assign: _Assigned | None = None
    reclaim: Reclaim | None = None
    finish: Finish | None = None
    abort: Abort | None = None
    forget: Forget | None = None
    note: Note | None = None


_NAMES: dict[type, str] = {
    kind: kind.__name__.lower()
    for kind in (
        *(Arrived, Recovered, Refused, Beat, Reward, Control),
        *(Assign, Reclaim, Finish, Abort, Forget, Note),
    )
}
# numpy's scalars are no floats to msgspec; `item` makes them what they are.
ENCODER = msgspec.json.Encoder(enc_hook=lambda value: value.item())
"Writes lines, without their ends."

_HEAD, _LINE = msgspec.json.Decoder(Head), msgspec.json.Decoder(Line)
_COMMANDS = msgspec.json.Decoder(list[_Recorded])


# Writing


def head(settings: CoreSettings, *, seed: int | None, version: str, pool: str) -> Head:
    """The first line of a core's recording."""
    return Head(
        version=version,
        pool=pool,
        seed=seed,
        settings=_worded(msgspec.to_builtins(settings)),
    )


def encode(line: object) -> bytes:
    """One line, with its end."""
    return ENCODER.encode(line) + b"\n"


def told(event: Event, now: float) -> dict[str, object]:
    """The line of a fact."""
    line: dict[str, object] = {"now": now, _NAMES[type(event)]: event}
    if isinstance(event, Arrived | Recovered) and event.request.body:
        line[_NAMES[type(event)]] = _with_body(event, b"")
        line["body_bytes"] = len(event.request.body)
    return line


def decided(commands: Sequence[Command], now: float) -> dict[str, object]:
    """The line of a turn."""
    return {"now": now, "decided": plain(commands)}


def plain(commands: Sequence[Command]) -> list[dict[str, object]]:
    """Commands as a turn's line holds them, without bodies."""
    return [{_NAMES[type(command)]: _bare(command)} for command in commands]


# Reading


def read(lines: Iterable[tuple[int, bytes]], *, name: str) -> tuple[Head, Iterator[Line]]:
    """The head, and the rest as it is asked for.

    Args:
        lines: numbered, without their ends; the last one may be cut short.
        name: what error messages call the file.

    Raises:
        RecordingError: the first line is no head of ours (at once), or a later one is no line (when it is reached).
    """
    numbered = iter(lines)
    number, first = next(numbered, (1, b""))
    try:
        found = _HEAD.decode(first)
    except UNREADABLE as error:
        raise RecordingError(
            name,
            number,
            f'{_shown(first)} is no recording ({error}), wanted {{"recording": 1, ...}}',
        ) from None
    if found.recording != FORMAT:
        raise RecordingError(name, number, f"format is {found.recording}, wanted {FORMAT}")
    return found, _rest(numbered, name)


def settings(
    head: Head,
    changes: Sequence[str] = (),
    *,
    plug_ins: Sequence[type[Policy] | type[Part]] = (),
) -> CoreSettings:
    """The core's settings of a recording, with changes such as `plan.tie=0.1`; policy and parts may be plug-ins.

    Raises:
        SettingsError: a change names no setting or no value of it; or the recording holds none that we know.
    """
    values = msgspec.json.decode(msgspec.json.encode(head.settings))
    for change in changes:
        _change(values, change)
    try:
        kinds = policies.union(tuple(kind for kind in plug_ins if issubclass(kind, Policy)))
        policy = msgspec.convert(values.pop("policy", {}), kinds, strict=False)
        parts = [kind for kind in plug_ins if issubclass(kind, Part)]
        table = values.pop("profile", None) if parts else None
        found = msgspec.convert(values, CoreSettings, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(f"settings of the recording by {head.version}: {error}") from None
    if table is not None:
        found = structs.replace(found, profile=profile.decode(table, parts))
    return structs.replace(found, policy=policy)


def commands(raw: bytes) -> list[Command]:
    """The commands of a turn's line."""
    found = [
        next(value for value in structs.astuple(one) if value is not None)
        for one in _COMMANDS.decode(raw)
    ]
    return [one.command if isinstance(one, _Assigned) else one for one in found]


def _rest(numbered: Iterator[tuple[int, bytes]], name: str) -> Iterator[Line]:
    for number, text in numbered:
        try:
            yield _LINE.decode(text)
        except UNREADABLE as error:
            raise RecordingError(name, number, f"{_shown(text)}: {error}") from None


def _change(values: dict[str, Any], change: str) -> None:
    path, _, value = change.partition("=")
    *tables, field = path.split(".")
    table = values
    for part in tables:
        table = table.get(part, {}) if isinstance(table, dict) else {}
    if field not in table or isinstance(table[field], dict):
        known = ", ".join(sorted(_paths(values)))
        raise SettingsError(
            f"change {change!r} names no setting of the recording, wanted one of: {known}"
        )
    table[field] = value


def _paths(values: dict[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from (f"{name}.{inner}" for inner in _paths(value))
        else:
            yield name


def _bare(command: Command) -> object:
    """The command without its body, all of it made out."""
    if isinstance(command, Assign):
        job = structs.replace(command.job, body=b"") if command.job.body else command.job
        return _Assigned(endpoint=command.endpoint, job=job, decision=command.decision)
    if isinstance(command, Finish) and command.request is not None and command.request.body:
        return structs.replace(command, request=structs.replace(command.request, body=b""))
    return command


def _with_body(event: Arrived | Recovered, body: bytes) -> Arrived | Recovered:
    return structs.replace(event, request=structs.replace(event.request, body=body))


def _worded(value: Any) -> Any:  # noqa: ANN401  plain values of any depth
    """Plain values with infinities as words."""
    if isinstance(value, dict):
        return {key: _worded(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _shown(text: bytes) -> str:
    return repr(text[:80].decode("utf-8", "replace"))
