"""The profile that says what the plan does where no other is set: what docs/PLUGINS.md shows, and profiles are held against."""

import msgspec

from scheduler.profile.filters import InTime, Model, Pace, Role
from scheduler.profile.pickers import MaxScore
from scheduler.profile.profile import Profile
from scheduler.profile.scorers import Externality, KvPressure, PredictedLatency


def of_plan(*, fill: float, tie: float, externality: float = 1.0) -> Profile:
    """The rolling plan's own choice of an endpoint, as a profile: where no other is set, this is what it does.

    It minimises seconds to the first token + `externality` * seconds of others + `fill` * the pressure on KV. As scores,
    which fall evenly with each, that is a weight of `worst_s` for a score that falls to 0 in `worst_s` seconds, and one of
    `fill`. The model and the role it checks in any case; they stand here to be seen.

    Args:
        fill: what a prompt costs others where the KV is full, in seconds.
        externality: what a second of others counts beside one of its own.
        tie: what part of the best's seconds and fill is no difference.
    """
    latency, others = PredictedLatency(), Externality()
    return Profile(
        filters=(Model(), Role(), Pace(), InTime()),
        scorers=(
            msgspec.structs.replace(latency, weight=latency.worst_s),
            msgspec.structs.replace(others, weight=externality * others.worst_s),
            KvPressure(weight=fill),
        ),
        picker=MaxScore(tie=tie),
    )
