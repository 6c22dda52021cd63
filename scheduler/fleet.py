"""The living endpoints, and which of them may take what.

Each has a slot: its column in every array of the core. A slot is given again after its endpoint has left, so the
arrays are as long as the fleet ever was at once.
"""

from collections.abc import Collection, Iterable

import msgspec
import numpy as np

from scheduler.state import Bools, Endpoint, Floats
from scheduler.wire.worker import Beat

EPOCHS_MAX = 10_000
"Names of endpoints whose last epoch, and that they were drained, is remembered after they left."


class Capacities(msgspec.Struct, frozen=True, eq=False):
    """What engines can hold, as long as no endpoint comes, goes or says otherwise."""

    kv: Floats
    "float64[n_slots], KV tokens; `inf` where unknown."

    length: Floats
    "float64[n_slots], the longest context; `inf` where unknown."

    length_least: float
    "The shortest of those."

    is_kv_known: bool
    "Whether the KV tokens are known of all."

    @classmethod
    def of(cls, kv: Floats, length: Floats) -> "Capacities":
        """Of these; there must be one slot."""
        is_kv_known = bool(((kv > 0) & (kv < np.inf)).all())
        return cls(kv, length, float(length.min()), is_kv_known)


class Eligible(msgspec.Struct, frozen=True, eq=False):
    """Where something of what waits may go."""

    barrier_s: Floats
    "float64[n_slots]: 0 there, `inf` elsewhere. Not to be written to."

    slots: Bools | None
    "bool[n_slots], the same; None: everywhere."

    count: int
    "How many slots those are."

    @classmethod
    def by(cls, barrier_s: Floats) -> "Eligible":
        """By the seconds that a slot adds."""
        slots = barrier_s < np.inf
        count = int(np.count_nonzero(slots))
        return cls(barrier_s, slots if count < len(slots) else None, count)


