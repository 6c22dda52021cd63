"""What keeping a journal costs: `python tests/bench/journal.py`.

A run of the lab with and without it; the difference is what a request pays on the dispatcher's thread.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dispatcher.journal import Journal, Recorder
from scheduler import recording
from scheduler.core import CoreSettings, Scheduler
from scheduler.sim import arriving, fleet, workload
from scheduler.sim.fleet import EndpointSpec, Fleet
from scheduler.sim.world import World

N = 2000
RATE_RPS = 60.0
FLEET = Fleet(name="sixteen", endpoints=(EndpointSpec(profile="a100", count=16),))
ROUNDS = 3


class Timed:
    """CPU seconds spent in a core: what others do on this machine does not count."""

    def __init__(self, core) -> None:
        self.core, self.spent_s = core, 0.0
        self.wakeup_at = core.wakeup_at

    def receive(self, event, now):
        begun = time.thread_time()
        self.core.receive(event, now)
        self.spent_s += time.thread_time() - begun

    def decide(self, now):
        begun = time.thread_time()
        commands = self.core.decide(now)
        self.spent_s += time.thread_time() - begun
        return commands


def run(path: Path | None) -> float:
    """Microseconds a request in the core, with a journal where a path is given."""
    rng = np.random.default_rng(0)
    rows = arriving.rows(
        tuple(
            workload.Arrival(
                at_s=float(at),
                prompt_tokens=int(np.clip(rng.lognormal(6.8, 1.0), 16, 12_000)),
                output_tokens=int(np.clip(rng.lognormal(4.0, 0.8), 2, 400)),
                blocks=tuple(int(one) for one in rng.integers(0, 1000, 8)),
                block_tokens=128,
                ttft_s=2.0,
            )
            for at in np.cumsum(rng.exponential(1 / RATE_RPS, N))
        )
    )
    settings = CoreSettings()
    core = Scheduler(settings, np.random.default_rng(0))
    if path is not None:
        head = recording.head(settings, seed=0, version="0", pool="bench")
        journal = Journal(head, lambda _: path.open("wb"), bytes_max=2**40)
        core = Recorder(core, journal)
    timed = Timed(core)
    World(rows, fleet.machines(FLEET, 0), delays=FLEET.delays, is_open=False).run(timed)
    return timed.spent_s / N * 1e6


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "journal"
        pairs = [(run(None), run(path)) for _ in range(ROUNDS)]
        size = path.stat().st_size / N
    without, with_ = (sorted(column)[ROUNDS // 2] for column in zip(*pairs, strict=True))
    sys.stdout.write(
        f"core alone {without:.0f} us of CPU a request, with a journal {with_:.0f}: "
        f"{with_ - without:.0f} us and {size:.0f} bytes a request\n"
    )


if __name__ == "__main__":
    main()
