"""Promises for traces that carry none: classes of requests as TOML.

[[classes]]                 # the first class that takes an arrival promises for it
client = "61"               # of the trace; absent: anybody
share = 0.4                 # of those it could take, drawn by a fixed seed; absent: all
ttft_ms = 500
ttft_prefills = 3.0         # and so many times its own cold prefill on `reference`
tpot_ms = 50
weight = 2.0
tenant = "gold"

[tenants]                   # their shares, for policies that know tenants; who is not named has 1
gold = 2.0
"""

import tomllib
from collections.abc import Sequence

import msgspec
import numpy as np
from msgspec import structs

from scheduler.errors import SettingsError
from scheduler.sim import bounds, profile
from scheduler.sim.arguments import EngineSettings
from scheduler.sim.fleet import Machine
from scheduler.sim.workload import Arrival
from scheduler.slo import Objective
from scheduler.wire.client import Request

SHARE_SEED = 0


class Class(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Some of the arrivals, and what they are promised."""

    name: str = ""
    client: str | None = None
    share: float | None = None
    ttft_ms: float | None = None
    ttft_prefills: float = 0.0
    "Added to the promise: so many times the prompt's own cold prefill on the reference."
    tpot_ms: float | None = None
    deadline_ms: float | None = None
    priority: int = 0
    weight: float = 1.0
    tenant: str = ""


class Promises(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of a promise file."""

    classes: tuple[Class, ...]
    reference: str = "a100"
    "The profile whose cold prefill scales promises."

    tenants: dict[str, float] = {}
    "Shares by tenant."


class Promised(msgspec.Struct, frozen=True):
    """A workload with its promises; lists by row."""

    arrivals: tuple[Arrival, ...]
    weights: tuple[float, ...] = ()
    objectives: tuple[str, ...] = ()
    known: dict[str, Objective] = {}
    "What the dispatcher's settings say of them."
    tenants: dict[str, float] = {}
    "Shares by tenant."
    asked: tuple[Request, ...] = ()
    "As their clients wrote them; empty: they say what arrivals do."
    cancels_s: tuple[float | None, ...] = ()
    "How long after its enqueue each one's client gives up; None where it waits, empty where all do."


def parse(text: str, name: str) -> Promises:
    """The promises that this TOML makes.

    Raises:
        SettingsError: no TOML, an unknown key, or a promise that is none.
    """
    try:
        found = msgspec.convert(tomllib.loads(text), Promises)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"promises {name}: not TOML: {error}") from None
    except msgspec.ValidationError as error:
        keys = ", ".join(Class.__struct_fields__)
        raise SettingsError(f"promises {name}: {error}; [[classes]]: {keys}") from None
    for one in found.classes:
        for key in ("ttft_ms", "tpot_ms", "deadline_ms", "weight"):
            value = getattr(one, key)
            if value is not None and value <= 0:
                raise SettingsError(f"promises {name}: {key} is {value:g}, wanted more than 0")
    for tenant, share in found.tenants.items():
        if share <= 0:
            raise SettingsError(
                f"promises {name}: tenants.{tenant} is {share:g}, wanted more than 0"
            )
    return found


def applied(arrivals: Sequence[Arrival], promises: Promises) -> Promised:
    """Every arrival with its class's promise; those that no class takes keep their own."""
    rng = np.random.default_rng(SHARE_SEED)
    found = profile.load(promises.reference)
    machine = Machine(
        name="", hardware="", nominal=found, actual=found, settings=EngineSettings(), seed=0
    )
    rows, weights, objectives = [], [], []
    for arrival in arrivals:
        drawn = float(rng.random())
        one = _class_of(arrival, promises.classes, drawn)
        rows.append(arrival if one is None else _with(arrival, one, machine))
        weights.append(1.0 if one is None else one.weight)
        objectives.append("" if one is None or one.weight == 1.0 else f"weight-{one.weight:g}")
    known = {
        name: Objective(weight=weight)
        for name, weight in zip(objectives, weights, strict=True)
        if name
    }
    return Promised(tuple(rows), tuple(weights), tuple(objectives), known, promises.tenants)


def _class_of(arrival: Arrival, classes: Sequence[Class], drawn: float) -> Class | None:
    """The first that takes it; shares of those before count as taken."""
    base = 0.0
    for one in classes:
        if one.client is not None and one.client != arrival.client:
            continue
        if one.share is None:
            return one
        base += one.share
        if drawn < base:
            return one
    return None


def _with(arrival: Arrival, one: Class, machine: Machine) -> Arrival:
    ttft_s = None if one.ttft_ms is None else one.ttft_ms / 1e3
    if one.ttft_prefills:
        cold_s = bounds.service_s(machine, arrival.prompt_tokens)
        ttft_s = (ttft_s or 0.0) + one.ttft_prefills * cold_s
    return structs.replace(
        arrival,
        ttft_s=ttft_s,
        tpot_s=None if one.tpot_ms is None else one.tpot_ms / 1e3,
        deadline_s=None if one.deadline_ms is None else one.deadline_ms / 1e3,
        priority=one.priority,
        tenant=one.tenant or arrival.tenant,
    )
