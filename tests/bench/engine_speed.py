"""How many simulated requests a minute one core manages: `python tests/bench/engine_speed.py`.

Sixteen engines, Poisson arrivals to the least loaded, noise and stalls on, every engine
brought up to each arrival, as a lab's dispatcher would see it.
"""

import sys
import time

import numpy as np

from scheduler.sim import profile
from scheduler.sim.arguments import EngineSettings
from scheduler.sim.engine import Engine
from scheduler.sim.sequence import Sequence

N_ENGINES = 16
N_REQUESTS = 5000
PER_S = 40.0


def arrivals(rng):
    """Log-normal lengths near those of public chat traces; a quarter of the prompt is shared."""
    prompts = np.minimum(rng.lognormal(7.0, 1.0, N_REQUESTS).astype(int) + 16, 16_000).tolist()
    outputs = np.minimum(rng.lognormal(5.3, 0.8, N_REQUESTS).astype(int) + 2, 2000).tolist()
    times = np.cumsum(rng.exponential(1 / PER_S, N_REQUESTS)).tolist()
    for number, (at, prompt, output) in enumerate(zip(times, prompts, outputs, strict=True)):
        n_blocks = prompt // 16
        group = number % 200 << 32
        keys = [group + i if i < 32 else (number + 1000 << 32) + i for i in range(n_blocks)]
        yield Sequence(
            str(number), prompt_tokens=prompt, output_tokens=output, keys=keys, arrived_at=at
        )


def run(engine, now, until):
    """Bring an engine up to `until`; where its clock stands, and its steps."""
    n_steps = 0
    while now < until and (step := engine.step(now, until)) is not None:
        now = step.ended_at
        n_steps += step.n_steps
    return now, n_steps


def main():
    settings = EngineSettings(step_noise=0.07, stall_probability=0.01, max_num_batched_tokens=8192)
    gpu = profile.load("a100")
    engines = [Engine(gpu, settings, np.random.default_rng(i)) for i in range(N_ENGINES)]
    clocks, n_steps = [0.0] * N_ENGINES, 0
    requests = list(arrivals(np.random.default_rng(0)))
    began = time.perf_counter()
    for request in requests:
        for index, engine in enumerate(engines):
            now, more = run(engine, clocks[index], request.arrived_at)
            clocks[index] = max(now, request.arrived_at)
            n_steps += more
        min(engines, key=lambda engine: engine.n_running + engine.n_waiting).add(request)
    for index, engine in enumerate(engines):
        n_steps += run(engine, clocks[index], float("inf"))[1]
    took_s = time.perf_counter() - began
    tokens = sum(engine.counters.generation_tokens for engine in engines)
    sys.stdout.write(
        f"{N_REQUESTS / took_s * 60:,.0f} requests/min, {n_steps / took_s:,.0f} steps/s, "
        f"{tokens / took_s:,.0f} tokens/s, mean batch {tokens / n_steps:.1f}\n"
    )


if __name__ == "__main__":
    main()
