"""What no policy can beat: lower bounds on the mean time to first token, an upper one on the share on time.

Both pool the fleet into one server that prefills as fast as all endpoints together, sees every earlier block in
every cache, decodes nothing and can be interrupted for free. The endpoints are taken as they really are.

For the share on time there is a closer one (`relaxation`), where a request has one endpoint at a time; it takes seconds.

Where the first arrivals are a run-in, they fill the caches and nothing else: without them whoever comes later can only
be sooner, so the bound of those alone holds for them.
"""

from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np

from scheduler.sim import relaxation
from scheduler.sim.fleet import Machine
from scheduler.sim.workload import Arrival
from scheduler.state import Floats


def service_s(machine: Machine, prompt_tokens: int, cached_tokens: int = 0) -> float:
    """Seconds from admission to first token on an endpoint that does nothing else."""
    budget = machine.settings.max_num_batched_tokens
    done, seconds = cached_tokens, machine.actual.frontend_s
    while done < prompt_tokens:
        chunk = min(budget, prompt_tokens - done)
        attention = chunk * done + chunk * chunk // 2 + 1
        seconds += machine.actual.step_s(1, chunk, attention)
        done += chunk
    return seconds


def work_s(machine: Machine, prompt_tokens: int, cached_tokens: int = 0) -> float:
    """The part of it that the best batching leaves: its tokens' share of full steps, and their attention.

    No step has more tokens than the engine's budget, and a token costs least in a full one.
    """
    budget = machine.settings.max_num_batched_tokens
    own = prompt_tokens - cached_tokens
    pairs = own * cached_tokens + own * own / 2
    return own * machine.actual.step_s(0, budget) / budget + machine.actual.coef.ap * pairs / 1e9


def cached_at_best(arrivals: Sequence[Arrival]) -> list[int]:
    """Prompt tokens that some earlier arrival had, for each: what an endless shared cache would spare."""
    seen: set[tuple[int, int]] = set()
    found = []
    for arrival in arrivals:
        blocks = list(enumerate(arrival.blocks))
        n_cached = next((at for at, block in enumerate(blocks) if block not in seen), len(blocks))
        found.append(min(n_cached * arrival.block_tokens, arrival.prompt_tokens - 1))
        seen.update(blocks)
    return found


def ttft_mean_s(
    arrivals: Sequence[Arrival], machines: Sequence[Machine], *, first: int = 0
) -> float:
    """The larger of two lower bounds on the mean: each alone on its fastest endpoint, and the pooled server's SRPT.

    Only of those from the place `first` on, here and below.
    """
    if not arrivals[first:]:
        return 0.0
    at_s = np.array([arrival.at_s for arrival in arrivals])
    flow = srpt_mean_s(at_s[first:], pooled_s(arrivals, machines)[first:])
    return max(alone_mean_s(arrivals, machines, first=first), flow)


def alone_mean_s(
    arrivals: Sequence[Arrival], machines: Sequence[Machine], *, first: int = 0
) -> float:
    """Mean of each alone on its fastest endpoint with all that came before in its cache."""
    cached_at = cached_at_best(arrivals)
    alone = [
        min(
            service_s(machine, arrival.prompt_tokens, _spared(machine, cached))
            for machine in machines
        )
        for arrival, cached in zip(arrivals[first:], cached_at[first:], strict=True)
    ]
    return float(np.mean(alone))


def on_time_share(
    arrivals: Sequence[Arrival], machines: Sequence[Machine], *, ttft_s: float, first: int = 0
) -> float:
    """The most that can keep a TTFT promise which is the same for all: the pooled server's exact optimum."""
    if not arrivals[first:]:
        return 1.0
    at_s = np.array([arrival.at_s for arrival in arrivals[first:]])
    work = pooled_s(arrivals, machines)[first:]
    return most_on_time(at_s, work, ttft_s - _frontend_s(machines)) / len(at_s)


