"""The whole core under any order of facts: the invariants that must hold whatever happens."""

import hashlib
import os
import subprocess
import sys

import msgspec
import numpy as np
from driving import Driven
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from scheduler import recording
from scheduler.core import CoreSettings, Scheduler
from scheduler.events import Abort, Arrived, Assign, Command, Finish, Forget, Reclaim
from scheduler.fairness import FairnessSettings
from scheduler.plan import PlanSettings
from scheduler.policies import BUILT_IN
from scheduler.profile.filters import Pace, Saturation
from scheduler.profile.pickers import WeightedRandom
from scheduler.profile.profile import Profile
from scheduler.profile.scorers import NoHitLru, PredictedLatency, PrefixCache, Queue
from scheduler.slo import Objective
from scheduler.wire.client import Control, Request
from scheduler.wire.worker import Beat, Reward

SETTINGS = CoreSettings(
    objectives={"chat": Objective(ttft_ms=500.0, max_queue_ms=4000.0)},
    plan=PlanSettings(horizon=16),
    waiting_max=30,
)
PROFILES = (
    None,
    Profile(filters=(Pace(), Saturation(queue_max=1)), scorers=(Queue(), PrefixCache(weight=3.0))),
    Profile(scorers=(PredictedLatency(), NoHitLru()), picker=WeightedRandom()),
)
MODELS = ("llama", "qwen")
ENDPOINTS = ("e0", "e1", "e2")


def beat_of(name: str, epoch: int, **fields: object) -> Beat:
    """A small endpoint, so that seats and KV bind."""
    models = MODELS if name == "e0" else MODELS[:1]
    defaults: dict[str, object] = {
        "models": models,
        "hardware": "a100",
        "max_num_seqs": 4,
        "kv_tokens": 20_000,
        "max_model_len": 16_000,
    }
    return Beat(endpoint=name, epoch=epoch, **{**defaults, **fields})  # type: ignore[arg-type]


