"""What befell each endpoint of a recording, as faults of the lab: who came, went and came back, who was drained.

1. `_spells`   stretches in which it was heard from, in one epoch, without a silence longer than the lease
2. `_turns`    between two of them it dies and joins; before the first it is not there, after the last it is gone
3. `_drains`   a person's word, or its own, that it takes nothing new for a while

Who is away (its worker lives, its engine does not answer) takes nothing new; away for longer than the lease it has
lost what it held as well, unless a person had paused it.
"""

import itertools
from collections.abc import Iterator, Sequence

import msgspec

from scheduler.sim.fleet import Fault, FaultKind
from scheduler.sim.story import Story
from scheduler.wire.worker import Beat

AT_REST = frozenset({"paused", "asleep"})
"Why an engine is away that has lost nothing."

Move = tuple[float, FaultKind]
"When, unix seconds, and what."


class Spell(msgspec.Struct):
    """A stretch in which an endpoint was there; unix seconds."""

    epoch: int
    since: float
    until: float


def faults(found: Story, start_at: float, *, lease_s: float) -> tuple[Fault, ...]:
    """All of it, in order of time, in seconds of the run.

    Args:
        found: the recording.
        start_at: when the run begins, unix seconds.
        lease_s: the longest silence that is none.
    """
    told: list[Fault] = []
    for name in found.endpoints:
        spells = _spells(found, name, lease_s)
        moves = [*_turns(found, spells, start_at, lease_s), *_drains(found, name, start_at)]
        told += [
            Fault(at_s=max(0.0, at - start_at), endpoint=name, kind=kind) for at, kind in moves
        ]
    return tuple(sorted(told, key=lambda fault: (fault.at_s, fault.endpoint)))


def _spells(found: Story, name: str, lease_s: float) -> list[Spell]:
    beats, answers = found.beats.get(name, ()), found.answers.get(name, ())
    signs = [(at, beat.epoch) for at, beat in beats if _lives(beat)]
    signs += [(at, reward.epoch) for at, reward in answers]
    spells: list[Spell] = []
    for at, epoch in sorted(signs):
        last = spells[-1] if spells else None
        if last is None or epoch > last.epoch or _silence_s(found, last, at) > lease_s:
            spells.append(Spell(epoch, at, at))
        elif epoch == last.epoch:
            last.until = at
    return spells


def _turns(
    found: Story, spells: Sequence[Spell], start_at: float, lease_s: float
) -> Iterator[Move]:
    while len(spells) > 1 and spells[0].until < start_at:
        spells = spells[1:]  # a life before the first request
    if spells and spells[0].since > max(found.heard_since, start_at) + lease_s:
        yield spells[0].since, "join"
    for before, after in itertools.pairwise(spells):
        yield before.until, "die"
        yield after.since, "join"
    if spells and _silence_s(found, spells[-1], found.until) > lease_s:
        yield spells[-1].until, "die"


def _drains(found: Story, name: str, start_at: float) -> Iterator[Move]:
    said = [(at, 0, is_drained) for at, whom, is_drained in found.drains if whom == name]
    said += [(at, 1, beat.state != "ready") for at, beat in found.beats.get(name, ())]
    out, was_out = [False, False], False
    turns: list[Move] = []
    for at, who, is_out in sorted(said):
        out[who] = is_out
        if any(out) != was_out:
            was_out = any(out)
            turns.append((at, "drain" if was_out else "resume"))
    # Of what was before the first request only how it left things matters.
    before = [kind for at, kind in turns if at <= start_at]
    if before and before[-1] == "drain":
        yield start_at, "drain"
    yield from ((at, kind) for at, kind in turns if at > start_at)


def _lives(beat: Beat) -> bool:
    return beat.state != "away" or beat.reason in AT_REST


def _silence_s(found: Story, last: Spell, at: float) -> float:
    """Since it was last heard from, as far as silence says something."""
    return at - max(last.until, found.heard_since)
