"""Routers that bind at arrival: the field's, a greedy one on our cost model, and one that knows the truth.

Only the oracle asks for the truth, and says so by its base.
"""

import numpy as np

from scheduler.sim.baselines import affinity, finish, load, lodestar, parted
from scheduler.sim.baselines.binding import Bound, Router
from scheduler.sim.baselines.desk import Desk
from scheduler.sim.baselines.finish import Truth
from scheduler.sim.policies.base import PREFIX_BLOCKS, LabPolicy, Stage
from scheduler.sim.world import Dispatch


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

    @property
    def is_peer(self) -> bool:
        return False

    def dispatch(self, stage: Stage) -> Dispatch:  # noqa: ARG002
        raise AssertionError("the oracle cannot begin without the truth")

    def dispatch_knowing(self, stage: Stage, truth: Truth) -> Dispatch:
        """The only policy that is handed it."""
        desk = Desk(lease_s=stage.delays.lease_s)
        return Bound(desk, finish.Oracle(desk.names, truth))
