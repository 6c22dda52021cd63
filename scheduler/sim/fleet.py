"""Fleets as TOML: which endpoints stand there, how they are reached, and what befalls them.

[[endpoints]]
profile = "a30"            # one of `headgate simulate --help`'s profiles
count = 8
[endpoints.engine]         # vLLM's own arguments, see `arguments`
max_num_seqs = 128

[[endpoints]]              # a pool that parts prefill from decode has both roles, and links between them
profile = "a30"
role = "decode"

[network]
link_gbps = 80.0           # 10 GB/s; an endpoint's own `link_gbps` goes before

[chance]                   # how a real fleet differs from its data sheet
jitter = 0.3

[[faults]]
at_s = 300.0
endpoint = "a30-2"
kind = "slow"
factor = 3.0
"""

import tomllib
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta, structs

from scheduler.errors import SettingsError
from scheduler.settings import Seconds, SecondsOrNone
from scheduler.sim import profile
from scheduler.sim.arguments import EngineSettings
from scheduler.sim.engine import Engine
from scheduler.sim.profile import Profile

ENDPOINTS_MAX = 1000
"More than any pool is meant for."

LINK_MAX_GBPS = 100_000.0
"Ten times what any NVLink carries."


class EndpointSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of endpoint, `count` times."""

    profile: str
    "A profile's full name or alias."

    name: str = ""
    "They are called this and a number; the profile's alias where empty."

    count: int = 1

    role: Literal["both", "prefill", "decode"] = "both"
    """
    `prefill` computes prompts and hands their KV to an endpoint that decodes; `decode` takes them over, or serves
    whole requests; `both` serves whole requests only, unless it has a link.
    """

    link_gbps: float | None = None
    "Gigabits a second of its link; the network's where absent."

    hardware: str | None = None
    "The class that its worker declares; the profile's GPU where absent, empty for unknown."

    engine: EngineSettings = EngineSettings()


class Chance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far endpoints differ from their profile and steps from each other, drawn by each seed."""

    jitter: Annotated[float, Meta(ge=0, lt=1)] = 0.3
    "Each coefficient of each endpoint is multiplied by 1 - jitter ... 1 + jitter."

    step_noise: Annotated[float, Meta(ge=0, le=10)] = 0.07
    "Sigma of the log-normal factor on each step."

    stall_probability: Annotated[float, Meta(ge=0, le=1)] = 0.01
    stall_s: SecondsOrNone = 0.2


CERTAIN = Chance(jitter=0.0, step_noise=0.0, stall_probability=0.0)
"The profile as it stands: for checking the instrument."


