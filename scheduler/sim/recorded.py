"""A recording as a stage of the lab: the same arrivals, and a fleet fitted from what the rewards measured.

1. `story.read`     requests, rewards and beats of a recording, by whom they are about
2. `asked.work`     arrivals with their promises; true lengths from rewards, the median where one never finished
3. `machines`       each endpoint's nearest profile, its prefill and its decode times as much slower as they were measured
4. `lives.faults`   who fell silent, came later, was drained
5. `stage`          all of it as a `Lab`

What the fit does not know: how engines were set up beyond what beats say, and work that came from elsewhere. What the
lab plays otherwise than it was, `cautions` says.
"""

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from msgspec import structs

from scheduler.core import CoreSettings
from scheduler.errors import SettingsError
from scheduler.sim import alike, asked, declared, lives, refit
from scheduler.sim.fleet import Delays, Fleet, Machine
from scheduler.sim.lab import Lab
from scheduler.sim.refit import Factors
from scheduler.sim.story import Story
from scheduler.wire.worker import Beat, Reward


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What really became of the requests of a recording: to hold against the lab's figures."""

    n: int
    n_completed: int
    n_cancelled: int
    "Whose clients gave up before they were completed; of these nothing else is said, as in the lab's reports."
    on_time: float
    "Of all others, by the workers' own word; those without promise count where they completed."
    ttft_mean_s: float | None
    ttft_p99_s: float | None
    cache_hit: float
    "Share of the completed prompts' tokens found in a prefix cache."


def stage(found: Story, settings: CoreSettings, *, name: str) -> Lab:
    """The recording as a lab.

    Args:
        found: what it says.
        settings: of the core that was recorded.
        name: what reports call it.

    Raises:
        SettingsError: nobody asked or nobody served.
    """
    if not found.requests:
        raise SettingsError(f"{name}: holds no request, wanted at least one")
    if not found.beats:
        raise SettingsError(f"{name}: holds no beat of any endpoint, wanted at least one")
    made = machines(found)
    if not any(machine.decodes for machine in made):
        roles = ", ".join(f"{b.endpoint} {'+'.join(b.roles)}" for b in _newest(found))
        raise SettingsError(f"{name}: nobody in it decodes ({roles}), wanted an endpoint that does")
    start_at = min(one.enqueued_at for one in found.requests.values())
    promised = asked.work(found, settings.objectives, start_at)
    if not promised.arrivals:
        known = ", ".join(sorted(settings.objectives)) or "none"
        raise SettingsError(
            f"{name}: its requests name objectives that its settings do not know ({known}); "
            "copy it with the dispatcher's own --config"
        )
    names = {machine.name for machine in made}
    befell = lives.faults(found, start_at, lease_s=settings.lease_s)
    return Lab(
        fleet=Fleet(
            name="recorded",
            endpoints=(),
            delays=Delays(lease_s=settings.lease_s),
            faults=tuple(fault for fault in befell if fault.endpoint in names),
        ),
        work=structs.replace(promised, tenants=dict(settings.fairness.weights)),
        trace=name,
        machines=made,
        core=settings,
    )


def machines(found: Story) -> tuple[Machine, ...]:
    """Every endpoint that could be given work, as slow as it was measured; where that is not known, as others of its hardware."""
    by_endpoint: dict[str, list[Reward]] = {}
    for reward in (*found.rewards.values(), *found.prefills.values()):
        by_endpoint.setdefault(reward.endpoint, []).append(reward)
    said = [declared.machine(beat, seed) for seed, beat in enumerate(_newest(found))]
    made = [machine for machine in said if machine is not None]
    fits = {one.name: refit.fit(one, by_endpoint.get(one.name, ())) for one in made}
    return tuple(
        refit.slowed(one, refit.filled(fits[one.name], _alike(one, made, fits))) for one in made
    )


def served(found: Story) -> Served:
    """What the recording's own requests got."""
    ends = [reward for _, reward in found.ended]
    n_cancelled = sum(one in found.requests and one not in found.rewards for one in found.cancelled)
    ttft = [reward.ttft_s for reward in ends if reward.ttft_s is not None]
    return Served(
        n=len(found.requests),
        n_completed=len(ends),
        n_cancelled=n_cancelled,
        on_time=sum(reward.on_time is not False for reward in ends)
        / max(1, len(found.requests) - n_cancelled),
        ttft_mean_s=float(np.mean(ttft)) if ttft else None,
        ttft_p99_s=float(np.quantile(ttft, 0.99)) if ttft else None,
        cache_hit=_cache_hit(found),
    )


def cautions(found: Story, made: Sequence[Machine]) -> Iterator[str]:
    """What the lab plays otherwise than it was, each in a sentence that names and counts it.

    Args:
        found: the recording.
        made: the endpoints of its stage.
    """
    n_gave_up = sum(one in found.requests and one not in found.rewards for one in found.cancelled)
    if n_gave_up:
        yield (
            f"{n_gave_up} requests were cancelled; here they are as long after their enqueue, and how long their "
            "answers would have been is a guess"
        )
    n_cold = alike.n_cold(found)
    if n_cold:
        yield f"{n_cold} requests found a prefix in a cache, and name neither blocks nor a session: here they find none"
    changed = [
        name
        for name, models in found.models.items()
        if len(models) > len(_last(found.beats[name]).models)
    ]
    if changed:
        yield f"{', '.join(changed)} did not serve the same models at all times: here they serve all of them"
    idle = sorted({*found.endpoints} - {one.name for one in made})
    if idle:
        yield f"{', '.join(idle)} neither decode nor hand KV over a link, and are left out"


def _alike(one: Machine, made: Sequence[Machine], fits: dict[str, Factors | None]) -> list[Factors]:
    """What was measured of its hardware."""
    found = [fits[other.name] for other in made if other.hardware == one.hardware]
    return [fit for fit in found if fit is not None]


def _newest(found: Story) -> list[Beat]:
    """What each endpoint said last while it served, in the order of names.

    Of one that only rewards tell of, since a copy's beats are cut sooner: what another of its hardware said.
    """
    said = {
        name: structs.replace(_last(beats), models=tuple(found.models[name]))
        for name, beats in found.beats.items()
    }
    for name, answers in found.answers.items():
        if name not in said:
            said[name] = _stand_in(answers, list(said.values()))
    return [said[name] for name in sorted(said)]


def _last(beats: Sequence[tuple[float, Beat]]) -> Beat:
    ready = [beat for _, beat in beats if beat.state == "ready"]
    return ready[-1] if ready else beats[-1][1]


def _stand_in(answers: Sequence[tuple[float, Reward]], said: Sequence[Beat]) -> Beat:
    reward = answers[-1][1]
    prefills = reward.leg == "prefill"
    near = max(
        said,
        key=lambda beat: (
            (beat.roles == ("prefill",)) == prefills,
            beat.hardware == reward.hardware,
        ),
    )
    return structs.replace(
        near,
        endpoint=reward.endpoint,
        hardware=reward.hardware,
        models=tuple(dict.fromkeys(answer.model for _, answer in answers)),
    )


def _cache_hit(found: Story) -> float:
    prompts = sum(reward.prompt_tokens for _, reward in found.ended)
    return sum(found.cached_tokens(one.id) for one, _ in found.ended) / max(1, prompts)
