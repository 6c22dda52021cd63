"""The lab's policies by name: what runs, with which settings, and what it may know.

Each is a frozen Struct: its tag is its name, its fields are its settings (`name:field=value` on the command line),
its docstring says whose it is. `dispatch` makes the thing that the world drives. What a policy may read follows from
what it hands to its router: see `baselines.senses`. Only the oracle asks for the truth, and says so by its base.
"""

from collections.abc import Callable, Mapping

import msgspec
import numpy as np

from scheduler.core import CoreSettings, Scheduler
from scheduler.errors import SettingsError
from scheduler.plan import PlanSettings
from scheduler.policies import Edf, Fcfs, Urgency
from scheduler.policies import Policy as CorePolicy
from scheduler.profile.profile import Profile
from scheduler.settings import FairnessSettings, Objective
from scheduler.sim.baselines import affinity, finish, load, lodestar, orders, parted
from scheduler.sim.baselines.binding import Bound, Lined, Order, Router
from scheduler.sim.baselines.desk import Desk
from scheduler.sim.baselines.finish import Truth
from scheduler.sim.baselines.senses import Asked
from scheduler.sim.fleet import Delays
from scheduler.sim.world import Dispatch

PREFIX_BLOCKS = 16_384
"Blocks of 128 tokens that a peer's prefix table holds for an endpoint: two million tokens, as llm-d's default."


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """What every policy is told at its start."""

    rng: np.random.Generator
    delays: Delays
    is_parted: bool = False
    "Whether some endpoints only prefill."
    objectives: dict[str, Objective] = {}
    tenants: dict[str, float] = {}


class LabPolicy(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="name"
):
    """What all of them offer."""

    @property
    def label(self) -> str:
        return str(self.__struct_config__.tag)

    @property
    def is_open(self) -> bool:
        """Whether jobs go into the engine as they come; else the worker's admission stands before it."""
        return True

    @property
    def scrapes(self) -> bool:
        """Whether it reads engines' own figures."""
        return False

    @property
    def parts(self) -> bool:
        """Whether it has a form for fleets that part prefill from decode."""
        return False

    def dispatch(self, stage: Stage) -> Dispatch:
        raise NotImplementedError


# The core that ships.


class _Core(LabPolicy, frozen=True):
    """The shipped core, with its plan and its workers' admission."""

    commit_window_s: float = PlanSettings().commit_window_s
    horizon: int = PlanSettings().horizon
    tie: float = PlanSettings().tie
    fill: float = PlanSettings().fill
    pace_worth: float = PlanSettings().pace_worth
    explore: float = PlanSettings().explore
    explore_paid: float = PlanSettings().explore_paid
    quantum_tokens: int = 0
    profile: Profile | None = None
    "How it chooses an endpoint; None: by seconds."

    @property
    def is_open(self) -> bool:
        return False

    @property
    def parts(self) -> bool:
        return True

    def order(self) -> CorePolicy:
        raise NotImplementedError

    def dispatch(self, stage: Stage) -> Dispatch:
        settings = CoreSettings(
            policy=self.order(),
            objectives=stage.objectives,
            fairness=FairnessSettings(quantum_tokens=self.quantum_tokens, weights=stage.tenants),
            plan=PlanSettings(
                commit_window_s=self.commit_window_s,
                horizon=self.horizon,
                tie=self.tie,
                fill=self.fill,
                pace_worth=self.pace_worth,
                explore=self.explore,
                explore_paid=self.explore_paid,
            ),
            profile=self.profile,
            lease_s=stage.delays.lease_s,
        )
        return Scheduler(settings, stage.rng)


class Plan(_Core, frozen=True, tag="plan"):
    """Headgate as it ships: `urgency` on the rolling plan, each part of which can be switched off here."""

    odds_min: float = Urgency().odds_min
    price: float = Urgency().price
    stretch: float = Urgency().stretch
    aside_share: float = Urgency().aside_share

    def order(self) -> CorePolicy:
        return Urgency(
            odds_min=self.odds_min,
            price=self.price,
            stretch=self.stretch,
            aside_share=self.aside_share,
        )