class Delays(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What lies between a fact and whoever decides on it, in seconds."""

    hop_s: SecondsOrNone = 0.0005
    "One append to a stream until its reader has it."

    turn_s: SecondsOrNone = 0.001
    "One turn of a dispatcher: facts that come within it are decided on together."

    news_s: SecondsOrNone = 0.02
    "How long a worker gathers what has started and what has given its first token."

    beat_s: Seconds = 1.0
    "Between two heartbeats of a worker."

    scrape_s: Seconds = 0.1
    "Between two looks at an engine's own figures, for policies that read them."

    lease_s: Seconds = 3.0
    "Silence after which an endpoint counts as lost."


class Links(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How KV goes from endpoint to endpoint."""

    link_gbps: float = 320.0
    "Gigabits a second of each endpoint's link, in and out: 320 are 40 GB/s."

    latency_s: float = 0.003
    "Of a transfer's handshake, before the first byte."

    kv_lease_s: float = 30.0
    "vLLM's `kv_lease_duration`: KV that no decode engine has asked for by then is forgotten."


NO_DELAYS = Delays(hop_s=0.0, turn_s=0.0, news_s=0.0, beat_s=1.0, scrape_s=0.02)
"Everybody knows everything at once (but a scrape, which takes some time)."


FaultKind = Literal["slow", "freeze", "thaw", "die", "join", "drain", "resume"]


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that befalls one endpoint."""

    at_s: SecondsOrNone
    endpoint: str
    "As the fleet numbers them: `a30-0`."

    kind: FaultKind
    """
    `slow` multiplies every step by `factor`; `freeze` stops engine and worker until `thaw`; `die` loses all
    it held; `join` is the moment it starts, again or for the first time; `drain` ends what it has and takes
    nothing new until `resume`, over deaths as well.
    """

    factor: Annotated[float, Meta(gt=0, le=1e6)] = 1.0


class Fleet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of a fleet file."""

    name: str = ""
    endpoints: tuple[EndpointSpec, ...]
    chance: Chance = Chance()
    delays: Delays = Delays()
    network: Links = Links()
    faults: tuple[Fault, ...] = ()

    @property
    def count(self) -> int:
        return sum(spec.count for spec in self.endpoints)

    @property
    def is_disaggregated(self) -> bool:
        """Whether some endpoints only prefill."""
        return any(spec.role == "prefill" for spec in self.endpoints)


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint of a fleet, as this seed made it."""

    name: str
    hardware: str
    "As declared to whoever decides; the jitter is not."

    nominal: Profile
    "The data sheet."

    actual: Profile
    "This specimen."

    settings: EngineSettings
    "Its engine's arguments, step noise included."

    seed: int
    "Of its step noise."

    role: Literal["both", "prefill", "decode"] = "both"

    link_gbps: float = 0.0
    "0: it is in no pool that hands KV over."

    models: tuple[str, ...] = ()
    "What it serves, adapters included; empty: what all arrivals ask for."

    context_tokens: int = 0
    "The longest context it serves; 0: as its KV cache holds."

    def engine(self) -> Engine:
        return Engine(self.actual, self.settings, np.random.default_rng(self.seed))

    @property
    def decodes(self) -> bool:
        return self.role != "prefill"

    @property
    def kv_tokens(self) -> int:
        kv_tokens = self.settings.kv_tokens or self.actual.kv_tokens
        return kv_tokens // self.settings.block_size * self.settings.block_size

    @property
    def tokens_max(self) -> int:
        """The longest prompt and answer together that it can serve."""
        most = min(self.kv_tokens, self.context_tokens or self.kv_tokens)
        if self.settings.chunked_prefill:
            return most
        return min(most, self.settings.max_num_batched_tokens)


def parse(text: str, name: str) -> Fleet:
    """The fleet that this TOML describes.

    Raises:
        SettingsError: no TOML, an unknown key or profile, or a fleet that cannot be.
    """
    try:
        fleet = msgspec.convert(tomllib.loads(text), Fleet)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"fleet {name}: not TOML: {error}") from None
    except msgspec.ValidationError as error:
        raise SettingsError(f"fleet {name}: {error}; {_keys()}") from None
    return checked(structs.replace(fleet, name=fleet.name or name))


def checked(fleet: Fleet) -> Fleet:
    """The same fleet, if it can be.

    Raises:
        SettingsError: no endpoint, too many, an unknown profile, a KV cache without room, prefill without an
            endpoint of the same model that decodes and a link to it, or a fault on an endpoint that is not there.
    """
    if not 1 <= fleet.count <= ENDPOINTS_MAX or any(spec.count < 1 for spec in fleet.endpoints):
        raise SettingsError(
            f"fleet {fleet.name}: {fleet.count} endpoints, wanted 1 to {ENDPOINTS_MAX}, each kind at least once"
        )
    for spec in fleet.endpoints:
        _check_spec(fleet.name, spec)
    if fleet.is_disaggregated:
        _check_roles(fleet)
    names = [name for name, _ in _named(fleet)]
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        raise SettingsError(f"fleet {fleet.name}: two endpoints are called {twice!r}")
    for fault in fleet.faults:
        if fault.endpoint not in names:
            raise SettingsError(
                f"fleet {fleet.name}: fault on endpoint {fault.endpoint!r}, wanted one of: {', '.join(names)}"
            )
    return fleet


def machines(fleet: Fleet, seed: int) -> tuple[Machine, ...]:
    """Its endpoints as this seed makes them; the same seed makes the same machines for every policy."""
    rng = np.random.default_rng([seed, 1])
    chance = fleet.chance
    made = []
    for name, spec in _named(fleet):
        nominal = profile.load(spec.profile)
        settings = structs.replace(
            spec.engine,
            step_noise=spec.engine.step_noise or chance.step_noise,
            stall_probability=spec.engine.stall_probability or chance.stall_probability,
            stall_s=chance.stall_s,
        )
        made.append(
            Machine(
                name=name,
                hardware=_hardware(nominal) if spec.hardware is None else spec.hardware,
                nominal=nominal,
                actual=nominal.jittered(rng, chance.jitter),
                settings=settings,
                seed=int(rng.integers(1 << 32)),
                role=spec.role,
                link_gbps=_link_gbps(fleet, spec),
            )
        )
    return tuple(made)


def _check_spec(fleet: str, spec: EndpointSpec) -> None:
    found = profile.load(spec.profile)
    kv_tokens = found.kv_tokens if spec.engine.kv_tokens is None else spec.engine.kv_tokens
    if kv_tokens < spec.engine.max_num_batched_tokens // 8 or kv_tokens < spec.engine.block_size:
        raise SettingsError(
            f"fleet {fleet}: {spec.profile} has room for {kv_tokens} KV tokens beside its model; it does not fit"
        )


def _check_roles(fleet: Fleet) -> None:
    """Whether all that is prefilled can be decoded somewhere."""
    decoding = {_model(spec) for spec in fleet.endpoints if spec.role != "prefill"}
    for spec in fleet.endpoints:
        if spec.role == "prefill" and _model(spec) not in decoding:
            raise SettingsError(
                f"fleet {fleet.name}: {spec.profile} prefills {_model(spec)}, and no endpoint decodes it; "
                f"wanted one of role 'decode' or 'both'"
            )
    if fleet.network.latency_s < 0 or fleet.network.kv_lease_s <= 0:
        raise SettingsError(
            f"fleet {fleet.name}: network has latency_s {fleet.network.latency_s:g} and kv_lease_s "
            f"{fleet.network.kv_lease_s:g}, wanted at least 0 and more than 0"
        )
    for spec in fleet.endpoints:
        if not 0 < _link_gbps(fleet, spec) <= LINK_MAX_GBPS:
            raise SettingsError(
                f"fleet {fleet.name}: {spec.profile} has link_gbps {_link_gbps(fleet, spec):g}, "
                f"wanted more than 0 and at most {LINK_MAX_GBPS:g}, to hand KV over"
            )


def _model(spec: EndpointSpec) -> str:
    """The model in a profile's name."""
    return profile.load(spec.profile).name.split("|")[1]


def _link_gbps(fleet: Fleet, spec: EndpointSpec) -> float:
    if not fleet.is_disaggregated:
        return 0.0
    return fleet.network.link_gbps if spec.link_gbps is None else spec.link_gbps


def _named(fleet: Fleet) -> Iterator[tuple[str, EndpointSpec]]:
    """Every endpoint's name and kind; kinds of one name are numbered through."""
    counts: dict[str, int] = {}
    for spec in fleet.endpoints:
        stem = spec.name or _stem(spec)
        for _ in range(spec.count):
            yield f"{stem}-{counts.get(stem, 0)}", spec
            counts[stem] = counts.get(stem, 0) + 1


def _stem(spec: EndpointSpec) -> str:
    """What its endpoints are called: the profile's GPU or alias, and the half of a request that it serves."""
    alias = spec.profile.split("|")[0]
    return alias if spec.role == "both" else f"{alias}-{spec.role}"


def _hardware(found: Profile) -> str:
    """The GPU in a profile's name: what a worker would declare."""
    return found.name.split("-")[0]


def _keys() -> str:
    tables = {
        "": Fleet,
        "endpoints": EndpointSpec,
        "endpoints.engine": EngineSettings,
        "chance": Chance,
        "delays": Delays,
        "network": Links,
        "faults": Fault,
    }
    return "; ".join(
        f"{f'[{table}]' if table else 'keys'}: {', '.join(kind.__struct_fields__)}"
        for table, kind in tables.items()
    )
