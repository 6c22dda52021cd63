"""A pool at one glance, made from what lies in Redis alone, so that it works while every other role is down."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median

import msgspec

from dispatcher.recovery import CONTROLS_KEPT, Saved
from dispatcher.streams.connection import Connection
from scheduler import codec, forecast
from scheduler.errors import UNREADABLE
from scheduler.keys import DISPATCHER_GROUP, Keys
from scheduler.view import Believed, EndpointView
from scheduler.wire.client import Control
from scheduler.wire.dispatcher import Decision
from scheduler.wire.worker import Beat, Reward

BEATS_READ = 3000
"The newest beats, to learn the endpoints' names: 10 s of 300 endpoints."

REWARDS_READ = 1000
DECISIONS_READ = 3000
"The newest rewards and decisions, from which the counts and errors are made."

OVERLAP_S = 10.0
"Controls so much older than the snapshot may have been read after it; said twice they are the same."

RATE_OVER_S = 60.0
"The stretch over which the present rate of completions is measured."


class EndpointGlance(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint."""

    beat: Beat
    silent_s: float
    "Since its last beat."

    is_alive: bool
    "Its lease has not run out."

    jobs: int
    "Assigned or running there: what the ledger holds."

    prediction_error: float | None
    "Median of |predicted - real| / real time to the first token, over its newest rewards."

    on_time: float | None
    "Share of its newest promised requests that were on time."

    within_q50: float | None = None
    within_q90: float | None = None
    "Share of its newest first tokens that came no later than these quantiles had said; None: none was predicted."

    is_drained: bool = False
    "Somebody asked that it get no new work, and nobody has resumed it."

    speed: float | None = None
    "Times its declared hardware's time, as learned; this and the rest as of the last snapshot, None without one."

    believed: Believed | None = None
    "What plans go by: `learned`, or `prior`, its declared hardware, where what was learned was worse."

    switches: int | None = None
    "How often that has changed."


class PoolGlance(msgspec.Struct, frozen=True, kw_only=True):
    """One pool."""

    at: float
    leader: str
    "Who leads; empty when nobody does."

    leader_epoch: int
    lease_s: float
    "What is left of the leader's lease."

    unread: int
    "Entries that no dispatcher has read."

    waiting: int
    "Without an endpoint, those set aside included."

    set_aside: int
    "Cannot make it on the present prediction."

    prefilled: int
    "Of those that wait, between two legs: their prompts are computed."

    assigned: int
    "Handed over, running or not."

    running: int
    "Of these, in an engine's batch as the workers last saw it."

    oldest_s: float | None
    "Age of the oldest that has not ended; None when there is none."

    backlog_s: float | None
    "How long the waiting would take at the present rate of completions; None while none complete."

    completed_per_s: float
    outcomes: dict[str, int]
    "Of the newest rewards and of what the dispatcher ended itself."

    dead: int
    drained: list[str]
    "Endpoints that somebody drained and nobody resumed, here or not."

    endpoints: list[EndpointGlance]
    within_q50: float | None = None
    within_q90: float | None = None
    "As for an endpoint, over all."


async def pool(connection: Connection, keys: Keys) -> PoolGlance:
    """The pool as it stands."""
    beaten_at = await _beaten_at(connection, keys)
    names = sorted(beaten_at)
    await connection.refresh_clock()
    now = connection.now()
    leader, waiting, dead, is_there, saved, *rest = await connection.commands(
        [
            ("HMGET", keys.leader, "node", "epoch", "until"),
            ("ZCARD", keys.waiting),
            ("XLEN", keys.dead),
            ("EXISTS", keys.requests),
            ("GET", keys.snapshot),
            *(("XLEN", keys.jobs(name)) for name in names),
            *(("HGETALL", keys.endpoint(name)) for name in names),
        ]
    )
    unread, oldest_at = await _ingress(connection, keys) if is_there else (0, None)
    rewards = codec.readable(
        Reward, await connection.newest(keys.rewards, after="0", count=REWARDS_READ)
    )
    decisions = codec.readable(
        Decision, await connection.newest(keys.decisions, after="0", count=DECISIONS_READ)
    )
    last = _read(saved)
    learned = {view.name: view for view in last.core.endpoints} if last else {}
    drained = await _drained(connection, keys, last)
    endpoints = [
        _endpoint(
            raw,
            beat,
            int(jobs),
            rewards,
            silent_s=now - beaten_at[name],
            is_drained=name in drained,
            learned=learned.get(name),
        )
        for name, jobs, raw in zip(names, rest[: len(names)], rest[len(names) :], strict=True)
        for beat in codec.readable(Beat, [(name, raw)])
    ]
    rate = _rate(rewards, now)
    until = int(leader[2] or 0) / 1e3
    return PoolGlance(
        at=now,
        leader=leader[0].decode() if leader[0] and until > now else "",
        leader_epoch=int(leader[1] or 0),
        lease_s=max(0.0, until - now),
        unread=unread,
        waiting=int(waiting),
        set_aside=min(int(waiting), _latest(decisions, "set_aside")),
        prefilled=min(int(waiting), _latest(decisions, "prefilled")),
        assigned=sum(e.jobs for e in endpoints),
        running=sum(e.beat.running for e in endpoints if e.is_alive),
        oldest_s=None if oldest_at is None else now - oldest_at,
        backlog_s=waiting / rate if rate else None,
        completed_per_s=rate,
        outcomes=_outcomes(rewards, decisions),
        dead=int(dead),
        drained=sorted(drained),
        endpoints=sorted(endpoints, key=lambda e: e.beat.endpoint),
        **_within(rewards),
    )


