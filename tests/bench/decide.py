# ruff: noqa: T201 - a bench prints
"""How long a decision takes: microseconds a request at 16 endpoints, all of a life in the core, and a full pool's steps.

    python tests/bench/decide.py [--passes 5]

Every pass decides the same, so that of each step the quickest counts: what others took from it by chance is left out,
and what a step itself takes longer stays in. Wall-clock figures of this machine; nothing is asserted.
"""

import argparse
import gc
import heapq
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from dispatcher.cli.root import COLLECT_EVERY
from scheduler.core import CoreSettings, Scheduler
from scheduler.events import Arrived, Assign, Event
from scheduler.wire.client import Request
from scheduler.wire.worker import Beat, Reward

TRUE_RATES = (50_000, 14_000, 13_000, 9_000)
"Tokens a second: never a function of the prediction, or the bench would chase its own tail."


ANSWER_S = 2.0
"From a first token to the last."


def beat(endpoint: str, *first_tokens: str) -> Beat:
    """Of one that has begun these since its last."""
    return Beat(
        endpoint=endpoint,
        epoch=1,
        models=("m",),
        hardware=("h100", "a100", "l40s", "a30")[int(endpoint[1:]) % 4],
        kv_tokens=400_000,
        max_model_len=131_072,
        first_tokens=first_tokens,
    )


def pool(endpoints: int) -> Scheduler:
    core = Scheduler(CoreSettings(lease_s=1e9), np.random.default_rng(0))
    for i in range(endpoints):
        core.receive(beat(f"e{i}"), 0.0)
    return core


def arrived(number: int, now: float, rng: np.random.Generator) -> Arrived:
    group = int(rng.integers(50))
    request = Request(
        id=f"r{number}",
        model="m",
        prompt_tokens=int(rng.lognormal(7.3, 0.8)),
        ttft_s=float(rng.choice([0.5, 1.0, 5.0])),
        blocks=tuple(f"{group}.{i}" for i in range(12)),
    )
    return Arrived(request=request, entry=f"{number}-0", enqueued_at=now)


def reward(assign: Assign, prefill_s: float) -> Reward:
    job = assign.job
    return Reward(
        id=job.id,
        endpoint=assign.endpoint,
        epoch=1,
        attempt=1,
        outcome="completed",
        prefill_s=prefill_s,
        predicted_s=job.prefill_s,
        cached_tokens=job.cached_tokens,
        output_tokens=100,
        prompt_tokens=job.prompt_tokens,
        model="m",
        features=job.features,
    )


def prefill_s(assign: Assign, rng: np.random.Generator) -> float:
    """What its prompt really takes."""
    job, speed = assign.job, TRUE_RATES[int(assign.endpoint[1:]) % 4]
    return (job.prompt_tokens - job.cached_tokens) / speed * float(rng.lognormal(0, 0.1))


Took = dict[str, list[float]]
"Seconds of each step, by what was done."


def flow(endpoints: int, rate: float, requests: int) -> Took:
    """Poisson arrivals at `rate`; each endpoint finishes prefills one after another as predicted, with noise."""
    rng = np.random.default_rng(1)
    core, now = pool(endpoints), 0.0
    took: Took = {"receive": [], "decide": [], "settle": [], "learn": []}
    free_at = dict.fromkeys((f"e{i}" for i in range(endpoints)), 0.0)
    done: list[tuple[float, Assign]] = []
    for number in range(requests):
        now += float(rng.exponential(1 / rate))
        done.sort(key=lambda item: item[0])
        while done and done[0][0] <= now:
            at, assign = done.pop(0)
            end = reward(assign, at - assign.job.decided_at)
            started = time.perf_counter()
            core.receive(end, now)
            core.settle()
            took["learn"].append(time.perf_counter() - started)
        newcomer = arrived(number, now, rng)
        started = time.perf_counter()
        core.receive(newcomer, now)
        took["receive"].append(time.perf_counter() - started)
        started = time.perf_counter()
        commands = core.decide(now)
        took["decide"].append(time.perf_counter() - started)
        started = time.perf_counter()
        core.settle()
        took["settle"].append(time.perf_counter() - started)
        for command in commands:
            if isinstance(command, Assign):
                begun_at = max(now, free_at[command.endpoint])
                free_at[command.endpoint] = begun_at + prefill_s(command, rng)
                done.append((free_at[command.endpoint], command))
    return took