class CoreFcfs(_Core, frozen=True, tag="core-fcfs"):
    """The rolling plan with `fcfs`: what late binding and the cost model are worth without urgency."""

    def order(self) -> CorePolicy:
        return Fcfs()


class CoreEdf(_Core, frozen=True, tag="core-edf"):
    """The rolling plan with plain `edf`."""

    def order(self) -> CorePolicy:
        return Edf()


# Orders of a central line.


class _Lined(LabPolicy, frozen=True):
    """A central line with late binding; the order is all that differs."""

    window_s: float = 0.1
    "An endpoint takes its next when its prefill is predicted to be done within this."

    @property
    def parts(self) -> bool:
        return True

    def order(self, desk: Desk) -> Order:
        raise NotImplementedError

    def second(self, desk: Desk, rng: np.random.Generator) -> Router:
        """Who decodes what is prefilled: whoever holds the fewest KV tokens."""
        return parted.LeastKv(desk.account, rng)

    def dispatch(self, stage: Stage) -> Dispatch:
        desk = Desk(lease_s=stage.delays.lease_s, prefix_blocks=PREFIX_BLOCKS, learns=True)
        first = Lined(desk, self.order(desk), self.window_s)
        if not stage.is_parted:
            return first
        desk.first_legs = parted.PREFILL
        return parted.Parted(desk, first, self.second(desk, stage.rng))


def _service_s(desk: Desk) -> Callable[[Asked], float]:
    """Seconds of the whole prompt on the mean endpoint, as learned so far."""

    def service_s(asked: Asked) -> float:
        cached = [0] * len(desk.beats)
        return float(desk.costs.service_s(asked, cached).mean())

    return service_s


class _Skipping(_Lined, frozen=True):
    """Orders that ask whether a request can still make it, and how sure they want to be."""

    pace: float = 2.0
    "Times its predicted seconds that a request is given: room for noise and stalls. Tuned: 1, 1.5, 2 and 3 were tried."

    def finish_s(self, desk: Desk) -> Callable[[Asked], float]:
        """Seconds until a request's first token if it goes next: what may be before it, and itself."""
        service_s = _service_s(desk)

        def finish_s(asked: Asked) -> float:
            return self.pace * (0.5 * self.window_s + service_s(asked))

        return finish_s


class FirstCome(_Lined, frozen=True, tag="fcfs"):
    """First come, first served."""

    def order(self, desk: Desk) -> Order:  # noqa: ARG002
        return orders.Ranked(lambda asked: asked.enqueued_at)


class ShortestFirst(_Lined, frozen=True, tag="sjf"):
    """Shortest prefill first."""

    def order(self, desk: Desk) -> Order:
        return orders.Ranked(_service_s(desk))


class EarliestDue(_Lined, frozen=True, tag="edf"):
    """Earliest due first, hopeless or not."""

    def order(self, desk: Desk) -> Order:  # noqa: ARG002
        return orders.Ranked(lambda asked: asked.due_at)


class EarliestDueDrop(_Skipping, frozen=True, tag="edf-drop"):
    """Earliest due first; who cannot make it when its turn comes is refused."""

    def order(self, desk: Desk) -> Order:
        return orders.Dropping(self.finish_s(desk))


class LeastSlack(_Skipping, frozen=True, tag="least-slack"):
    """Least slack first: due moment less own work; who cannot make it waits behind all who can."""

    def order(self, desk: Desk) -> Order:
        service_s = _service_s(desk)
        return orders.Relegating(lambda asked: asked.due_at - service_s(asked), self.finish_s(desk))


