"""Requests in two legs, whatever fails at either: the core's accounts under any order of facts."""

from driving import Driven
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from scheduler.core import CoreSettings
from scheduler.events import Abort, Arrived, Assign, Command, Finish, Reclaim, Recovered
from scheduler.wire.client import Control, Request
from scheduler.wire.words import KV_PARAMS_BYTES
from scheduler.wire.worker import Beat, Reward

SETTINGS = CoreSettings(kv_lease_s=2.0)
ROLES = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "both"}
HARDWARE = {"prefill": "h100", "decode": "v100", "both": "v100"}
"So that prompts are mostly computed apart."

PARAMS = b'{"remote_engine_id": "p"}'


def beat_of(name: str, epoch: int, **fields: object) -> Beat:
    """A small endpoint, so that seats and KV bind."""
    defaults: dict[str, object] = {
        "models": ("llama",),
        "roles": (ROLES[name],),
        "hardware": HARDWARE[ROLES[name]],
        "max_num_seqs": 3,
        "kv_tokens": 20_000,
        "max_model_len": 16_000,
        "link_gbps": 80.0,
        "kv_token_bytes": 131_072,
    }
    return Beat(endpoint=name, epoch=epoch, **{**defaults, **fields})  # type: ignore[arg-type]


class Pool(Driven):
    """Clients, workers and time, in any order."""

    def __init__(self) -> None:
        super().__init__(SETTINGS)
        self.epochs = dict.fromkeys(ROLES, 1)
        self.spoken: set[str] = set()
        self.params: dict[str, bytes] = {}
        "By request: what its last prefill leg handed over, and nobody has used."
        self.arrived: set[str] = set()
        self.requests: dict[str, Arrived] = {}
        self.attempts: dict[str, int] = {}
        self.legs: dict[str, str] = {}
        "By request: which part of it was assigned last."
        self.handovers: dict[str, int] = {}
        self.said: dict[str, Reward] = {}
        "By request: what its last prefill leg said when it had done its part."
        self.cancelled: set[str] = set()

    def end(self, request_id: str, outcome: str) -> None:
        super().end(request_id, outcome)
        self.params.pop(request_id, None)

    @rule(
        prompt=st.sampled_from([1, 2_000, 9_000, 15_000]),
        ttft_s=st.sampled_from([None, 0.3, 5.0]),
        tpot_s=st.sampled_from([None, 0.03]),
        deadline_s=st.sampled_from([None, 0.5, 10.0]),
    )
    def arrive(self, prompt, ttft_s, tpot_s, deadline_s):
        self.count += 1
        request = Request(
            id=f"r{self.count}",
            model="llama",
            prompt_tokens=prompt,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            deadline_s=deadline_s,
        )
        self.arrived.add(request.id)
        event = Arrived(request=request, entry=f"{self.count}-0", enqueued_at=self.now)
        self.requests[request.id] = event
        self.tell(event)

    @rule(name=st.sampled_from(sorted(ROLES)), state=st.sampled_from(["ready", "away"]))
    def beat(self, name, state):
        mine = [i for i, job in self.held.items() if job.endpoint == name]
        first = [i for i in mine if i not in self.spoken and self.held[i].job.leg != "prefill"][:1]
        self.spoken.update(first)
        words = tuple(f"{i}:{self.held[i].job.attempt}:30" for i in first)
        self.tell(beat_of(name, self.epochs[name], state=state, first_tokens=words))

    @rule(name=st.sampled_from(sorted(ROLES)))
    def restart(self, name):
        self.epochs[name] += 1
        self.tell(beat_of(name, self.epochs[name]))

    @precondition(lambda self: self.held)
    @rule(
        data=st.data(),
        how=st.sampled_from(["done"] * 4 + ["returned", "failed", "dumb", "huge"]),
    )
    def reward(self, data, how):
        """A leg ends: as it should, handed back, failed for good, or prefilled without usable words."""
        request_id = data.draw(st.sampled_from(sorted(self.held)))
        self.answer(request_id, how)

    def answer(self, request_id: str, how: str) -> None:
        command = self.held[request_id]
        job = command.job
        is_prefill = job.leg == "prefill"
        outcome, params = how, b""
        if how in ("done", "dumb", "huge"):
            outcome = "prefilled" if is_prefill else "completed"
            params = {"done": PARAMS, "dumb": b"", "huge": b"x" * (KV_PARAMS_BYTES + 1)}[how]
        self.drop(request_id)
        if outcome in ("completed", "failed"):
            self.end(request_id, outcome)
        elif outcome == "prefilled" and how == "done":
            self.params[request_id] = params
        reward = Reward(
            id=request_id,
            endpoint=command.endpoint,
            epoch=job.epoch,
            attempt=job.attempt,
            leg=job.leg,
            outcome=outcome,
            model="llama",
            pulled_at=self.now - 0.1,
            first_token_at=self.now,
            prefill_s=0.1,
            output_tokens=20,
            features=job.features,
            finished_at=self.now,
            kv_params=params if is_prefill else b"",
        )
        if outcome == "prefilled":
            self.handovers[request_id] = self.handovers.get(request_id, 0) + 1
            self.said[request_id] = reward
        self.tell(reward)

    @precondition(lambda self: self.arrived)
    @rule(data=st.data())
    def cancel(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.arrived)))
        self.cancelled.add(request_id)
        self.tell(Control(action="cancel", id=request_id))

    @rule()
    def wake(self):
        """All come back at once, which is where work begins."""
        for name in ROLES:
            self.beat(name, "ready")
        self.decide()

    @precondition(lambda self: self.held)
    @rule(loser=st.sampled_from([None, "p0", "p1"]))
    def prefilled(self, loser):
        """All prompts that are being computed are done, while nobody who decodes takes anything; then one is lost."""
        for name in ("d0", "d1"):
            self.beat(name, "away")
        for request_id in [i for i, job in self.held.items() if job.job.leg == "prefill"]:
            self.answer(request_id, "done")
        if loser is not None:
            self.restart(loser)
        self.decide()

    @rule(silent=st.sampled_from([None, "p0", "d0"]))
    def fail_over(self, silent):
        """A new leader knows what Redis holds, and of the endpoints those that have beaten."""
        self.decide()
        self.begin(SETTINGS)
        for name in ROLES:
            if name != silent:
                self.tell(beat_of(name, self.epochs[name]))
        for request_id in sorted(self.arrived - set(self.terminal)):
            self.tell(self.recovered(request_id))
        self.decide()

    def recovered(self, request_id: str) -> Recovered:
        """As the request's hash and the log of rewards say."""
        event, command = self.requests[request_id], self.held.get(request_id)
        said, attempt = self.said.get(request_id), self.attempts.get(request_id, 0)
        is_between = command is None and said is not None and said.attempt == attempt
        return Recovered(
            request=event.request,
            entry=event.entry,
            enqueued_at=event.enqueued_at,
            attempt=attempt,
            endpoint=command.endpoint if command else "",
            epoch=command.job.epoch if command else 0,
            leg=self.legs.get(request_id, "whole"),  # type: ignore[arg-type]
            handovers=self.handovers.get(request_id, 0),
            prefilled=said if is_between else None,
            cancelled=request_id in self.cancelled,
        )

    def carry_out(self, command: Command) -> None:
        match command:
            case Assign():
                self.take(command)
            case Reclaim():
                assert self.held[command.id].job.attempt == command.attempt
                self.drop(command.id)
            case Finish():
                assert command.result.id not in self.held, "ended while a worker holds it"
                self.end(command.result.id, command.result.outcome)
            case Abort():
                assert command.id in self.held
            case _:
                pass

    def take(self, command: Assign) -> None:
        """Each leg goes where that leg is served, and a decode leg brings what its prefill leg handed over."""
        job, role = command.job, ROLES[command.endpoint]
        assert job.id not in self.held, "assigned twice"
        assert job.id not in self.terminal, "I2: assigned after its end"
        assert job.leg == "prefill" if role == "prefill" else job.leg in ("whole", "decode")
        if job.leg == "decode":
            assert job.kv_params == self.params.pop(job.id), (
                "KV is used once, and by its own request"
            )
            assert job.kv_until_at is not None
            assert job.kv_until_at > self.now, "KV that may be forgotten already"
        else:
            assert not job.kv_params
            self.params.pop(job.id, None)
        self.held[job.id] = command
        self.attempts[job.id], self.legs[job.id] = job.attempt, job.leg

    def drop(self, request_id: str) -> None:
        del self.held[request_id]
        self.spoken.discard(request_id)

    @invariant()
    def conserves(self):
        """I1: every request waits, is held, stands between two legs, or has ended."""
        book = self.core._memory.book
        held = sum(len(e.held) for e in book.fleet.endpoints.values())
        assert len(book.lines) + held + len(book.legs.prefilled) == len(book.tickets)
        unsent = {c.result.id for c in self.core._memory.outbox._commands if isinstance(c, Finish)}
        assert set(book.tickets) == self.arrived - set(self.terminal) - unsent

    @invariant()
    def keeps_places(self):
        """What is kept or pledged belongs to somebody who lives."""
        book = self.core._memory.book
        fleet, legs = book.fleet, book.legs
        for request_id in legs.pledges:
            ticket = book.tickets[request_id]
            assert (ticket.leg, ticket.is_held) == ("prefill", True)
        for request_id in legs.kept:
            ticket = book.tickets[request_id]
            assert ticket.state == "prefilled" or (ticket.leg, ticket.is_held) == ("decode", True)
        for ticket in legs.prefilled:
            kept = legs.kept[ticket.id]
            living = fleet.endpoints.get(kept.endpoint)
            assert living is not None, "its KV went with its endpoint"
            assert living.epoch == kept.epoch, "its KV went with its endpoint's former life"

    def teardown(self):
        """Nobody is stranded, and the log replays (I5)."""
        for _ in range(400):
            if set(self.terminal) == self.arrived:
                break
            for name in ROLES:
                self.beat(name, "ready")
            self.decide()
            for request_id in list(self.held):
                self.answer(request_id, "done")
            self.now += 0.3
        assert self.arrived == set(self.terminal), "somebody is stranded"
        self.replays()


def test_any_failure_at_either_leg_keeps_the_invariants():
    """I1 conservation, I2 one terminal, I3 capacity, I5 replay; legs go where they are served; nobody is stranded."""
    run_state_machine_as_test(
        Pool,
        settings=settings(
            max_examples=100,
            stateful_step_count=60,
            suppress_health_check=list(HealthCheck),
        ),
    )
