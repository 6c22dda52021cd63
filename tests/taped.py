"""Runs of the lab, taken down as a live dispatcher's would be, and asked again."""

import io
import math

import numpy as np

from dispatcher.journal import Journal, Recorder
from scheduler import recording
from scheduler.core import CoreSettings, Scheduler
from scheduler.sim import arriving, fleet, policy, recorded, story, workload
from scheduler.sim.fleet import Delays, EndpointSpec, Fault, Fleet
from scheduler.sim.world import World
from scheduler.slo import Objective

CHAT = {"chat": Objective(ttft_ms=800.0, weight=2.0)}
FLEET = Fleet(
    name="three",
    endpoints=(EndpointSpec(profile="a100", count=2), EndpointSpec(profile="l40s")),
    faults=(
        Fault(at_s=6.0, endpoint="a100-0", kind="slow", factor=3.0),
        Fault(at_s=9.0, endpoint="l40s-0", kind="die"),
        Fault(at_s=14.0, endpoint="l40s-0", kind="join"),
    ),
)


def arrivals(seed, *, rate_rps=12.0, span_s=20.0):
    """Conversations of every length, some with promises."""
    rng = np.random.default_rng(seed)
    n = int(rate_rps * span_s)
    at_s = np.sort(rng.uniform(0, span_s, n))
    return tuple(
        workload.Arrival(
            at_s=float(at),
            prompt_tokens=int(rng.lognormal(6.5, 1.0)) + 1,
            output_tokens=int(rng.integers(2, 120)),
            blocks=(int(rng.integers(5)),),
            block_tokens=128,
            ttft_s=float(rng.choice([0.3, 1.0, 5.0])) if rng.random() < 0.6 else None,
            deadline_s=8.0 if rng.random() < 0.3 else None,
            priority=int(rng.integers(-1, 3)),
        )
        for at in at_s
    )


def talk(rate_rps=10.0, span_s=30.0, *, seed=1):
    """Turns of forty sessions, each of which begins as the session's others do."""
    rng = np.random.default_rng(seed)
    n = int(rate_rps * span_s)
    rows = []
    for at in np.sort(rng.uniform(0, span_s, n)).tolist():
        session, shared = int(rng.integers(40)), int(rng.integers(1, 12))
        rows.append(
            workload.Arrival(
                at_s=at,
                prompt_tokens=128 * shared + int(rng.lognormal(5.5, 0.8)) + 1,
                output_tokens=int(rng.integers(2, 200)),
                session=session,
                blocks=tuple(100 * session + place for place in range(shared)),
                block_tokens=128,
                ttft_s=1.0 if rng.random() < 0.6 else None,
            )
        )
    return arriving.rows(rows)


def recorded_run(seed=0, core_settings=None, where=FLEET, *, rows=None, made=None, told=(), **more):
    """A run of the lab and its recording, as bytes; see `played`."""
    core_settings = core_settings or CoreSettings(objectives=CHAT, lease_s=Delays().lease_s)
    file = io.BytesIO()
    head = recording.head(core_settings, seed=seed, version="0", pool="lab")
    journal = Journal(head, lambda _: file, bytes_max=2**40)
    run = played(journal, core_settings, seed, where, rows=rows, made=made, told=told, **more)
    return run, file.getvalue()


def played(journal, core_settings, seed=0, where=FLEET, *, rows=None, made=None, told=(), **more):
    """A run of the lab that this journal takes down.

    `rows` and `made` stand in for the usual arrivals and the fleet's machines; `told` are (seconds, event) besides.
    """
    core = Recorder(Scheduler(core_settings, np.random.default_rng(seed)), journal)
    run = World(
        arriving.rows(arrivals(seed, **more)) if rows is None else rows,
        fleet.machines(where, seed) if made is None else made,
        delays=where.delays,
        is_open=False,
        links=where.network,
        faults=where.faults,
    )
    for at, event in told:
        run._at(at, run._hear, event)
    run.run(core)
    journal.flush_by(math.inf)
    return run


def lines_of(data):
    return recording.read(enumerate(data.splitlines(), 1), name="test")


def told_by(data, *, is_copy=False):
    """The story of a recording."""
    return story.read(lines_of(data)[1], is_copy=is_copy)


def stage_of(data, *, is_copy=False):
    """A recording as a lab."""
    head, _ = lines_of(data)
    return recorded.stage(told_by(data, is_copy=is_copy), recording.settings(head), name="test")


def asked_again(data, chosen="recorded", *, is_copy=False):
    """The run that this policy makes of a recording; by default the one that made it."""
    lab = stage_of(data, is_copy=is_copy)
    rate_rps = workload.rate(lab.work.arrivals)
    return lab.run(policy.named(chosen), label=chosen, seed=0, rate_rps=rate_rps)[1]
