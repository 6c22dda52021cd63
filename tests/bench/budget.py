"""What one request costs the dispatcher, stage by stage: the loop's own parts in one process, without a network.

    python tests/bench/budget.py [--turn 100] [--endpoints 16] [--passes 5] [--cold MB]

Each turn reads as many requests and rewards as a busy loop does, from Redis' own bytes, and ends with the bytes it
would send; the endpoints answer every job before the next turn. CPU time of the median turn in the best pass, in
microseconds a request. What `throughput.py` measures besides is the event loop and the system calls.
"""

import argparse
import gc
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import hiredis
import numpy as np
from parts import BODY, GROUPS
from rich.console import Console
from rich.table import Table

from dispatcher.cli.root import COLLECT_EVERY
from dispatcher.intake import Intake
from dispatcher.metrics import Meter
from dispatcher.moves import Moves
from dispatcher.streams import connection, replies
from scheduler import codec
from scheduler.core import CoreSettings, Scheduler
from scheduler.events import Assign
from scheduler.keys import Keys
from scheduler.wire.client import Request
from scheduler.wire.worker import Beat, Reward

KEYS = Keys("hg", "bench")
RATE = 5_000
"Requests a second in the core's own time: the bar."

WARM = 10
"Turns before any that counts."


class Clock:
    """CPU seconds by stage."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._at = time.process_time()

    def start(self) -> None:
        self._at = time.process_time()

    def lap(self, stage: str) -> None:
        now = time.process_time()
        self.spent[stage] += now - self._at
        self._at = time.process_time()


class Dispatcher:
    """The loop's parts in the loop's order."""

    def __init__(self, endpoints: int) -> None:
        self.core = Scheduler(CoreSettings(lease_s=1e9), np.random.default_rng(0))
        self.reader = Intake(KEYS, body_bytes=1 << 20)
        self.moves = Moves(KEYS, 1, self.reader, objectives={}, retention_s=60)
        self.meter = Meter()
        self.redis = hiredis.Reader()
        self.reasons = []
        "Of the turn before, as the loop logs them."
        for at in range(endpoints):
            beat = Beat(
                endpoint=f"e{at}", epoch=1, models=("m",), hardware="a100", max_num_seqs=256,
                kv_tokens=4_000_000, block_tokens=16, max_model_len=131_072,
            )  # fmt: skip
            self.core.receive(beat, 0.0)

    def turn(self, requests: bytes, rewards: bytes, now: float, clock: Clock) -> list[Assign]:
        clock.start()
        new, done = self.read(requests), self.read(rewards)
        clock.lap("parse replies")
        arrived = [self.reader.request(entry) for entry in new.get(KEYS.requests, ())]
        clock.lap("decode requests")
        rewarded = [self.reader.fact(KEYS.rewards, entry) for entry in done.get(KEYS.rewards, ())]
        clock.lap("decode rewards")
        for event in arrived:
            self.core.receive(event, now)
        clock.lap("core: take in the request")
        for event in rewarded:
            self.core.receive(event, now)
        clock.lap("core: learn from the reward")
        commands = self.core.decide(now)
        clock.lap("core: plan and hand over")
        assigned = [command for command in commands if isinstance(command, Assign)]
        moves = self.moves.of(arrived, [], commands, now, reasons=self.reasons)
        clock.lap("make the moves")
        words = [connection._words(move.call) for move in moves]
        sent = b"".join([hiredis.pack_command(one) for one in words])
        clock.lap("pack the commands")
        assert len(sent) > len(moves)
        self.core.settle()
        clock.lap("core: remember, once it is sent")
        self.reasons = [command.decision for command in assigned]
        clock.lap("say why, once it is sent")
        for event in (*arrived, *rewarded):
            self.meter.event(event, now)
        self.meter.commands(commands)
        clock.lap("count for /metrics")
        return assigned

    def read(self, reply: bytes) -> dict[str, list[connection.Entry]]:
        self.redis.feed(reply)
        return replies.plain(self.redis.gets())


def request(number: int) -> dict[str, str | bytes]:
    message = Request(
        id=f"r{number}", model="m", body=BODY, ttft_s=5.0, prompt_tokens=140,
        blocks=tuple(f"{number % GROUPS:x}.{i:x}" for i in range(8)), traceparent=str(10**18 + number),
    )  # fmt: skip
    return codec.encode(message)


def reward(assign: Assign, now: float, noise: float) -> dict[str, str | bytes]:
    """As a worker writes it, so that all is learned from: the engine is slower than declared, and never the same."""
    job = assign.job
    prefill_s = (0.02 + (job.prompt_tokens - job.cached_tokens) / 5_000) * noise
    admitted_at = now - 0.05 - prefill_s
    message = Reward(
        id=job.id, endpoint=assign.endpoint, epoch=1, attempt=1, outcome="completed", model="m", hardware="a100",
        decided_at=job.decided_at, pulled_at=admitted_at - 0.0005, admitted_at=admitted_at,
        first_token_at=admitted_at + prefill_s, finished_at=now, enqueued_at=job.enqueued_at, prefill_s=prefill_s,
        predicted_s=job.prefill_s, ttft_s=prefill_s + 0.002, tpot_s=0.0125 * noise, gap_max_s=0.02, prompt_tokens=140,
        output_tokens=5, cached_tokens=job.cached_tokens, on_time=True, features=job.features,
    )  # fmt: skip
    return codec.encode(message)


def reply(stream: str, entries: list[tuple[str, dict[str, str | bytes]]]) -> bytes:
    """What Redis answers to a read of one stream."""
    rows = [[entry.encode(), [_bytes(part) for pair in fields.items() for part in pair]] for entry, fields in entries]  # fmt: skip
    return b"".join(_resp([[stream.encode(), rows]]))


def _bytes(part: str | bytes) -> bytes:
    return part if isinstance(part, bytes) else part.encode()


def _resp(value: bytes | list) -> Iterator[bytes]:
    if isinstance(value, bytes):
        yield b"$%d\r\n%s\r\n" % (len(value), value)
        return
    yield b"*%d\r\n" % len(value)
    for part in value:
        yield from _resp(part)


def one_pass(turn: int, turns: int, endpoints: int, *, cold_mb: int) -> dict[str, float]:
    """Microseconds a request by stage, of the median turn; before each, others use the caches."""
    others = np.zeros(cold_mb << 17)
    made, now, number = Dispatcher(endpoints), 1_000.0, 0
    chance = random.Random(0)
    rewards: list[tuple[str, dict[str, str | bytes]]] = []
    by_turn: list[dict[str, float]] = []
    for _ in range(WARM + turns):
        now += turn / RATE
        stamp = round(now * 1e3)
        requests = [(f"{stamp}-{i}", request(number + i)) for i in range(turn)]
        number += turn
        others += 1.0
        clock = Clock()
        assigned = made.turn(
            reply(KEYS.requests, requests), reply(KEYS.rewards, rewards), now, clock
        )
        assert len(assigned) == turn, f"{len(assigned)} of {turn} were handed over"
        rewards = [
            (f"{stamp}-{i}", reward(one, now + turn / RATE, chance.lognormvariate(0, 0.1)))
            for i, one in enumerate(assigned)
        ]
        by_turn.append(clock.spent)
    counted = by_turn[WARM:]
    return {
        stage: statistics.median(one[stage] for one in counted) / turn * 1e6 for stage in counted[0]
    }


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--turn", type=int, default=100, help="requests, and rewards, in one turn")
    options.add_argument("--turns", type=int, default=100, help="in one pass")
    options.add_argument("--endpoints", type=int, default=16)
    options.add_argument("--passes", type=int, default=5)
    options.add_argument(
        "--cold",
        type=int,
        default=0,
        metavar="MB",
        help="write so much between turns, as others do",
    )
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    gc.set_threshold(COLLECT_EVERY, 10, 10)  # as the dispatcher does
    passes = [
        one_pass(given.turn, given.turns, given.endpoints, cold_mb=given.cold)
        for _ in range(given.passes)
    ]
    found = min(passes, key=lambda one: sum(one.values()))
    total = sum(found.values())
    table = Table(title="One request in the dispatcher, CPU", title_justify="left")
    for column in ("stage", "us", "share"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, us in sorted(found.items(), key=lambda row: -row[1]):
        table.add_row(stage, f"{us:.1f}", f"{us / total:.0%}")
    table.add_row("all of it", f"{total:.1f}", "")
    Console(width=100).print(table)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({"passes": passes}, indent=1))


if __name__ == "__main__":
    main()
