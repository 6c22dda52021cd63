"""The core that ships: its plan under its own order, and under two plain ones."""

from typing import Any

from msgspec import Struct, structs

from scheduler.core import CoreSettings, Scheduler
from scheduler.errors import SettingsError
from scheduler.fairness import FairnessSettings
from scheduler.plan import PlanSettings
from scheduler.policies import Edf, Fcfs, Urgency
from scheduler.policies import Policy as CorePolicy
from scheduler.profile.profile import Profile
from scheduler.sim.policies.base import LabPolicy, Stage
from scheduler.sim.world import Dispatch


class _Ours(LabPolicy, frozen=True):
    """The shipped core, behind its workers' admission."""

    @property
    def is_peer(self) -> bool:
        return False

    @property
    def is_open(self) -> bool:
        return False

    @property
    def parts(self) -> bool:
        return True


class _Core(_Ours, frozen=True):
    """The shipped core, with its plan and its workers' admission."""

    commit_window_s: float = PlanSettings().commit_window_s
    horizon: int = PlanSettings().horizon
    tie: float = PlanSettings().tie
    fill: float = PlanSettings().fill
    externality: float = PlanSettings().externality
    answer_part: float = PlanSettings().answer_part
    pace_worth: float = PlanSettings().pace_worth
    late_worth: float = PlanSettings().late_worth
    keep_clear: float = PlanSettings().keep_clear
    cache_patience: float = PlanSettings().cache_patience
    patience: float = PlanSettings().patience
    explore: float = PlanSettings().explore
    explore_paid: float = PlanSettings().explore_paid
    quantum_tokens: int = 0
    over_worth: float = FairnessSettings().over_worth
    kv_events: bool = False
    "Whether engines publish what they cache, as vLLM does where it is told to."
    profile: Profile | None = None
    "How it chooses an endpoint; None: by seconds."

    @property
    def hears(self) -> bool:
        return self.kv_events

    def order(self) -> CorePolicy:
        raise NotImplementedError

    def dispatch(self, stage: Stage) -> Dispatch:
        settings = CoreSettings(
            policy=self.order(),
            objectives=stage.objectives,
            fairness=FairnessSettings(
                quantum_tokens=self.quantum_tokens,
                over_worth=self.over_worth,
                weights=stage.tenants,
            ),
            plan=PlanSettings(**_of(self, PlanSettings)),
            profile=self.profile,
            lease_s=stage.delays.lease_s,
        )
        return Scheduler(settings, stage.rng)


class Plan(_Core, frozen=True, tag="plan"):
    """Headgate as it ships: `urgency` on the rolling plan, each part of which can be switched off here."""

    odds_min: float = Urgency().odds_min
    price: float = Urgency().price
    stretch: float = Urgency().stretch
    head_start: float = Urgency().head_start
    aside_share: float = Urgency().aside_share

    def order(self) -> CorePolicy:
        return Urgency(**_of(self, Urgency))


class CoreFcfs(_Core, frozen=True, tag="core-fcfs"):
    """The rolling plan with `fcfs`: what late binding and the cost model are worth without urgency."""

    def order(self) -> CorePolicy:
        return Fcfs()


class CoreEdf(_Core, frozen=True, tag="core-edf"):
    """The rolling plan with plain `edf`."""

    def order(self) -> CorePolicy:
        return Edf()


class Recorded(_Ours, frozen=True, tag="recorded"):
    """The core with the settings of the dispatcher that was recorded: its own policy, plan, profile and fairness."""

    def dispatch(self, stage: Stage) -> Dispatch:
        if stage.core is None:
            raise SettingsError(
                "policy 'recorded' is the core as it was recorded, and this is no recording: wanted another"
            )
        settings = structs.replace(stage.core, objectives=stage.objectives)
        return Scheduler(settings, stage.rng)


def _of(policy: LabPolicy, kind: type[Struct]) -> dict[str, Any]:
    """The policy's settings that are fields of this kind as well."""
    shared = [name for name in kind.__struct_fields__ if name in policy.__struct_fields__]
    return {name: getattr(policy, name) for name in shared}
