"""Cells of an evaluation: one fleet and one workload, at loads, with seeds, under policies.

A seed makes the machines and all chance of a run; every policy meets the same machines and the same arrivals, so
results are paired by seed.
"""

from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np
from msgspec import structs

from scheduler.core import CoreSettings
from scheduler.errors import SettingsError
from scheduler.sim import arriving, bounds, fleet, policy, report, visits, workload
from scheduler.sim.arriving import Row
from scheduler.sim.fleet import Fleet, Machine
from scheduler.sim.policies.base import LabPolicy, Stage
from scheduler.sim.policies.routers import EarliestFinish, Oracle
from scheduler.sim.promise import Promised
from scheduler.sim.report import Report
from scheduler.sim.visits import Visit
from scheduler.sim.workload import Arrival
from scheduler.sim.world import Timer, World

CAPACITY_ROWS = 3000
"Arrivals that capacity is measured with; all of a closed loop's, whose few sessions would end before the fleet is full."

OVERLOAD = 4.0
"Times the rate at which the fleet could prefill cold prompts: deep overload, whatever the caches do."

BUSY_FROM, BUSY_TO = 0.15, 0.85
"Of the completions, those counted: before, the fleet fills, after, it empties."


class Bounds(msgspec.Struct, frozen=True):
    """What no policy can beat on one seed's machines at one rate."""

    ttft_mean_s: float | None
    on_time: float | None