def lives(endpoints: int, rate: float, requests: int) -> Took:
    """The same with first tokens and answers: each event is a turn of its own, which decides and settles."""
    rng = np.random.default_rng(1)
    core, number = pool(endpoints), itertools.count()
    took: Took = {"arrived": [], "decide": [], "first token": [], "reward": [], "settle": []}
    free_at = dict.fromkeys((f"e{i}" for i in range(endpoints)), 0.0)
    at = np.cumsum(rng.exponential(1 / rate, requests)).tolist()
    turns: list[tuple[float, int, str, Event]] = [
        (now, next(number), "arrived", arrived(i, now, rng)) for i, now in enumerate(at)
    ]
    while turns:
        now, _, kind, event = heapq.heappop(turns)
        started = time.perf_counter()
        core.receive(event, now)
        received = time.perf_counter()
        commands = core.decide(now)
        decided = time.perf_counter()
        core.settle()
        settled = time.perf_counter()
        took[kind].append(received - started)
        took["decide"].append(decided - received)
        took["settle"].append(settled - decided)
        for command in commands:
            if isinstance(command, Assign):
                name, job = command.endpoint, command.job
                free_at[name] = first_at = max(now, free_at[name]) + prefill_s(command, rng)
                told = beat(name, f"{job.id}:1:{1e3 * (first_at - job.decided_at):.0f}")
                end = reward(command, first_at - job.decided_at)
                heapq.heappush(turns, (first_at, next(number), "first token", told))
                heapq.heappush(turns, (first_at + ANSWER_S, next(number), "reward", end))
    return took


def full(endpoints: int, waiting: int, steps: int) -> Took:
    """Every step ends one prefill somewhere, so that something new may go; the lines are kept long."""
    rng = np.random.default_rng(2)
    core, now, took, flying, number = pool(endpoints), 0.0, [], [], 0
    for _ in range(steps + 50):
        while (
            (view := core._memory.book.lines) and len(view.waiting) < waiting
        ) or number < waiting:
            core.receive(arrived(number, now, rng), now)
            number += 1
        started = time.perf_counter()
        commands = core.decide(now)
        took.append(time.perf_counter() - started)
        core.settle()
        flying += [c for c in commands if isinstance(c, Assign)]
        now += 0.01
        if flying:
            job = flying.pop(int(rng.integers(len(flying)))).job
            owner = core._memory.book.tickets[job.id].endpoint
            core.receive(
                Reward(
                    id=job.id,
                    endpoint=owner,
                    epoch=1,
                    attempt=1,
                    outcome="completed",
                    prefill_s=job.prefill_s,
                    features=job.features,
                ),
                now,
            )
    return {"decide": took[50:]}


def at_once(endpoints: int, waiting: int) -> Took:
    """The first step, with everybody there and every endpoint idle."""
    rng = np.random.default_rng(2)
    core = pool(endpoints)
    for number in range(waiting):
        core.receive(arrived(number, 0.0, rng), 0.0)
    started = time.perf_counter()
    core.decide(0.0)
    return {"decide": [time.perf_counter() - started]}


def quickest(run: Callable[[], Took], passes: int) -> Took:
    """Each step's quickest."""
    found = [run() for _ in range(passes)]
    return {
        name: [min(same) for same in zip(*(took[name] for took in found), strict=True)]
        for name in found[0]
    }


def say(name: str, seconds: list[float]) -> None:
    us = sorted(1e6 * s for s in seconds)
    p50, p99 = us[len(us) // 2], us[int(0.99 * len(us))]
    print(
        f"  {name:8s} mean {statistics.fmean(us):7.1f} us  p50 {p50:7.1f}  p99 {p99:7.1f}  max {us[-1]:8.1f}"
    )


def say_lives(took: Took, requests: int) -> None:
    spent = {name: 1e6 * sum(seconds) / requests for name, seconds in took.items()}
    for name, us in {**spent, "all of it": sum(spent.values())}.items():
        print(f"  {name:12s} {us:7.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--passes", type=int, default=5)
    passes = parser.parse_args().passes
    gc.set_threshold(COLLECT_EVERY, 10, 10)  # as the dispatcher does
    for endpoints, rate in ((16, 60.0), (16, 160.0), (16, 320.0), (100, 600.0)):
        print(f"{endpoints} endpoints, {rate:.0f} requests/s")
        for name, seconds in quickest(partial(flow, endpoints, rate, 2000), passes).items():
            say(name, seconds)
    for rate in (60.0, 320.0):
        print(f"16 endpoints, {rate:.0f} requests/s, all of a life: us a request")
        say_lives(quickest(partial(lives, 16, rate, 2000), passes), 2000)
    print("100 endpoints, 1,000 waiting")
    say("decide", quickest(partial(full, 100, 1000, 1000), passes)["decide"])
    for endpoints in (16, 64):
        print(f"{endpoints} idle endpoints, 1,000 come at once")
        say("decide", quickest(partial(at_once, endpoints, 1000), passes)["decide"])


if __name__ == "__main__":
    main()