def on_time_apart_share(
    arrivals: Sequence[Arrival], machines: Sequence[Machine], *, ttft_s: float, first: int = 0
) -> float:
    """The same where no two endpoints serve one request at once, and at most the pooled one's; takes seconds."""
    if not arrivals[first:]:
        return 1.0
    at_s = np.array([arrival.at_s for arrival in arrivals[first:]])
    work = works_s(arrivals, machines)[first:]
    most = relaxation.most_on_time(at_s, work, ttft_s - _frontend_s(machines))
    return min(most / len(at_s), on_time_share(arrivals, machines, ttft_s=ttft_s, first=first))


def pooled_s(arrivals: Sequence[Arrival], machines: Sequence[Machine]) -> Floats:
    """Each request's seconds on the pooled server."""
    return pooled(works_s(arrivals, machines))


def pooled(work: Floats) -> Floats:
    """Seconds on a server that is all of them; float64[n, n_machines] to float64[n].

    A second of each machine is worth what it does of the whole's usual work, and a request takes the machine where that
    is least. Where one is better at this and another at that, all of them working on each would do less than they can.

    >>> pooled(np.array([[1.0, 10.0], [10.0, 1.0]]))  # both can have ended after a second
    array([0.5, 0.5])
    """
    if not len(work):
        return np.zeros(0)
    speed = 1.0 / work.mean(axis=0)
    least: Floats = (work * speed / speed.sum()).min(axis=1)
    return least


def works_s(arrivals: Sequence[Arrival], machines: Sequence[Machine]) -> Floats:
    """Each request's `work_s` on each endpoint with every earlier block in its cache; float64[n, n_machines]."""
    return np.array(
        [
            [work_s(one, arrival.prompt_tokens, _spared(one, cached)) for one in machines]
            for arrival, cached in zip(arrivals, cached_at_best(arrivals), strict=True)
        ]
    )


def srpt_mean_s(at_s: Floats, work: Floats) -> float:
    """Mean time in system on one server that always serves what has least left (Schrage 1968): the least possible.

    >>> srpt_mean_s(np.array([0.0, 1.0]), np.array([4.0, 1.0]))
    3.0
    """
    left: list[tuple[float, int]] = []
    now = total = 0.0
    coming = 0
    while coming < len(at_s) or left:
        if not left:
            now = max(now, float(at_s[coming]))
        while coming < len(at_s) and at_s[coming] <= now:
            heappush(left, (float(work[coming]), coming))
            coming += 1
        rest, who = heappop(left)
        until = float(at_s[coming]) if coming < len(at_s) else np.inf
        if now + rest <= until:
            now += rest
            total += now - float(at_s[who])
        else:
            heappush(left, (rest - (until - now), who))
            now = until
    return total / len(at_s)


def most_on_time(at_s: Floats, work: Floats, allowed_s: float) -> int:
    """How many of these one server can end within `allowed_s` of their arrival, at most.

    Due moments come in the order of arrivals, which makes the greedy rule exact (Kise, Ibaraki and Mine 1978):
    where the newest would be late, drop the one without which all end soonest.

    >>> most_on_time(np.array([0.0, 0.0, 1.0]), np.array([3.0, 1.0, 1.0]), 3.0)
    2
    """
    # ends[i]: the last end, were the i-th of those kept the first of its busy period.
    ends, kept = np.zeros(0), np.zeros(0)
    for at, work_of_it in zip(at_s.tolist(), work.tolist(), strict=True):
        if work_of_it > allowed_s:
            continue
        ends = np.append(ends + work_of_it, at + work_of_it)
        kept = np.append(kept, work_of_it)
        if ends.max() <= at + allowed_s + 1e-9:
            continue
        before = np.maximum.accumulate(np.concatenate([[-np.inf], ends[:-1]]))
        behind = np.maximum.accumulate(np.concatenate([ends[1:], [-np.inf]])[::-1])[::-1]
        out = int(np.maximum(before - kept, behind).argmin())
        ends[:out] -= kept[out]
        ends, kept = np.delete(ends, out), np.delete(kept, out)
    return len(kept)


def _frontend_s(machines: Sequence[Machine]) -> float:
    return min(machine.actual.frontend_s for machine in machines)


def _spared(machine: Machine, cached: int) -> int:
    return cached if machine.settings.prefix_caching else 0
