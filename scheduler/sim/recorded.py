"""A recording as a stage of the lab: the same arrivals, and a fleet fitted from what the rewards measured.

1. `Story`      requests, rewards and beats of a recording, by whom they are about
2. `work`       arrivals with their promises; true lengths from rewards, the median where one never finished
3. `machines`   each endpoint's nearest profile, its prefill and its decode times as much slower as they were measured
4. `faults`     who fell silent, and who came later
5. `stage`      all of it as a `Lab`

What the fit does not know: how engines were set up beyond what beats say, and work that came from elsewhere.
"""

from collections.abc import Iterable

import msgspec
import numpy as np

from scheduler import slo
from scheduler.errors import SettingsError, WireError
from scheduler.prefix import BLOCK_TOKENS
from scheduler.recording import Line
from scheduler.sim import profile, refit
from scheduler.sim.arguments import EngineSettings
from scheduler.sim.fleet import Chance, Delays, Fault, Fleet, Machine
from scheduler.sim.lab import Lab
from scheduler.sim.promise import Promised
from scheduler.sim.workload import Arrival
from scheduler.slo import Objective, Promise
from scheduler.wire.client import Request
from scheduler.wire.worker import Beat, Reward

OUTPUT_TOKENS = 128
"The answer of a request in a recording where nobody finished."

BEAT_S = 0.5
"Beats that follow each other faster carry news of requests, which matters to nobody here."

STEP_NOISE = Chance().step_noise


class Story(msgspec.Struct, kw_only=True):
    """What a recording says, by whom it is about."""

    requests: dict[str, tuple[Request, float]] = {}
    "By id: as written, and when its promise's clock started."

    rewards: dict[str, Reward] = {}
    "By request: the attempt that completed it."

    beats: dict[str, list[tuple[float, Beat]]] = {}
    "By endpoint, oldest first; of each second and epoch one."

    since: float = 0.0
    until: float = 0.0


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What really became of the requests of a recording: to hold against the lab's figures."""

    n: int
    n_completed: int
    on_time: float
    "Of all, by the workers' own word; those without promise count where they completed."
    ttft_mean_s: float | None
    ttft_p99_s: float | None


def story(lines: Iterable[Line]) -> Story:
    """Read a recording to its end."""
    found = Story(requests={}, rewards={}, beats={})
    for line in lines:
        for beat in line.standing:
            _add_beat(found, beat, line.now)
        event = line.event
        if event is None:
            continue
        found.since = found.since or line.now
        found.until = line.now
        match event:
            case Beat():
                _add_beat(found, event, line.now)
            case Reward(outcome="completed"):
                found.rewards[event.id] = event
            case _ if (line.arrived or line.recovered) is not None:
                asked = line.arrived or line.recovered
                assert asked is not None
                found.requests.setdefault(asked.request.id, (asked.request, asked.enqueued_at))
            case _:
                pass
    return found


def stage(found: Story, objectives: dict[str, Objective], *, name: str, lease_s: float) -> Lab:
    """The recording as a lab.

    Raises:
        SettingsError: nobody asked, nobody served, several models were asked for, or prefill was parted from decode.
    """
    if not found.requests:
        raise SettingsError(f"{name}: holds no request, wanted at least one")
    models = sorted({request.model for request, _ in found.requests.values()})
    if len(models) > 1:
        raise SettingsError(
            f"{name}: holds requests for {len(models)} models ({', '.join(models)}), wanted one: "
            "the lab's endpoints all serve the same"
        )
    if not found.beats:
        raise SettingsError(f"{name}: holds no beat of any endpoint, wanted at least one")
    prefilling = [who for who, beats in found.beats.items() if "prefill" in beats[-1][1].roles]
    if prefilling:
        raise SettingsError(
            f"{name}: {', '.join(sorted(prefilling))} only prefill, wanted endpoints that serve whole requests: "
            "what a prompt and its answer took on two endpoints fits no single one"
        )
    start_at = min(at for _, at in found.requests.values())
    promised = work(found, objectives, start_at)
    if not promised.arrivals:
        known = ", ".join(sorted(objectives)) or "none"
        raise SettingsError(
            f"{name}: its requests name objectives that its settings do not know ({known}); "
            "copy it with the dispatcher's own --config"
        )
    return Lab(
        fleet=Fleet(
            name="recorded",
            endpoints=(),
            delays=Delays(lease_s=lease_s),
            faults=faults(found, start_at, lease_s=lease_s),
        ),
        work=promised,
        trace=name,
        machines=machines(found),
    )