class Lab(msgspec.Struct, frozen=True, kw_only=True):
    """A fleet and a workload."""

    fleet: Fleet
    work: Promised
    trace: str = ""
    cut: float = 0.0
    "Share of first arrivals that is left out of the figures."
    closed: bool = False
    """
    Turns of a conversation wait for the turn before, and pauses between turns stay as they are at any rate.

    Only sessions begin closer together: nobody thinks faster because others are many.
    """
    window: str = ""
    "Which part of the trace this is, where several are run."
    foreign: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    "Share of conversations that others send to engines by chance: the dispatcher never hears of them."
    machines: tuple[Machine, ...] = ()
    "These, whatever the seed, in place of those that the fleet and a seed would make."
    core: CoreSettings | None = None
    "Of the dispatcher whose recording this is, for the policy `recorded`."

    def check(self) -> None:
        """Refuse what cannot run.

        Raises:
            SettingsError: no arrivals, or a prompt that no endpoint can hold.
        """
        if not self.work.arrivals:
            raise SettingsError(f"trace {self.trace}: no arrival in this slice")
        longest = max(machine.tokens_max for machine in self._made(0))
        fitting = sum(arrival.prompt_tokens < longest for arrival in self.work.arrivals)
        if not fitting:
            raise SettingsError(
                f"fleet {self.fleet.name}: holds at most {longest} tokens, "
                f"no prompt of trace {self.trace} fits"
            )

    def admit(self, chosen: LabPolicy) -> None:
        """Refuse a policy that does not know this kind of fleet.

        Raises:
            SettingsError: the fleet parts prefill from decode, and the policy's source does not; or it asks for
                more seats than the engines' flags give.
        """
        if self._is_parted and not chosen.parts:
            known = ", ".join(name for name, kind in policy.BY_NAME.items() if kind().parts)
            raise SettingsError(
                f"policy {chosen.label!r} does not part prefill from decode, as fleet "
                f"{self.fleet.name} does; wanted one of: {known}"
            )
        apart = self._whole_only() if self._is_parted and chosen.is_peer else []
        if apart:
            raise SettingsError(
                f"policy {chosen.label!r} parts every request, and in fleet {self.fleet.name} nobody prefills for "
                f"{', '.join(apart)}; wanted one of ours, such as plan"
            )
        if chosen.seats is not None:
            most = min(one.settings.max_num_seqs for one in self._made(0) if one.decodes)
            if chosen.seats > most:
                raise SettingsError(
                    f"policy {chosen.label!r} has seats {chosen.seats}, wanted at most {most}, the max_num_seqs "
                    f"of fleet {self.fleet.name}"
                )

    def capacity_rps(self, seed: int) -> float:
        """Completions a second in deep overload under earliest-finish, on this seed's machines."""
        made = self._made(seed)
        some = tuple(
            structs.replace(arrival, ttft_s=None, tpot_s=None, deadline_s=None)
            for arrival in self.work.arrivals[: None if self.closed else CAPACITY_ROWS]
        )
        rate = OVERLOAD * _cold_rate(some, made)
        rows = arriving.rows(_at_rate(some, rate), asked=self.work.asked)
        run = self._world(rows, made, EarliestFinish(), None)
        run.run(EarliestFinish().dispatch(self._stage(seed)))
        ends = np.sort([fate.finished_at for fate in run.fates if fate.finished_at is not None])
        if len(ends) < 2:
            raise SettingsError(
                f"trace {self.trace}: {len(ends)} of {len(some)} arrivals could be served, wanted 2 or more "
                "to measure the capacity that a load is a part of; a rate needs none"
            )
        first, last = int(BUSY_FROM * (len(ends) - 1)), int(np.ceil(BUSY_TO * (len(ends) - 1)))
        return float((last - first) / max(1e-9, ends[last] - ends[first]))

    def run(
        self,
        chosen: LabPolicy,
        *,
        label: str,
        seed: int,
        rate_rps: float,
        load: float | None = None,
        timer: Timer | None = None,
    ) -> tuple[Report, World]:
        """One cell with one seed."""
        self.admit(chosen)
        made = _seated(self._made(seed), chosen.seats)
        work = self.work
        rows = arriving.rows(
            self._arriving(rate_rps), work.weights, work.objectives, work.asked, work.cancels_s
        )
        own, others = self._parted(rows, made, seed)
        run = self._world(own, made, chosen, timer, others)
        stage = self._stage(seed)
        begun = timer() if timer else 0
        if isinstance(chosen, Oracle):
            run.run(chosen.dispatch_knowing(stage, run.truth))
        else:
            run.run(chosen.dispatch(stage))
        wall_s = (timer() - begun) / 1e9 if timer else 0.0
        found = report.of(
            run,
            policy=label,
            load=load,
            rate_rps=rate_rps * len(own) / len(rows),
            seed=seed,
            wall_s=wall_s,
            cut=self.cut,
            shares=self.work.tenants,
        )
        named = {"fleet": self.fleet.name, "trace": self.trace, "window": self.window}
        return structs.replace(found, **named), run

    def bounds(self, seed: int, rate_rps: float) -> Bounds:
        """The bounds of this seed's machines at this rate, of those arrivals that figures are of."""
        if not self._is_bounded:
            return Bounds(None, None)
        made = self._made(seed)
        first = self._first
        if self.closed:  # when turns come is the policy's own doing: only each alone can be said
            return Bounds(bounds.alone_mean_s(self.work.arrivals, made, first=first), None)
        arrivals, ttft_s, on_time = (
            _at_rate(self.work.arrivals, rate_rps),
            self._same_ttft_s(),
            None,
        )
        if ttft_s is not None:
            on_time = bounds.on_time_share(arrivals, made, ttft_s=ttft_s, first=first)
        return Bounds(bounds.ttft_mean_s(arrivals, made, first=first), on_time)

    def on_time_bound(self, seed: int, rate_rps: float) -> float | None:
        """A closer bound on the share on time than that of `bounds`, in seconds; None where there is none."""
        ttft_s = self._same_ttft_s()
        if ttft_s is None or self.closed or not self._is_bounded:
            return None
        arrivals, first = _at_rate(self.work.arrivals, rate_rps), self._first
        return bounds.on_time_apart_share(arrivals, self._made(seed), ttft_s=ttft_s, first=first)

    @property
    def _first(self) -> int:
        """The place of the first arrival that figures are of."""
        return int(self.cut * len(self.work.arrivals))

    @property
    def _is_bounded(self) -> bool:
        """Whether all figures are of the arrivals that bounds are of, and nobody else is there."""
        return not self.foreign and not any(at is not None for at in self.work.cancels_s)

    def _same_ttft_s(self) -> float | None:
        """What all that figures are of are promised, if that is a first token after the same time and nothing else."""
        arrivals = self.work.arrivals[self._first :]
        kinds = {(a.ttft_s, a.tpot_s, a.deadline_s) for a in arrivals}
        if len(kinds) != 1:
            return None
        ttft_s, *others = kinds.pop()
        return ttft_s if others == [None, None] else None

    @property
    def _is_parted(self) -> bool:
        """Whether some endpoints only prefill."""
        return any(one.role == "prefill" for one in self.machines) or self.fleet.is_disaggregated

    def _whole_only(self) -> list[str]:
        """Of given machines, those that decode nothing which another has prefilled."""
        prefilled = {
            model for one in self.machines if one.role == "prefill" for model in one.models
        }
        return [
            one.name
            for one in self.machines
            if one.decodes and not (one.link_gbps and prefilled.issuperset(one.models))
        ]

    def _arriving(self, rate_rps: float) -> tuple[Arrival, ...]:
        return (_closed if self.closed else _at_rate)(self.work.arrivals, rate_rps)

    def _made(self, seed: int) -> tuple[Machine, ...]:
        """This seed's machines; of given ones only the chance is drawn anew."""
        if not self.machines:
            return fleet.machines(self.fleet, seed)
        return tuple(structs.replace(one, seed=1000 * seed + one.seed) for one in self.machines)

    def _world(
        self,
        rows: Sequence[Row],
        made: Sequence[Machine],
        chosen: LabPolicy,
        timer: Timer | None,
        others: Sequence[Visit] = (),
    ) -> World:
        return World(
            rows,
            made,
            delays=self.fleet.delays,
            is_open=chosen.is_open,
            links=self.fleet.network,
            scrapes=chosen.scrapes,
            publishes=chosen.hears,
            is_told=not chosen.is_peer,
            others=others,
            faults=self.fleet.faults,
            closed=self.closed,
            timer=timer,
        )

    def _parted(
        self, rows: tuple[Row, ...], made: Sequence[Machine], seed: int
    ) -> tuple[tuple[Row, ...], tuple[Visit, ...]]:
        """What the dispatcher is asked, and what others ask of the same engines."""
        if not self.foreign:
            return rows, ()
        rng = np.random.default_rng([seed, 3])
        return visits.parted(rows, self.foreign, [one.name for one in made], rng)

    def _stage(self, seed: int) -> Stage:
        return Stage(
            rng=np.random.default_rng([seed, 2]),
            delays=self.fleet.delays,
            is_parted=self._is_parted,
            objectives=self.work.known,
            tenants=self.work.tenants,
            core=self.core,
        )