class Fleet:
    """Endpoints by name, their capacities by slot."""

    def __init__(self) -> None:
        self.endpoints: dict[str, Endpoint] = {}
        self.by_slot: list[Endpoint | None] = []
        self.names: tuple[str, ...] = ()
        "The same by name; empty where nobody is."
        self._limits: Floats = np.zeros((5, 0))
        self._name_rows()
        self._barriers: dict[str, Floats] = {}
        self._eligible: dict[str, Eligible] = {}
        self._longest: dict[str, float | None] = {}
        self._capacities: Capacities | None = None
        self.epochs: dict[str, int] = {}
        "The newest epoch heard of each name; an older one is a worker that was replaced and still talks."
        self.drained: dict[str, None] = {}
        "Names that get no new work until a person resumes them, whether they are here or not: a restart resumes nobody."
        self.resting: list[Endpoint] = []
        "Those that handed something back a moment ago, and are given nothing new for a while."
        self.prefilling: dict[str, None] = {}
        "Endpoints that only compute prompts, and hand their KV over."
        self._roles: tuple[Bools, Bools] | None = None
        self.known_models: dict[str, None] = {}
        "Every model that was ever served; requests for them wait even while no endpoint serves them."

    @property
    def is_prefill(self) -> Bools:
        """Which slots compute prompts for others and do nothing else."""
        return self._by_role()[0]

    @property
    def is_decode(self) -> Bools:
        """Which slots take prompts over that others have computed."""
        return self._by_role()[1]

    @property
    def capacities(self) -> Capacities:
        """Those of all slots, of which there must be one."""
        if self._capacities is None:
            self._capacities = Capacities.of(self.kv_max, self.length_max)
        return self._capacities

    def join(self, beat: Beat, now: float) -> Endpoint:
        """A new endpoint, on the first free slot."""
        assert beat.endpoint not in self.endpoints, f"endpoint {beat.endpoint!r} is here already"
        slot = self.by_slot.index(None) if None in self.by_slot else len(self.by_slot)
        if slot == len(self.by_slot):
            self.by_slot.append(None)
            self._limits = np.column_stack([self._limits, np.zeros(5)])
            self._name_rows()
        endpoint = Endpoint(
            name=beat.endpoint,
            slot=slot,
            beat=beat,
            seen_at=now,
            is_drained=beat.endpoint in self.drained,
            held={},
        )
        self.endpoints[endpoint.name] = endpoint
        self._seat(slot, endpoint)
        self.hear(endpoint, beat, now)
        return endpoint

    def hear(self, endpoint: Endpoint, beat: Beat, now: float) -> None:
        """Take over what it says of itself."""
        before, endpoint.beat = endpoint.beat, beat
        endpoint.seen_at = now
        self.kv_used[endpoint.slot] = min(1.0, max(0.0, beat.kv_usage)) * max(0, beat.kv_tokens)
        endpoint.away_at = None if beat.state != "away" else endpoint.away_at or now
        if before is not beat and _declared(before) == _declared(beat):
            return  # most beats change nothing that eligibility follows from
        self.seats_max[endpoint.slot] = max(0, beat.max_num_seqs)
        self.kv_max[endpoint.slot] = beat.kv_tokens if beat.kv_tokens > 0 else np.inf
        self.length_max[endpoint.slot] = beat.max_model_len if beat.max_model_len > 0 else np.inf
        self.known_models.update(dict.fromkeys(beat.models))
        if _only_prefills(beat):
            self.prefilling[endpoint.name] = None
        else:
            self.prefilling.pop(endpoint.name, None)
        self.epochs[endpoint.name] = beat.epoch
        if len(self.epochs) > EPOCHS_MAX:
            del self.epochs[next(iter(self.epochs))]
        self._reopen(endpoint)

    def drain(self, name: str, *, is_drained: bool) -> None:
        """A person drains or resumes this name: no new work, or work again."""
        self.drained.pop(name, None)
        if is_drained:
            self.drained[name] = None
            if len(self.drained) > EPOCHS_MAX:
                del self.drained[next(iter(self.drained))]
        endpoint = self.endpoints.get(name)
        if endpoint is not None:
            endpoint.is_drained = is_drained
            self._reopen(endpoint)

    def leave(self, endpoint: Endpoint) -> None:
        """It is gone; its slot is free."""
        assert not endpoint.held, (
            f"endpoint {endpoint.name!r} leaves with {len(endpoint.held)} held"
        )
        del self.endpoints[endpoint.name]
        self._seat(endpoint.slot, None)
        self._limits[:, endpoint.slot] = 0.0, 0.0, 0.0, np.inf, 0.0
        self.prefilling.pop(endpoint.name, None)
        self._forget()

    def barrier(self, model: str) -> Floats:
        """Seconds to add to each slot's cost of a request for this model: 0 where it may go, `inf` where not."""
        found = self._barriers.get(model)
        if found is None:
            decodes = any(_takes_over(e) and model in e.beat.models for e in self._all())
            found = np.array(
                [0.0 if _may_take(e, model, decodes=decodes) else np.inf for e in self.by_slot]
            )
            self._barriers[model] = found
        return found

    def longest(self, model: str) -> float | None:
        """The longest context that anybody serves of this model, now or after a drain; None: nobody serves it."""
        if model not in self._longest:
            serving = [e.slot for e in self.endpoints.values() if model in e.beat.models]
            self._longest[model] = float(self.length_max[serving].max()) if serving else None
        return self._longest[model]

    def eligible(self, models: Collection[str]) -> Eligible:
        """Where a request for any of these models may go; there must be one."""
        if len(models) > 1:
            return Eligible.by(np.minimum.reduce([self.barrier(model) for model in models]))
        [model] = models
        found = self._eligible.get(model)
        if found is None:
            found = self._eligible[model] = Eligible.by(self.barrier(model))
        return found

    def _seat(self, slot: int, endpoint: Endpoint | None) -> None:
        self.by_slot[slot] = endpoint
        self.names = tuple([e.name if e else "" for e in self.by_slot])

    def _name_rows(self) -> None:
        self.seats_max, self.kv_max, self.length_max, self.ready_s, self.kv_used = self._limits
        """
        Of each slot: its engine's seats and KV tokens, the longest context it serves (both `inf` where unknown), 0
        where it takes work, `inf` where not, and the KV tokens in use when the engine was last asked (0: it never was).
        """

    def _all(self) -> Iterable[Endpoint]:
        return self.endpoints.values()

    def _by_role(self) -> tuple[Bools, Bools]:
        if self._roles is None:
            self._roles = (
                np.array([e is not None and e.name in self.prefilling for e in self.by_slot]),
                np.array([e is not None and _takes_over(e) for e in self.by_slot]),
            )
        return self._roles

    def _reopen(self, endpoint: Endpoint) -> None:
        self.ready_s[endpoint.slot] = 0.0 if endpoint.takes_work else np.inf
        self._forget()

    def _forget(self) -> None:
        """Eligibility may have changed: make it out anew when next asked for."""
        self._roles = self._capacities = None
        self._barriers.clear()
        self._eligible.clear()
        self._longest.clear()


def _declared(beat: Beat) -> tuple[object, ...]:
    """All of a beat that capacities and eligibility follow from."""
    limits = beat.max_num_seqs, beat.kv_tokens, beat.max_model_len
    links = beat.link_gbps, beat.kv_token_bytes
    return (beat.epoch, beat.state, beat.roles, beat.models, *limits, *links)


def _may_take(endpoint: Endpoint | None, model: str, *, decodes: bool) -> bool:
    """Whether it takes new requests: whole ones, or their prompts where somebody else decodes."""
    if endpoint is None or not endpoint.takes_work or model not in endpoint.beat.models:
        return False
    return _decodes(endpoint.beat) or (decodes and _only_prefills(endpoint.beat))


def _decodes(beat: Beat) -> bool:
    return "both" in beat.roles or "decode" in beat.roles


def _only_prefills(beat: Beat) -> bool:
    """Whether it computes prompts for others and serves nothing whole."""
    return beat.link_gbps > 0 and "prefill" in beat.roles and not _decodes(beat)


def _takes_over(endpoint: Endpoint) -> bool:
    """Whether it decodes what others have prefilled."""
    return endpoint.takes_work and endpoint.beat.link_gbps > 0 and _decodes(endpoint.beat)