class MooreHodgson(_Skipping, frozen=True, tag="moore-hodgson"):
    """Moore and Hodgson's set of the most on time, formed anew at each pick (Moore, Management Science 1968)."""

    def order(self, desk: Desk) -> Order:
        return orders.MooreHodgson(
            _service_s(desk), self.finish_s(desk), lambda: float(max(1, len(desk.beats)))
        )


class Niyama(_Skipping, frozen=True, tag="niyama"):
    """Niyama (arXiv 2503.22562): due moment + alpha x own work, one-shot relegation; on a central line."""

    alpha: float = 0.5

    def order(self, desk: Desk) -> Order:
        service_s = _service_s(desk)
        return orders.Relegating(
            lambda asked: asked.due_at + self.alpha * service_s(asked), self.finish_s(desk)
        )


class Kairos(_Skipping, frozen=True, tag="kairos"):
    """Kairos, our reconstruction: urgency-first prefill, slack-guided decode packing."""

    @property
    def is_open(self) -> bool:
        return False

    def order(self, desk: Desk) -> Order:
        return orders.UrgencyFirst(self.finish_s(desk))

    def second(self, desk: Desk, rng: np.random.Generator) -> Router:  # noqa: ARG002
        return parted.Slack(desk)


# Routers that bind at arrival.


class _Bound(LabPolicy, frozen=True):
    """Binds at arrival; the engine serves in its own order."""

    @property
    def learns(self) -> bool:
        """Whether it reads predicted seconds."""
        return False

    def router(self, desk: Desk, rng: np.random.Generator) -> Router:
        raise NotImplementedError

    def pair(self, desk: Desk, rng: np.random.Generator) -> tuple[Router, Router]:
        """Who computes prompts and who decodes, where those are parted."""
        raise NotImplementedError

    def dispatch(self, stage: Stage) -> Dispatch:
        desk = Desk(lease_s=stage.delays.lease_s, prefix_blocks=PREFIX_BLOCKS, learns=self.learns)
        if not stage.is_parted:
            return Bound(desk, self.router(desk, stage.rng))
        desk.first_legs = parted.PREFILL
        first, second = self.pair(desk, stage.rng)
        return parted.Parted(desk, Bound(desk, first), second)


class _Paired(_Bound, frozen=True):
    """One of them that also serves in two legs: the same router for each, unless it says otherwise."""

    @property
    def parts(self) -> bool:
        return True

    def pair(self, desk: Desk, rng: np.random.Generator) -> tuple[Router, Router]:
        return self.router(desk, rng), self.router(desk, rng)


class RoundRobin(_Paired, frozen=True, tag="round-robin"):
    """One after the other."""

    def router(self, desk: Desk, rng: np.random.Generator) -> Router:  # noqa: ARG002
        return load.RoundRobin()


class Random(_Bound, frozen=True, tag="random"):
    """Anybody."""

    def router(self, desk: Desk, rng: np.random.Generator) -> Router:  # noqa: ARG002
        return load.Random(rng)


class LeastRequest(_Paired, frozen=True, tag="least-request"):
    """Fewest requests in flight; AIBrix `least-request`, vLLM production-stack and many others."""

    def router(self, desk: Desk, rng: np.random.Generator) -> Router:
        return load.LeastRequest(desk.account, rng)


class PowerOfTwo(_Bound, frozen=True, tag="power-of-two"):
    """The better of two by requests in flight; SGLang `power_of_two`, Ray Serve."""

    def router(self, desk: Desk, rng: np.random.Generator) -> Router:
        return load.PowerOfTwo(desk.account, rng)


class JsqTokens(_Bound, frozen=True, tag="jsq-tokens"):
    """Fewest prompt tokens in flight without a first token."""

    def dispatch(self, stage: Stage) -> Dispatch:
        # Without a prefix table: it counts whole prompts.
        desk = Desk(lease_s=stage.delays.lease_s)
        return Bound(desk, self.router(desk, stage.rng))

    def router(self, desk: Desk, rng: np.random.Generator) -> Router:
        return load.ShortestTokens(desk.account, rng)