async def _beaten_at(connection: Connection, keys: Keys) -> dict[str, float]:
    """When each endpoint has beaten last, on Redis' clock."""
    beats = await connection.newest(keys.beats, after="0", count=BEATS_READ)
    read = ((_entry_at(entry), codec.readable(Beat, [(entry, fields)])) for entry, fields in beats)
    return {beat.endpoint: at for at, found in read for beat in found}


async def _ingress(connection: Connection, keys: Keys) -> tuple[int, float | None]:
    """Entries nobody has read, and when the oldest that has not ended came."""
    groups = await connection.command("XINFO GROUPS", keys.requests)
    group = next((g for g in groups if g["name"] == DISPATCHER_GROUP.encode()), None)
    if group is None:
        oldest = await connection.entries(keys.requests, count=1)
        unread = int(await connection.command("XLEN", keys.requests))
        return unread, _entry_at(oldest[0][0]) if oldest else None
    summary = await connection.command("XPENDING", keys.requests, DISPATCHER_GROUP)
    pending = summary["min"]
    if pending:
        return int(group["lag"] or 0), _entry_at(pending.decode())
    last = group["last-delivered-id"].decode()
    newer = await connection.entries(keys.requests, f"({last}", count=1)
    return int(group["lag"] or 0), _entry_at(newer[0][0]) if newer else None


def _entry_at(entry: str) -> float:
    return int(entry.partition("-")[0]) / 1e3


def _endpoint(
    raw: Mapping[bytes, bytes],
    beat: Beat,
    jobs: int,
    rewards: Sequence[Reward],
    *,
    silent_s: float,
    is_drained: bool,
    learned: EndpointView | None,
) -> EndpointGlance:
    lease_s = float(raw.get(b"seen_lease_ms") or 3000) / 1e3
    own = [r for r in rewards if r.endpoint == beat.endpoint]
    promised = [r.on_time for r in own if r.on_time is not None]
    return EndpointGlance(
        beat=beat,
        silent_s=max(0.0, silent_s),
        is_alive=silent_s < lease_s,
        is_drained=is_drained,
        jobs=jobs,
        prediction_error=error(own),
        on_time=sum(promised) / len(promised) if promised else None,
        **_within(own),
        speed=learned.speed if learned else None,
        believed=learned.believed if learned else None,
        switches=learned.switches if learned else None,
    )


def _within(rewards: Sequence[Reward]) -> dict[str, float]:
    """What part of these first tokens each quantile had covered; nothing where none was predicted."""
    seen = [found.covered for found in map(forecast.read, rewards) if found and found.covered]
    if not seen:
        return {}
    shares = [sum(column) / len(seen) for column in zip(*seen, strict=True)]
    return {
        f"within_q{part * 100:g}": share for part, share in zip(forecast.PARTS, shares, strict=True)
    }


def _read(saved: bytes | None) -> Saved | None:
    """The leader's last snapshot; None where there is none that can be read."""
    try:
        return msgspec.json.decode(saved or b"", type=Saved)
    except UNREADABLE:
        return None


async def _drained(connection: Connection, keys: Keys, last: Saved | None) -> set[str]:
    """Whom people have drained: as the last snapshot has it, and by the controls that may not be in it."""
    found = set(last.core.drained) if last else set()
    after = f"{round((last.at - OVERLAP_S) * 1e3)}-0" if last else "0-0"
    controls = await connection.newest(keys.controls, after=after, count=CONTROLS_KEPT)
    for control in codec.readable(Control, controls):
        if control.action == "drain":
            found.add(control.endpoint)
        elif control.action == "resume":
            found.discard(control.endpoint)
    return found


def error(rewards: Sequence[Reward]) -> float | None:
    """Median of |predicted - real| / real time from decision to first token; None where nothing is known.

    >>> error([Reward(id="r", endpoint="e", epoch=1, attempt=1, outcome="completed",
    ...     decided_at=10.0, first_token_at=12.0, predicted_s=1.5)])
    0.25
    """
    errors = []
    for r in rewards:
        if r.first_token_at is None or r.decided_at is None or not r.predicted_s:
            continue
        real_s = r.first_token_at - r.decided_at
        if real_s > 0:
            errors.append(abs(r.predicted_s - real_s) / real_s)
    return median(errors) if errors else None


def _rate(rewards: Sequence[Reward], now: float) -> float:
    """Completions a second over the last minute, or over what the newest rewards span of it."""
    ends = [r.finished_at for r in rewards if r.finished_at and r.finished_at > now - RATE_OVER_S]
    if len(ends) < 2:
        return 0.0
    span_s = now - min(ends)
    return len(ends) / span_s if span_s > 0 else 0.0


def _latest(decisions: Sequence[Decision], wanted: str) -> int:
    """Requests of which this was decided last."""
    latest = {d.id: d.kind for d in decisions}
    return sum(kind == wanted for kind in latest.values())


def _outcomes(rewards: Sequence[Reward], decisions: Sequence[Decision]) -> dict[str, int]:
    """Ends by outcome; the dispatcher's own ends are told in its decisions' first word."""
    counts = Counter(r.outcome for r in rewards)
    ended = {r.id for r in rewards if r.outcome not in ("returned", "prefilled")}
    counts.update(
        d.reason.partition(":")[0].partition(" ")[0] or "finished"
        for d in decisions
        if d.kind == "finished" and d.id not in ended
    )
    return dict(counts.most_common())
