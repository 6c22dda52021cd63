"""What a recording says, by whom it is about: requests, rewards, and each endpoint's signs of life."""

from collections.abc import Iterable

import msgspec
from msgspec import structs

from scheduler import slo
from scheduler.events import Arrived, Event, Recovered, Refused
from scheduler.recording import Line
from scheduler.wire.client import Control, Request
from scheduler.wire.worker import Beat, Reward

BEAT_S = 0.5
"Beats that follow each other faster carry news of requests, which matters to nobody here."

Asked = Arrived | Recovered


class Story(msgspec.Struct, kw_only=True):
    """What a recording says, by whom it is about."""

    requests: dict[str, Asked] = {}
    "By id, without bodies."

    cancelled: dict[str, float] = {}
    "When the clients of some of these gave up, unix seconds."

    rewards: dict[str, Reward] = {}
    "By request: the attempt that completed it."

    broken_off: dict[str, Reward] = {}
    "By request: the attempt that was cancelled, as far as it had come."

    prefills: dict[str, Reward] = {}
    "By request: the leg that computed its prompt for another endpoint."

    beats: dict[str, list[tuple[float, Beat]]] = {}
    "By endpoint, oldest first; of each second, epoch and state one."

    models: dict[str, dict[str, None]] = {}
    "By endpoint, all that it ever served."

    answers: dict[str, list[tuple[float, Reward]]] = {}
    "By endpoint, what its engine brought to an end and when; of each second and epoch one."

    drains: list[tuple[float, str, bool]] = []
    "When a person drained whom, or (False) let it work again."

    since: float = 0.0
    until: float = 0.0

    heard_since: float = 0.0
    "From then on silence says something: of a copy, whose beats are cut sooner than the rest, its first beat."

    @property
    def endpoints(self) -> list[str]:
        """Everyone who was there, by name."""
        return sorted({*self.beats, *self.answers})

    @property
    def ended(self) -> list[tuple[Request, Reward]]:
        """Each request that was completed, and what that took."""
        known = self.requests
        return [
            (known[one].request, reward) for one, reward in self.rewards.items() if one in known
        ]

    def cached_tokens(self, request_id: str) -> int:
        """How much of a prompt its engine found in its cache; 0 where it did not say."""
        reward = self.rewards.get(request_id)
        if reward is not None and reward.leg == "decode":
            reward = self.prefills.get(request_id)
        return (reward.cached_tokens or 0) if reward is not None else 0


def read(lines: Iterable[Line], *, is_copy: bool = False) -> Story:
    """A recording to its end; `is_copy`: of a pool's streams, not a reign's own."""
    found = Story()
    for line in lines:
        for beat in line.standing:
            _beat(found, beat, line.now)
        before = line.drained if line.restored is None else line.restored.drained
        found.drains += [(0.0, name, True) for name in before]
        event = line.event
        if event is None:
            continue
        if not isinstance(event, Control):  # some of a copy are older than all else in it
            found.since = found.since or line.now
        found.until = line.now
        _take(found, event, line.now)
    if not is_copy:
        found.heard_since = found.since
    return found


def _take(found: Story, event: Event, now: float) -> None:
    match event:
        case Beat():
            _beat(found, event, now)
        case Reward():
            _reward(found, event, now)
        case Arrived() | Recovered():
            found.requests.setdefault(event.request.id, _slim(event))
            if isinstance(event, Recovered) and event.cancelled:
                found.cancelled.setdefault(event.request.id, now)
        case Control(action="cancel"):
            found.cancelled.setdefault(event.id, now)
        case Control():
            found.drains.append((now, event.endpoint, event.action == "drain"))
        case Refused():
            _refused(found, event)


def _beat(found: Story, beat: Beat, now: float) -> None:
    found.heard_since = found.heard_since or now
    found.models.setdefault(beat.endpoint, {}).update(dict.fromkeys(beat.models))
    beats = found.beats.setdefault(beat.endpoint, [])
    last = beats[-1] if beats else None
    if last is None:
        beats.append((now, beat))
    elif (last[1].epoch, last[1].state) == (beat.epoch, beat.state) and now - last[0] < BEAT_S:
        beats[-1] = (last[0], beat)
    elif beat.epoch >= last[1].epoch:
        beats.append((now, beat))


def _reward(found: Story, reward: Reward, now: float) -> None:
    if reward.outcome == "completed":
        found.rewards[reward.id] = reward
    elif reward.outcome == "prefilled":
        found.prefills[reward.id] = reward
    else:
        if reward.outcome == "cancelled":
            found.broken_off[reward.id] = reward
        return
    at = min(now, reward.finished_at or now)  # at a takeover it is told late
    answers = found.answers.setdefault(reward.endpoint, [])
    if not answers or at - answers[-1][0] >= BEAT_S or answers[-1][1].epoch != reward.epoch:
        answers.append((at, reward))


def _refused(found: Story, refused: Refused) -> None:
    """A repetition of what had ended before was never served again."""
    asked = found.requests.get(refused.id)
    if asked is not None and asked.entry == refused.entry and refused.id not in found.rewards:
        del found.requests[refused.id]


def _slim(asked: Asked) -> Asked:
    """Without the body, which is as long as it was and empty; what its length says of the prompt is kept."""
    request = asked.request
    if not request.body:
        return asked
    guessed = {} if request.prompt_tokens is not None else _guess(asked)
    return structs.replace(asked, request=structs.replace(request, body=b"", **guessed))


def _guess(asked: Asked) -> dict[str, object]:
    return {"prompt_tokens": slo.prompt_tokens(asked.request, 1), "prompt_estimated": True}