class Aibrix(_Bound, frozen=True, tag="aibrix-prefix-load"):
    """AIBrix `prefix-cache` (vllm-project/aibrix, prefix_cache.go, Aug 2026)."""

    imbalance: int = 8
    sigmas: float = 1.0

    def router(self, desk: Desk, rng: np.random.Generator) -> Router:
        return affinity.Aibrix(
            desk.account, desk.prefixes, imbalance=self.imbalance, sigmas=self.sigmas, rng=rng
        )


class Sglang(_Bound, frozen=True, tag="sglang-cache-aware"):
    """SGLang's router `cache_aware` (sglang-router 0.3)."""

    threshold: float = 0.3
    absolute: float = 64.0
    relative: float = 1.5

    def router(self, desk: Desk, rng: np.random.Generator) -> Router:
        return affinity.Sglang(
            desk.account,
            desk.prefixes,
            threshold=self.threshold,
            absolute=self.absolute,
            relative=self.relative,
            rng=rng,
        )


class LlmdWeighted(_Paired, frozen=True, tag="llm-d-weighted"):
    """llm-d's default profile (Aug 2026): queue 2, KV 2, prefix 3; in two legs with its decider by uncached tokens."""

    queue: float = 2.0
    kv: float = 2.0
    prefix: float = 3.0
    uncached_tokens: int = 16
    "Its `nonCachedTokens`: with fewer the prompt is computed where it is decoded. 0 would never part them."

    @property
    def scrapes(self) -> bool:
        return True

    def router(self, desk: Desk, rng: np.random.Generator) -> Router:
        weights = (self.queue, self.kv, self.prefix)
        return affinity.LlmdWeighted(desk.scrapes, desk.prefixes, weights=weights, rng=rng)

    def pair(self, desk: Desk, rng: np.random.Generator) -> tuple[Router, Router]:
        kept = parted.Kept(desk.account, rng)
        scored = self.router(desk, rng)
        uncached = self.uncached_tokens
        return parted.LlmdPair(desk, kept, scored, uncached_tokens=uncached), kept


class LlmdSticky(_Bound, frozen=True, tag="llm-d-sticky"):
    """llm-d's sticky-until-saturated."""

    affinity: float = 0.8
    wait_s: float = 4.0
    "The longest wait that affinity may cost, at the peak prefill rate."

    def router(self, desk: Desk, rng: np.random.Generator) -> Router:  # noqa: ARG002
        return affinity.LlmdSticky(desk, affinity=self.affinity, wait_s=self.wait_s)


class LlmdPredicted(_Bound, frozen=True, tag="llm-d-predicted"):
    """llm-d's predicted-latency profile: affinity gate, then greedy; by our cost model."""

    gate: float = 0.8

    @property
    def learns(self) -> bool:
        return True

    def router(self, desk: Desk, rng: np.random.Generator) -> Router:  # noqa: ARG002
        return finish.LlmdPredicted(desk.costs, desk.prefixes, gate=self.gate)


class Lmetric(_Bound, frozen=True, tag="lmetric"):
    """LMetric: (uncached queued + own uncached) x (batch + 1)."""

    def router(self, desk: Desk, rng: np.random.Generator) -> Router:
        return finish.Lmetric(desk.account, desk.prefixes, rng)


class Dynamo(_Paired, frozen=True, tag="dynamo"):
    """NVIDIA Dynamo's KV router (ai-dynamo/dynamo, lib/kv-router selector), temperature 0."""

    overlap_weight: float = 1.0

    def router(self, desk: Desk, rng: np.random.Generator) -> Router:
        return finish.Dynamo(
            desk.account, desk.prefixes, overlap_weight=self.overlap_weight, rng=rng
        )

    def pair(self, desk: Desk, rng: np.random.Generator) -> tuple[Router, Router]:
        """Its prefill router; and for decoding the fewest KV blocks, since overlap is switched off there."""
        return self.router(desk, rng), parted.LeastKv(desk.account, rng)