class World(Driven):
    """Clients, workers and time, in any order."""

    def __init__(self) -> None:
        super().__init__(SETTINGS)
        self.entries: dict[str, str] = {}
        self.epochs: dict[str, int] = {}
        self.lost: set[str] = set()
        "Handed over, and never come to their workers."
        self.started: set[str] = set()
        self.prompted: set[str] = set()
        self.forgotten: set[str] = set()

    @initialize(
        policy=st.sampled_from(BUILT_IN),
        profile=st.sampled_from(PROFILES),
        quantum_tokens=st.sampled_from([0, 3000]),
    )
    def choose(self, policy, profile, quantum_tokens):
        """Whatever the policy, the profile and the shares, the invariants are the same."""
        fairness = FairnessSettings(quantum_tokens=quantum_tokens, weights={"gold": 3.0})
        self.begin(
            msgspec.structs.replace(SETTINGS, policy=policy(), profile=profile, fairness=fairness)
        )

    @rule(
        prompt=st.sampled_from([1, 50, 2_000, 9_000, 15_000, 17_000]),
        said=st.booleans(),
        model=st.sampled_from([*MODELS, "nobody"]),
        objective=st.sampled_from(["", "chat", "missing"]),
        ttft_s=st.sampled_from([None, 0.01, 0.3, 5.0]),
        deadline_s=st.sampled_from([None, 0.5, 10.0]),
        priority=st.sampled_from([None, -1, 2]),
        attempts=st.sampled_from([None, 1]),
        tenant=st.sampled_from(["", "gold", "lead"]),
    )
    def arrive(
        self, prompt, said, model, objective, ttft_s, deadline_s, priority, attempts, tenant
    ):
        self.count += 1
        request = Request(
            id=f"r{self.count}",
            model=model,
            body=b"" if said else b"x" * prompt,
            prompt_tokens=prompt if said else None,
            objective=objective,
            ttft_s=ttft_s,
            deadline_s=deadline_s,
            priority=priority,
            max_attempts=attempts,
            tenant=tenant,
            blocks=tuple(f"b{i}" for i in range(prompt // 1000)),
        )
        self.entries[request.id] = f"{self.count}-0"
        self.tell(Arrived(request=request, entry=f"{self.count}-0", enqueued_at=self.now))

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def repeat(self, data):
        """The same id again, under a new entry."""
        request = Request(
            id=data.draw(st.sampled_from(sorted(self.entries))), model="llama", body=b"x"
        )
        self.count += 1
        entry = f"{self.count}-0"
        self.forgotten.add(entry)
        self.tell(Arrived(request=request, entry=entry, enqueued_at=self.now))

    @rule(
        name=st.sampled_from(ENDPOINTS),
        state=st.sampled_from(["ready"] * 4 + ["draining", "away"]),
        names_held=st.booleans(),
    )
    def beat(self, name, state, names_held):
        epoch = self.epochs.setdefault(name, 1)
        mine = [i for i, job in self.held.items() if job.endpoint == name and i not in self.lost]
        holds = sorted(mine) if names_held else []
        started = [i for i in mine if i not in self.started][:2]
        first = [i for i in mine if i in self.started and i not in self.prompted][:1]
        self.started.update(started)
        self.prompted.update(first)
        self.tell(
            beat_of(
                name,
                epoch,
                state=state,
                started=tuple(f"{i}:{self.held[i].job.attempt}" for i in started),
                first_tokens=tuple(f"{i}:{self.held[i].job.attempt}:30" for i in first),
                read_at=self.now if names_held else None,
                holds=tuple(f"{i}:{self.held[i].job.attempt}" for i in holds),
            )
        )

    @rule(name=st.sampled_from(ENDPOINTS), newer=st.booleans())
    def restart(self, name, newer):
        """A worker's new life, or a late word of an old one."""
        epoch = self.epochs.get(name, 1)
        if newer:
            self.epochs[name] = epoch + 1
            self.tell(beat_of(name, epoch + 1))
        else:
            self.tell(beat_of(name, epoch - 1, state="away"))

    @precondition(lambda self: set(self.held) - self.started)
    @rule(data=st.data())
    def lose(self, data):
        """Between the stream and its worker."""
        self.lost.add(data.draw(st.sampled_from(sorted(set(self.held) - self.started))))

    @precondition(lambda self: set(self.held) - self.lost)
    @rule(
        data=st.data(),
        outcome=st.sampled_from(["completed", "completed", "returned", "failed", "stale"]),
        seconds=st.floats(0.001, 3.0),
    )
    def reward(self, data, outcome, seconds):
        request_id = data.draw(st.sampled_from(sorted(set(self.held) - self.lost)))
        job = self.held[request_id].job
        stale = outcome == "stale"
        self.tell(
            Reward(
                id=request_id,
                endpoint=self.held[request_id].endpoint,
                epoch=job.epoch,
                attempt=job.attempt - 1 if stale else job.attempt,
                outcome="completed" if stale else outcome,
                model=job.model,
                prefill_s=seconds,
                output_tokens=20,
                prompt_tokens=job.prompt_tokens,
                cached_tokens=0,
                features=job.features,
            )
        )
        if not stale:
            self.drop(request_id)
        if not stale and outcome != "returned":
            self.end(request_id, outcome)

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def cancel(self, data):
        self.tell(Control(action="cancel", id=data.draw(st.sampled_from(sorted(self.entries)))))

    @rule(name=st.sampled_from(ENDPOINTS), action=st.sampled_from(["drain", "resume"]))
    def drain(self, name, action):
        self.tell(Control(action=action, endpoint=name))

    def carry_out(self, command: Command) -> None:
        match command:
            case Assign():
                assert command.job.id not in self.held, "assigned twice"
                assert command.job.id not in self.terminal, "I2: assigned after its end"
                assert command.decision.reason
                self.held[command.job.id] = command
            case Reclaim():
                assert self.held[command.id].job.attempt == command.attempt
                if command.decision.reason.endswith("does not have it"):
                    assert command.id in self.lost, "taken from a worker that has it"
                self.drop(command.id)
            case Finish():
                assert command.result.id not in self.held, "ended while a worker holds it"
                assert command.result.reason
                self.end(command.result.id, command.result.outcome)
            case Abort():
                assert command.id in self.held
            case Forget():
                assert command.entry in self.forgotten
                self.forgotten.remove(command.entry)

    def drop(self, request_id: str) -> None:
        del self.held[request_id]
        self.lost.discard(request_id)
        self.started.discard(request_id)
        self.prompted.discard(request_id)

    @invariant()
    def conserves(self):
        """I1: every request that arrived waits, is held, or has ended; the core and its driver agree."""
        book = self.core._memory.book
        waiting, held = len(book.lines), sum(len(e.held) for e in book.fleet.endpoints.values())
        assert waiting + held == len(book.tickets)
        living = set(self.entries) - set(self.terminal)
        unsent = {c.result.id for c in self.core._memory.outbox._commands if isinstance(c, Finish)}
        assert set(book.tickets) == living - unsent
        assert book.lines.tokens == sum(
            t.prompt_tokens for t in [*book.lines.waiting, *book.lines.aside]
        )

    def teardown(self):
        """Nobody is stranded: given healthy endpoints and time, everything ends; and the log replays (I5)."""
        for name in ENDPOINTS:
            self.tell(Control(action="resume", endpoint=name))
        for _ in range(400):
            if set(self.terminal) == set(self.entries) and not self.forgotten:
                break
            for name in ENDPOINTS:
                self.beat(name, "ready", names_held=True)
            self.decide()
            for request_id in sorted(set(self.held) - self.lost):
                job = self.held[request_id]
                self.drop(request_id)
                self.end(request_id, "completed")
                self.tell(
                    Reward(
                        id=request_id,
                        endpoint=job.endpoint,
                        epoch=job.job.epoch,
                        attempt=job.job.attempt,
                        outcome="completed",
                        prefill_s=0.05,
                        features=job.job.features,
                    )
                )
            self.now += 0.5
        assert set(self.entries) - set(self.terminal) == set(), "somebody is stranded"
        assert not self.forgotten, "a duplicate was never acknowledged"
        self.replays()


def test_any_order_of_facts_keeps_the_invariants():
    """I1 conservation, I2 one terminal, I3 capacity, I4 time, I5 replay, and nobody is stranded."""
    run_state_machine_as_test(
        World,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            suppress_health_check=list(HealthCheck),
        ),
    )


def fixed_story() -> bytes:
    """A busy minute told with a fixed seed; the bytes of every command."""
    rng = np.random.default_rng(3)
    core = Scheduler(CoreSettings(), np.random.default_rng(7))
    now, sent = 0.0, []
    for step in range(300):
        now += 0.05
        if step % 10 == 0:
            for name in ENDPOINTS:
                core.receive(beat_of(name, 1), now)
        request = Request(
            id=f"r{step}", model="llama", prompt_tokens=int(rng.integers(10, 9000)), ttft_s=1.0
        )
        core.receive(Arrived(request=request, entry=f"{step}-0", enqueued_at=now), now)
        for command in core.decide(now):
            sent.append(command)
            if isinstance(command, Assign):
                job = command.job
                core.receive(
                    Reward(
                        id=job.id,
                        endpoint=command.endpoint,
                        epoch=1,
                        attempt=job.attempt,
                        outcome="completed",
                        prefill_s=job.prefill_s * float(rng.lognormal(0, 0.2)),
                        features=job.features,
                    ),
                    now,
                )
    return recording.encode([recording.plain(sent), core.snapshot()])


def test_i6_same_seed_same_bytes_under_any_hash_seed():
    """I6: a process with another hash seed writes the same bytes: nothing iterates a set."""
    script = "import hashlib, test_core_invariants as t; print(hashlib.sha256(t.fixed_story()).hexdigest())"
    env = {**os.environ, "PYTHONHASHSEED": "4242", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == hashlib.sha256(fixed_story()).hexdigest()