def _seated(made: Sequence[Machine], seats: int | None) -> tuple[Machine, ...]:
    """The same machines with so many seats where they decode."""
    if seats is None:
        return tuple(made)
    return tuple(
        structs.replace(one, settings=structs.replace(one.settings, max_num_seqs=seats))
        if one.decodes
        else one
        for one in made
    )


def _at_rate(arrivals: Sequence[Arrival], rate_rps: float) -> tuple[Arrival, ...]:
    """The same arrivals at this mean rate, the first at 0."""
    moved = _from_zero(arrivals)
    if workload.rate(moved) == 0.0:
        return moved
    return workload.scaled(moved, rate_per_s=rate_rps)


def _closed(arrivals: Sequence[Arrival], rate_rps: float) -> tuple[Arrival, ...]:
    """Sessions that begin at a pace which brings so many turns a second; pauses stay as they are.

    Before the first sessions have grown and after the last has begun there are fewer.
    """
    moved = _from_zero(arrivals)
    heads = [a for a in moved if a.parent is None]
    speed = rate_rps * heads[-1].at_s / len(moved)
    return workload.scaled(moved, factor=speed, gaps="kept") if speed > 0 else moved


def _from_zero(arrivals: Sequence[Arrival]) -> tuple[Arrival, ...]:
    start_s = arrivals[0].at_s
    return tuple(structs.replace(a, at_s=a.at_s - start_s) for a in arrivals)


def _cold_rate(arrivals: Sequence[Arrival], made: Sequence[Machine]) -> float:
    """Prompts a second that the fleet could prefill if it did nothing else and cached nothing."""
    some = arrivals[:: max(1, len(arrivals) // 200)]
    return sum(
        1.0 / float(np.mean([bounds.service_s(machine, a.prompt_tokens) for a in some]))
        for machine in made
    )