class Mooncake(_Paired, frozen=True, tag="mooncake"):
    """Mooncake's Algorithm 1 (FAST 2025): earliest first token by an offline fit, refused when over its promise."""

    def router(self, desk: Desk, rng: np.random.Generator) -> Router:  # noqa: ARG002
        return finish.Mooncake(desk)

    def pair(self, desk: Desk, rng: np.random.Generator) -> tuple[Router, Router]:
        kept = parted.Kept(desk.account, rng)
        return parted.MooncakePair(desk, kept), kept


class Lodestar(_Bound, frozen=True, tag="lodestar"):
    """Lodestar: a perceptron on -TTFT, trained in rounds, greedy; our equivalent."""

    round_s: float = 30.0
    least_answers: int = 64

    @property
    def scrapes(self) -> bool:
        return True

    def router(self, desk: Desk, rng: np.random.Generator) -> Router:
        return lodestar.Lodestar(
            desk.account,
            desk.scrapes,
            desk.prefixes,
            round_s=self.round_s,
            least_answers=self.least_answers,
            rng=rng,
        )


class EarliestFinish(_Paired, frozen=True, tag="earliest-finish"):
    """The earliest predicted first token by the cost model that ships."""

    @property
    def learns(self) -> bool:
        return True

    def router(self, desk: Desk, rng: np.random.Generator) -> Router:  # noqa: ARG002
        return finish.EarliestFinish(desk.costs, desk.prefixes)

    def pair(self, desk: Desk, rng: np.random.Generator) -> tuple[Router, Router]:
        return self.router(desk, rng), parted.LeastKv(desk.account, rng)


class Oracle(LabPolicy, frozen=True, tag="oracle"):
    """Greedy on the truth: real coefficients, caches and queues, without delay. Cannot exist."""

    def dispatch(self, stage: Stage) -> Dispatch:  # noqa: ARG002
        raise AssertionError("the oracle cannot begin without the truth")

    def dispatch_knowing(self, stage: Stage, truth: Truth) -> Dispatch:
        """The only policy that is handed it."""
        desk = Desk(lease_s=stage.delays.lease_s)
        return Bound(desk, finish.Oracle(desk.names, truth))


ALL: tuple[type[LabPolicy], ...] = (
    Plan,
    CoreFcfs,
    CoreEdf,
    FirstCome,
    ShortestFirst,
    EarliestDue,
    EarliestDueDrop,
    LeastSlack,
    MooreHodgson,
    Niyama,
    Kairos,
    RoundRobin,
    Random,
    LeastRequest,
    PowerOfTwo,
    JsqTokens,
    Aibrix,
    Sglang,
    LlmdWeighted,
    LlmdSticky,
    LlmdPredicted,
    Lmetric,
    Dynamo,
    Mooncake,
    Lodestar,
    EarliestFinish,
    Oracle,
)

BY_NAME: Mapping[str, type[LabPolicy]] = {str(kind.__struct_config__.tag): kind for kind in ALL}


def named(text: str) -> LabPolicy:
    """A policy from `name` or `name:field=value:field=value`.

    >>> named("dynamo:overlap_weight=2").overlap_weight
    2.0

    Raises:
        SettingsError: no such policy or field; the message says what exists.
    """
    name, *parts = text.strip().split(":")
    if name not in BY_NAME:
        raise SettingsError(f"policy is {name!r}, wanted one of: {', '.join(BY_NAME)}")
    kind = BY_NAME[name]
    fields: dict[str, str] = {}
    for part in parts:
        key, sign, value = part.partition("=")
        if not sign or key not in kind.__struct_fields__:
            known = ", ".join(kind.__struct_fields__) or "none"
            raise SettingsError(f"policy {name!r} has no setting {key!r}, wanted one of: {known}")
        fields[key] = value
    try:
        return msgspec.convert(fields, kind, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(f"policy {text!r}: {error}") from None