def work(found: Story, objectives: dict[str, Objective], start_at: float) -> Promised:
    """The arrivals in order of time, the first at 0."""
    usual = _usual(reward.output_tokens for reward in found.rewards.values())
    lengths = _usual(reward.prompt_tokens for reward in found.rewards.values())
    sessions: dict[str, int] = {}
    blocks: dict[str, int] = {}
    rows, weights, names = [], [], []
    for request, enqueued_at in sorted(found.requests.values(), key=lambda one: one[1]):
        try:
            promise = slo.promise(request, enqueued_at, objectives)
        except WireError:
            continue  # it ended as invalid, and would again
        reward = found.rewards.get(request.id)
        rows.append(
            Arrival(
                at_s=enqueued_at - start_at,
                prompt_tokens=(reward.prompt_tokens if reward else 0)
                or slo.prompt_tokens(request, lengths),
                output_tokens=(reward.output_tokens if reward else 0) or usual,
                session=sessions.setdefault(request.session, len(sessions))
                if request.session
                else None,
                blocks=tuple(blocks.setdefault(block, len(blocks)) for block in request.blocks),
                block_tokens=BLOCK_TOKENS if request.blocks else 0,
                ttft_s=promise.ttft_s,
                tpot_s=promise.tpot_s,
                deadline_s=_left_s(promise, enqueued_at),
                priority=promise.priority,
                tenant=request.tenant,
            )
        )
        weights.append(promise.weight)
        names.append("" if promise.weight == 1.0 else f"weight-{promise.weight:g}")
    known = {
        name: Objective(weight=weight) for name, weight in zip(names, weights, strict=True) if name
    }
    return Promised(tuple(rows), tuple(weights), tuple(names), known)


def machines(found: Story) -> tuple[Machine, ...]:
    """Every endpoint that beat, as slow as it was measured; where that is not known, as others of its hardware."""
    by_endpoint: dict[str, list[Reward]] = {}
    for reward in found.rewards.values():
        by_endpoint.setdefault(reward.endpoint, []).append(reward)
    declared = [
        _declared(told[-1][1], at) for at, (_, told) in enumerate(sorted(found.beats.items()))
    ]
    fits = {one.name: refit.fit(one, by_endpoint.get(one.name, ())) for one in declared}
    made = []
    for one in declared:
        factors = fits[one.name]
        if factors is None:
            alike = [fits[other.name] for other in declared if other.hardware == one.hardware]
            factors = refit.middle([fit for fit in alike if fit is not None])
        made.append(refit.slowed(one, factors))
    return tuple(made)


def faults(found: Story, start_at: float, *, lease_s: float) -> tuple[Fault, ...]:
    """Who died, came back or came later, in seconds of the run."""
    told: list[Fault] = []
    for name, beats in sorted(found.beats.items()):
        ready = [(at, beat) for at, beat in beats if beat.state != "away"]
        if not ready:
            continue
        if ready[0][0] > max(found.since, start_at) + lease_s:
            told.append(Fault(at_s=ready[0][0] - start_at, endpoint=name, kind="join"))
        lives = list(zip(ready, [*ready[1:], (found.until, None)], strict=True))
        for (at, beat), (next_at, later) in lives:
            is_reborn = later is not None and later.epoch > beat.epoch
            if is_reborn or next_at - at > lease_s:
                told.append(Fault(at_s=max(0.0, at - start_at), endpoint=name, kind="die"))
                if later is not None:
                    told.append(
                        Fault(at_s=max(0.0, next_at - start_at), endpoint=name, kind="join")
                    )
    return tuple(sorted(told, key=lambda fault: (fault.at_s, fault.endpoint)))


def served(found: Story) -> Served:
    """What the recording's own requests got."""
    ttft = [
        r.ttft_s for i, r in found.rewards.items() if i in found.requests and r.ttft_s is not None
    ]
    kept = [r.on_time is not False for i, r in found.rewards.items() if i in found.requests]
    return Served(
        n=len(found.requests),
        n_completed=len(kept),
        on_time=sum(kept) / max(1, len(found.requests)),
        ttft_mean_s=float(np.mean(ttft)) if ttft else None,
        ttft_p99_s=float(np.quantile(ttft, 0.99)) if ttft else None,
    )


def _add_beat(found: Story, beat: Beat, now: float) -> None:
    beats = found.beats.setdefault(beat.endpoint, [])
    last = beats[-1] if beats else None
    if last is None:
        beats.append((now, beat))
    elif (last[1].epoch, last[1].state) == (beat.epoch, beat.state) and now - last[0] < BEAT_S:
        beats[-1] = (last[0], beat)
    elif beat.epoch >= last[1].epoch:
        beats.append((now, beat))


def _declared(beat: Beat, seed: int) -> Machine:
    """The endpoint as its beats describe it, with the profile of its hardware: the middle of the field where unknown."""
    plain = beat.hardware.lower().replace("nvidia", "").strip(" -_")
    known = [name for name in profile.ALIASES if plain.startswith(name)]
    nominal = profile.load(max(known, key=len) if known else "a100")
    return Machine(
        name=beat.endpoint,
        hardware=beat.hardware,
        nominal=nominal,
        actual=nominal,
        settings=_engine(beat),
        seed=seed,
    )


def _engine(beat: Beat) -> EngineSettings:
    usual = EngineSettings()
    return EngineSettings(
        max_num_seqs=max(1, min(beat.max_num_seqs, usual.max_num_batched_tokens)),
        block_size=beat.block_tokens or usual.block_size,
        kv_tokens=beat.kv_tokens or None,
        prefix_caching=not beat.no_prefix_cache,
        step_noise=STEP_NOISE,
    )


def _usual(lengths: Iterable[int]) -> int:
    known = [length for length in lengths if length > 0]
    return int(np.median(known)) if known else OUTPUT_TOKENS


def _left_s(promise: Promise, enqueued_at: float) -> float | None:
    return None if promise.deadline_at is None else promise.deadline_at - enqueued_at
