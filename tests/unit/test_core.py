"""The core's behaviour, one fact at a time. Time is a number here."""

import gc

import msgspec
import numpy as np
import planned
import pytest

from scheduler import cost
from scheduler.core import CoreSettings, Scheduler
from scheduler.endpoints import FORGIVEN_MAX, MISSED_S
from scheduler.events import (
    Abort,
    Arrived,
    Assign,
    Command,
    Finish,
    Forget,
    Note,
    Reclaim,
    Recovered,
    Refused,
)
from scheduler.fairness import FairnessSettings
from scheduler.plan import PlanSettings
from scheduler.planning import TICK_S
from scheduler.policies import Fcfs, Urgency
from scheduler.profile.pickers import Random
from scheduler.profile.profile import Profile
from scheduler.slo import Objective
from scheduler.speed import YOUNG
from scheduler.view import Snapshot
from scheduler.wire.client import Control, Request
from scheduler.wire.worker import Beat, Reward

A100_TOKEN_S = 1 / 16_000


WIDE = PlanSettings(commit_window_s=1.0)
"Wide enough that something still starts behind the first."


class Pool:
    """A core and its clock: what a driver would do, in the fewest words."""

    def __init__(self, **settings: object) -> None:
        self.core = Scheduler(CoreSettings(**settings), np.random.default_rng(0))  # type: ignore[arg-type]
        self.now = 100.0
        self.entries = 0

    def beat(self, name: str = "e0", epoch: int = 1, **fields: object) -> None:
        fields = {"models": ("m",), "hardware": "a100", **fields}
        self.core.receive(Beat(endpoint=name, epoch=epoch, **fields), self.now)  # type: ignore[arg-type]

    def ask(self, request_id: str, **fields: object) -> None:
        self.entries += 1
        fields = {"model": "m", "prompt_tokens": 100, **fields}
        request = Request(id=request_id, **fields)  # type: ignore[arg-type]
        self.core.receive(
            Arrived(request=request, entry=f"{self.entries}-0", enqueued_at=self.now), self.now
        )

    def reward(self, assign: Assign, outcome: str = "completed", **fields: object) -> None:
        job = assign.job
        reward = Reward(
            id=job.id,
            endpoint=assign.endpoint,
            epoch=job.epoch,
            attempt=job.attempt,
            outcome=outcome,
            features=job.features,
            **fields,  # type: ignore[arg-type]
        )
        self.core.receive(reward, self.now)

    def tell(self, event: object) -> None:
        self.core.receive(event, self.now)

    def decide(self, after_s: float = 0.0) -> list[Command]:
        """Commands but notes, `after_s` later."""
        self.now += after_s
        return [c for c in self.core.decide(self.now) if not isinstance(c, Note)]

    def notes(self) -> list[str]:
        return [c.decision.kind for c in self.core.decide(self.now) if isinstance(c, Note)]


@pytest.mark.parametrize("keep_clear", [0.0, 1.0])
def test_prompts_that_nobody_can_have_in_time_keep_to_the_slow(keep_clear):
    """Short prompts come that can hardly wait, then three that would take 2 s of half a second: off, each has an endpoint."""
    pool = Pool(plan=PlanSettings(keep_clear=keep_clear))
    for turn in range(200):
        pool.beat("slow", hardware="l40s")
        pool.beat("quick-0")
        pool.beat("quick-1")
        pool.ask(f"short{turn}", prompt_tokens=3000, ttft_s=0.21)
        for command in pool.decide(after_s=0.01):
            pool.now += 0.1
            pool.reward(command, prefill_s=0.19)
    for name in ("a", "b", "c"):
        pool.ask(name, prompt_tokens=30_000, ttft_s=0.5)

    taken = [command.endpoint for command in pool.decide() if isinstance(command, Assign)]

    assert sorted(taken) == (["slow"] if keep_clear else ["quick-0", "quick-1", "slow"])


def test_whoever_waits_for_its_prefix_goes_elsewhere_at_the_moment_named():
    """Nothing need happen meanwhile: `wakeup_at` names the end of its patience, and then it is handed over."""
    pool = Pool(plan=PlanSettings(cache_patience=0.5))
    pool.beat("e0", kv_tokens=4000)
    blocks = tuple(f"b{at}" for at in range(62))
    pool.ask("first", prompt_tokens=2000, blocks=blocks)
    (first,) = pool.decide()
    pool.reward(first, prompt_tokens=2000, output_tokens=10)
    pool.ask("other", prompt_tokens=3000)
    (other,) = pool.decide()
    assert (first.endpoint, other.endpoint) == ("e0", "e0")
    pool.beat("e0", kv_tokens=4000, first_tokens=(f"other:{other.job.attempt}:200",))
    pool.beat("e1", kv_tokens=4000)

    pool.ask("again", prompt_tokens=2000, blocks=blocks)
    assert pool.decide() == []
    patience_s = pool.core.wakeup_at() - pool.now
    assert 0 < patience_s < 0.5 * 2000 * 2 * A100_TOKEN_S
    assert pool.decide(after_s=0.9 * patience_s) == []
    (again,) = pool.decide(after_s=0.1 * patience_s + 1e-9)

    assert (again.job.id, again.endpoint) == ("again", "e1")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="the plan"),
        pytest.param({"profile": planned.of_plan(fill=0.4, tie=0.02)}, id="a profile"),
        pytest.param({"fairness": FairnessSettings(quantum_tokens=1000)}, id="tenants"),
    ],
)
def test_a_turn_leaves_nothing_to_the_garbage_collector(settings):
    """What a step made is gone with it: in cycles it would pile up, and be cleared away in one long pause."""
    pool = Pool(**settings)
    pool.beat("p", roles=("prefill",), link_gbps=100.0, kv_token_bytes=1000.0)
    pool.beat("d", link_gbps=100.0, kv_token_bytes=1000.0)
    pool.ask("r0", tpot_s=0.05, ttft_s=1.0)
    pool.decide()
    gc.collect()
    gc.disable()
    try:
        for at in range(1, 20):
            pool.ask(f"r{at}", tpot_s=0.05, ttft_s=1.0)
            pool.decide(after_s=0.1)

        assert gc.collect() == 0
    finally:
        gc.enable()


class TestArrival:
    def test_a_request_goes_to_the_endpoint_that_serves_it(self):
        """An assignment carries the promise, the attempt, the features and a reason in words."""
        pool = Pool()
        pool.beat("other", models=("x",))
        pool.beat("e0")
        pool.ask("r", ttft_s=1.0, tenant="t")

        [assign] = pool.decide()

        assert isinstance(assign, Assign)
        assert (assign.endpoint, assign.job.attempt, assign.job.epoch) == ("e0", 1, 1)
        assert (assign.job.ttft_s, assign.job.tenant) == (1.0, "t")
        assert {f.split("=")[0] for f in assign.job.features} >= {"tokens", "overhead", "start"}
        assert "e0" in assign.decision.reason
        assert 0 < assign.decision.slack_s < 1.0

    def test_what_is_learned_from_is_what_was_predicted_with(self):
        """Untaught, the five terms that ride in the job add up to its prediction, whatever stands before it."""
        pool = Pool(plan=WIDE)
        pool.beat("e0")
        for name in "abc":
            pool.ask(name, prompt_tokens=2000)

        assigned = pool.decide()

        assert [a.job.id for a in assigned] == ["a", "b", "c"]
        for behind, assign in enumerate(assigned):
            terms = dict(feature.split("=") for feature in assign.job.features)
            seconds = sum(float(terms[name]) for name in cost.FEATURES)
            predicted_s = assign.decision.start_s + assign.decision.prefill_s
            assert seconds == pytest.approx(predicted_s, rel=1e-4)
            assert seconds > (1 + behind) * 2000 * A100_TOKEN_S

    def test_who_is_handed_over_at_once_is_logged_once(self):
        """That it was read is part of its assignment; of who waits it is a line of its own."""
        pool = Pool()
        pool.ask("waits")
        assert pool.notes() == ["read"]
        pool.beat("e0")
        pool.ask("goes")
        assert pool.notes() == []

    def test_an_expected_length_is_planned_with(self):
        """Of a deadline a long answer leaves less to spare; the worker is told what was expected."""
        pool = Pool()
        pool.beat("e0")
        pool.ask("short", deadline_s=30.0, expected_tokens=10)
        [short] = pool.decide()
        pool.reward(short)
        pool.ask("long", deadline_s=30.0, expected_tokens=400)
        [long] = pool.decide()

        assert (short.job.expected_tokens, long.job.expected_tokens) == (10, 400)
        assert short.decision.slack_s > long.decision.slack_s + 5.0

    def test_an_unknown_objective_is_invalid_and_names_what_exists(self):
        """Theirs to mend: the reason says what was found and what is wanted."""
        pool = Pool(objectives={"chat": Objective(), "batch": Objective()})
        pool.ask("r", objective="chad")

        [finish] = pool.decide()

        assert isinstance(finish, Finish)
        assert finish.result.outcome == "invalid"
        assert finish.is_dead
        assert "'chad'" in finish.result.reason
        assert "batch, chat" in finish.result.reason

    def test_a_deadline_that_has_passed_expires_at_once(self):
        """Deadlines are absolute from the enqueue, also for an entry that lay in Redis for a while."""
        pool = Pool()
        request = Request(id="r", model="m", deadline_s=5.0)
        pool.tell(Arrived(request=request, entry="1-0", enqueued_at=pool.now - 6.0))

        [finish] = pool.decide()

        assert finish.result.outcome == "expired"

    def test_a_waiting_request_expires_when_the_core_asked_to_be_woken(self):
        """`wakeup_at` names the moment; nothing is said before it, the end is said at it."""
        pool = Pool()
        pool.ask("r", deadline_s=5.0)
        assert pool.decide() == []
        assert pool.core.wakeup_at() == pool.now + 5.0

        [finish] = pool.decide(after_s=5.0)

        assert finish.result.outcome == "expired"
        assert pool.core.wakeup_at() is None

    def test_an_id_under_another_entry_is_forgotten_whether_it_lives_or_has_ended(self):
        """Redis clients repeat a lost reply: the second entry is acknowledged and nothing is written."""
        pool = Pool()
        pool.beat()
        pool.ask("r")
        pool.ask("r")
        forget, assign = pool.decide()
        assert isinstance(forget, Forget)
        assert forget.entry == "2-0"

        pool.reward(assign)
        pool.ask("r")

        assert [type(c) for c in pool.decide()] == [Forget]

    def test_the_same_entry_read_twice_changes_nothing(self):
        """A new reader starts a little before the old one's end."""
        pool = Pool()
        pool.ask("r")
        pool.entries = 0
        pool.ask("r")

        assert pool.decide() == []
        assert pool.core.view(pool.now).waiting == 1

    def test_more_than_may_wait_is_rejected_with_a_time_to_come_back(self):
        """Admission is explicit: the client knows when to try again."""
        pool = Pool(waiting_max=1)
        pool.ask("a")
        pool.ask("b")

        [finish] = pool.decide()

        assert (finish.result.id, finish.result.outcome) == ("b", "rejected")
        assert finish.result.retry_after_s >= 1.0

    def test_who_may_be_shed_makes_room_in_a_full_line(self):
        """The last of a priority below 0 ends for one of 0 or more, and for no other of its kind."""
        pool = Pool(waiting_max=3)
        for name, priority in (("a", -1), ("b", 0), ("c", -2), ("d", -1), ("e", 0), ("f", 5)):
            pool.ask(name, priority=priority)

        ends = {finish.result.id: finish.result for finish in pool.decide()}

        assert {name: end.outcome for name, end in ends.items()} == dict.fromkeys("dca", "rejected")
        assert "shed at priority -2" in ends["c"].reason
        assert ends["c"].retry_after_s >= 1.0

    @pytest.mark.parametrize("quantum_tokens", [0, 1000])
    def test_who_comes_back_keeps_his_arrival_in_a_full_line(self, quantum_tokens):
        """Handed back by an endpoint, the oldest is not the latest who joined, whoever it is that gives way."""
        pool = Pool(waiting_max=2, fairness=FairnessSettings(quantum_tokens=quantum_tokens))
        pool.beat(max_num_seqs=1)
        pool.ask("old", priority=-1)
        [assign] = pool.decide()
        pool.now += 1.0
        pool.ask("young", priority=-1)
        pool.reward(assign, "returned")

        pool.ask("new", tenant="other")

        [finish] = [c for c in pool.decide() if isinstance(c, Finish)]
        assert (finish.result.id, finish.result.outcome) == ("young", "rejected")

    def test_the_longest_line_makes_room_in_a_full_pool(self):
        """A tenant that floods the pool is refused, and no other: its last gives way, its own newcomers are rejected."""
        weights = FairnessSettings(quantum_tokens=1000, weights={"gold": 2.0})
        pool = Pool(waiting_max=6, fairness=weights)
        flood = [(f"f{n}", "flood") for n in range(6)]
        for name, tenant in (
            *flood,
            ("g0", "gold"),
            ("s0", "small"),
            ("f6", "flood"),
            ("g1", "gold"),
        ):
            pool.ask(name, tenant=tenant)

        ends = {finish.result.id: finish.result for finish in pool.decide()}

        assert {name: end.outcome for name, end in ends.items()} == dict.fromkeys(
            ("f5", "f4", "f6", "f3"), "rejected"
        )
        assert (
            "the last of tenant 'flood', whose line is the longest: 6 requests wait"
            in ends["f5"].reason
        )
        assert "the limit is 6" in ends["f6"].reason
        assert ends["f5"].retry_after_s >= 1.0

    def test_an_objective_may_refuse_to_wait(self):
        """`max_queue_ms`: still without endpoint after that long, it is rejected."""
        pool = Pool(objectives={"now": Objective(max_queue_ms=250.0)})
        pool.ask("r", objective="now")
        assert pool.decide(after_s=0.125) == []

        [finish] = pool.decide(after_s=0.125)

        assert finish.result.outcome == "rejected"

    def test_a_prompt_longer_than_every_context_is_invalid(self):
        """Where the client itself counted it."""
        pool = Pool()
        pool.beat(max_model_len=1000)
        pool.ask("said", prompt_tokens=1001)

        [finish] = pool.decide()

        assert finish.result.outcome == "invalid"
        assert "1001" in finish.result.reason
        assert "1000" in finish.result.reason

    @pytest.mark.parametrize(
        "fields",
        [
            pytest.param({"prompt_tokens": None, "body": b"x" * 8000}, id="by its bytes"),
            pytest.param({"prompt_tokens": 2000, "prompt_estimated": True}, id="by its client"),
        ],
    )
    @pytest.mark.parametrize("is_early", [False, True])
    def test_a_guess_longer_than_every_context_is_tried(self, fields, is_early):
        """It may be wrong, and its engine judges: it neither ends unheard nor waits for ever."""
        pool = Pool(unknown_model_grace_s=2.0)
        if is_early:
            pool.ask("guessed", blocks=("b1", "b2"), **fields)
            assert pool.decide() == []
        pool.beat("short", max_model_len=500, kv_tokens=4000)
        pool.beat("long", max_model_len=1000, kv_tokens=4000)
        if not is_early:
            pool.ask("guessed", blocks=("b1", "b2"), **fields)

        commands = pool.decide()
        if is_early:
            assert commands == []
            for name, length in (("short", 500), ("long", 1000)):
                pool.beat(name, max_model_len=length, kv_tokens=4000)
            commands = pool.decide(after_s=2.0) or pool.decide()

        [assign] = commands
        assert isinstance(assign, Assign)
        assert assign.endpoint == "long"
        assert assign.job.prompt_tokens == 1000
        assert pool.core.view(pool.now).waiting == 0

    def test_a_model_nobody_ever_served_is_invalid_after_the_grace(self):
        """A typo is answered; the reason names the models served."""
        pool = Pool()
        pool.beat()
        pool.ask("r", model="lama")
        assert pool.decide() == []
        assert pool.core.wakeup_at() == pool.now + 2.0

        [finish] = pool.decide(after_s=2.0)

        assert finish.result.outcome == "invalid"
        assert "'lama'" in finish.result.reason
        assert "here: m" in finish.result.reason

    def test_without_any_endpoint_everything_waits(self):
        """Scale to zero: no fleet is no reason to refuse."""
        pool = Pool()
        pool.ask("r")

        assert pool.decide(after_s=3600.0) == []

    def test_a_model_that_was_served_once_is_waited_for(self):
        """A restart of its only endpoint makes a model no stranger."""
        pool = Pool()
        pool.beat("a")
        pool.beat("b", models=("n",))
        pool.decide(after_s=2.9)
        pool.beat("b", models=("n",))
        pool.decide(after_s=0.2)
        pool.ask("r")

        pool.decide(after_s=2.5)

        assert pool.core.view(pool.now).waiting == 1

    def test_a_stranger_counts_anew_where_nobody_was_left_to_know_it(self):
        """The only endpoint is gone for a while: the next one has its time to say what it serves."""
        pool = Pool(unknown_model_grace_s=5.0)
        pool.beat("e0")
        pool.ask("r", model="lama")
        pool.decide()
        pool.decide(after_s=3.0)
        pool.beat("e1")
        pool.decide()

        assert pool.decide(after_s=2.9) == []
        pool.beat("e1")
        assert [c.result.outcome for c in pool.decide(after_s=2.1)] == ["invalid"]

    def test_a_prompts_place_counts_its_seconds_in_this_pool(self):
        """As its endpoints compute them, and not as a usual one would."""
        pool = Pool(policy=Urgency())
        pool.beat(hardware="h100")
        pool.ask("first")
        pool.decide()
        pool.beat(hardware="h100", state="draining")

        pool.ask("r", prompt_tokens=8000, ttft_s=10.0)

        work_s = 8000 * cost.CLASSES["h100"].token_s
        asked = {"enqueued_at": pool.now, "due_at": pool.now + 10.0, "priority": 0}
        ticket = pool.core._memory.book.tickets["r"]
        assert ticket.rank == pytest.approx(Urgency().rank(work_s=work_s, **asked), rel=1e-9)
        assert Urgency().rank(work_s=2 * work_s, **asked) != pytest.approx(ticket.rank, rel=1e-9)

    def test_who_came_when_lengths_were_known_is_judged_at_once(self):
        """Nothing is left to wake up for but the lease."""
        pool = Pool(unknown_model_grace_s=2.0, lease_s=5.0)
        pool.beat(state="draining")
        pool.ask("r")
        pool.decide()

        assert pool.core.wakeup_at() == pool.now + 5.0

    def test_more_prompts_too_long_than_one_step_may_end_are_ended_by_the_next(self):
        """I8: with nobody left to judge, the core sleeps."""
        pool = Pool(unknown_model_grace_s=2.0, step_max=2)
        for name in ("r0", "r1", "r2"):
            pool.ask(name, prompt_tokens=5000)
        pool.beat(max_model_len=4096)
        pool.decide()
        pool.beat(max_model_len=4096)

        assert len(pool.decide(after_s=2.0)) == 2
        assert pool.core.wakeup_at() == pool.now
        assert len(pool.decide()) == 1
        assert pool.core.wakeup_at() > pool.now

    def test_a_guess_that_came_before_the_endpoints_is_cut_to_what_they_serve_once(self):
        """Then nothing is left to judge, and the core sleeps though it waits on."""
        pool = Pool(unknown_model_grace_s=2.0)
        pool.ask("r", prompt_tokens=5000, prompt_estimated=True)
        for _ in range(3):
            pool.beat(max_model_len=4096, state="draining")
            assert pool.decide(after_s=1.0) == []

        assert pool.core.view(pool.now).waiting == 1
        assert pool.core._memory.book.lines.tokens == 4096
        assert pool.core.wakeup_at() > pool.now

    @pytest.mark.parametrize(("features", "sent"), [((), ()), (("kv_events",), ("a", "b"))])
    def test_blocks_ride_to_who_can_tell_of_them(self, features, sent):
        """To a worker whose engine says nothing of its cache they would be bytes for nobody."""
        pool = Pool()
        pool.beat(features=features)
        pool.ask("r", blocks=("a", "b"))

        [assign] = pool.decide()

        assert assign.job.blocks == sent

    def test_whoever_was_served_is_not_judged_by_its_length_any_more(self):
        """It came before the endpoints, and the one that could hold it has left since."""
        pool = Pool(unknown_model_grace_s=5.0)
        pool.ask("r", prompt_tokens=5000)
        pool.beat("large", max_model_len=8192)
        pool.beat("small", max_model_len=4096)
        [assign] = pool.decide()
        pool.reward(assign)
        for _ in range(3):
            pool.beat("small", max_model_len=4096)
            assert pool.decide(after_s=2.0) == []

    def test_a_prompt_longer_than_any_context_ends_though_it_came_before_the_endpoints(self):
        """It is told so once they had their time to say what they serve; it must not wait for ever."""
        pool = Pool(unknown_model_grace_s=2.0)
        pool.ask("long", prompt_tokens=5000)
        pool.ask("short", prompt_tokens=100)
        pool.beat(max_model_len=4096)

        assert [c.job.id for c in pool.decide() if isinstance(c, Assign)] == ["short"]
        assert pool.core.wakeup_at() == pool.now + 2.0
        pool.beat(max_model_len=4096)
        (ending,) = pool.decide(2.0)

        assert isinstance(ending, Finish)
        assert (ending.result.id, ending.result.outcome) == ("long", "invalid")
        assert "5000" in ending.result.reason


class TestFleet:
    def test_silence_for_a_lease_gives_everything_back_with_its_arrival(self):
        """I1: what a lost endpoint held waits again, is fenced, and goes elsewhere as the next attempt."""
        pool = Pool()
        pool.beat("e0")
        pool.ask("r")
        [first] = pool.decide()
        pool.now += 1.0
        pool.beat("e1", hardware="l4")

        reclaim, second = pool.decide(after_s=2.0)

        assert isinstance(reclaim, Reclaim)
        assert (reclaim.endpoint, reclaim.attempt) == ("e0", 1)
        assert (second.endpoint, second.job.attempt) == ("e1", 2)
        assert second.job.enqueued_at == first.job.enqueued_at

    def test_each_endpoint_has_a_lease_of_its_own(self):
        """Three are heard one after the other, and each is lost at its moment, for which the core asks to be woken."""
        pool, left = Pool(), []
        for name in ("e0", "e1", "e2"):
            pool.beat(name)
            pool.now += 0.5
        pool.decide()
        for _ in range(3):
            pool.now = pool.core.wakeup_at()
            pool.decide()
            left.append((pool.now, [e.name for e in pool.core.view(pool.now).endpoints]))

        assert left == [(103.0, ["e1", "e2"]), (103.5, ["e2"]), (104.0, [])]
        assert pool.core.wakeup_at() is None

    def test_a_new_epoch_gives_back_what_the_old_one_held(self):
        """A worker's new life knows nothing of the old one's jobs."""
        pool = Pool()
        pool.beat()
        pool.ask("r")
        pool.decide()
        pool.beat(epoch=2)

        reclaim, again = pool.decide()

        assert isinstance(reclaim, Reclaim)
        assert (again.job.epoch, again.job.attempt) == (2, 2)

    def test_a_beat_of_an_older_epoch_is_ignored(self):
        """A replaced worker that still talks neither takes work nor gives any back."""
        pool = Pool()
        pool.beat(epoch=5)
        pool.ask("r")
        pool.decide()

        pool.beat(epoch=4, state="away", models=())

        assert pool.decide() == []
        assert pool.core.view(pool.now).endpoints[0].epoch == 5

    def test_attempts_run_out_into_failed_and_dead(self):
        """After its attempts a request is answered, and kept for people."""
        pool = Pool()
        pool.beat()
        pool.ask("r", max_attempts=1)
        pool.decide()
        pool.beat(started=("r:1",))
        pool.beat(epoch=2)

        reclaim, finish = pool.decide()

        assert isinstance(reclaim, Reclaim)
        assert (finish.result.outcome, finish.is_dead) == ("failed", True)
        assert finish.request is not None

    def test_an_attempt_that_no_engine_had_is_forgiven(self):
        """A restarted worker loses what it had not admitted: the request is tried again, but not for ever."""
        pool = Pool()
        pool.beat()
        pool.ask("r", max_attempts=1)
        pool.decide()
        for lost in range(FORGIVEN_MAX):
            pool.beat(epoch=2 + lost)
            reclaim, assign = pool.decide()
            assert isinstance(reclaim, Reclaim)
            assert assign.job.max_attempts == 2 + lost

        pool.beat(epoch=100)

        _, finish = pool.decide()
        assert finish.result.outcome == "failed"

    @pytest.mark.parametrize("state", ["draining", "away"])
    def test_an_endpoint_that_is_not_ready_gets_no_new_work(self, state):
        """It keeps what it has; others take what is new."""
        pool = Pool()
        pool.beat("e0")
        pool.ask("a")
        pool.decide()
        pool.beat("e0", state=state)
        pool.ask("b")

        assert pool.decide() == []

    def test_away_for_a_lease_is_lost_though_it_beats(self):
        """A worker whose engine is gone cannot keep its jobs alive by talking."""
        pool = Pool()
        pool.beat("e0")
        pool.ask("r")
        pool.decide()
        for _ in range(4):
            pool.beat("e0", state="away")
            pool.now += 1.0

        assert isinstance(pool.decide()[0], Reclaim)

    def test_a_person_drains_and_resumes(self):
        """Drained it takes nothing, whatever its beats say; resumed it does."""
        pool = Pool()
        pool.beat()
        pool.tell(Control(action="drain", endpoint="e0"))
        pool.ask("r")
        pool.beat()
        assert pool.decide() == []

        pool.tell(Control(action="resume", endpoint="e0"))

        assert [type(c) for c in pool.decide()] == [Assign]

    @pytest.mark.parametrize("is_known", [True, False])
    def test_who_is_drained_stays_so_until_resumed(self, is_known):
        """Away for a repair, under another leader, or said before it was ever heard: it does not come back by itself."""
        pool = Pool()
        if is_known:
            pool.beat("e0")
        pool.tell(Control(action="drain", endpoint="e0"))
        pool.decide(after_s=60.0)
        assert pool.core.view(pool.now).endpoints == ()
        heir = Pool()
        heir.core.restore(pool.core.snapshot())

        for one in (pool, heir):
            one.beat("e0", epoch=2)
            one.ask("r")
            assert one.decide() == []
            assert [end.state for end in one.core.view(one.now).endpoints] == ["drained"]
            one.tell(Control(action="resume", endpoint="e0"))
            assert [type(c) for c in one.decide()] == [Assign]

    def test_i3_seats_bind(self):
        """I3: one seat, one request; the next goes when the reward has freed it."""
        pool = Pool()
        pool.beat(max_num_seqs=1)
        pool.ask("a")
        pool.ask("b")
        [first] = pool.decide()
        assert pool.decide(after_s=1.0) == []

        pool.reward(first)

        assert [c.job.id for c in pool.decide()] == ["b"]

    def test_no_more_kv_is_given_away_than_the_engine_has_left(self):
        """Who says more than was expected fills it: the account has room, the engine has not, and so it waits."""
        pool = Pool()
        pool.beat(kv_tokens=10_000)
        pool.ask("long", prompt_tokens=1000)
        [first] = pool.decide()
        told = f"long:{first.job.attempt}"
        pool.beat(kv_tokens=10_000, started=(told,), first_tokens=(f"{told}:50",), kv_usage=0.95)

        pool.ask("next", prompt_tokens=1000)
        assert pool.decide() == []

        pool.beat(kv_tokens=10_000, kv_usage=0.2)
        assert [command.job.id for command in pool.decide()] == ["next"]

    @pytest.mark.parametrize(("tokens", "fits"), [(2500, True), (3000, False)])
    def test_what_came_since_the_engine_counted_is_taken_too(self, tokens, fits):
        """It says 4,000 of 10,000 and cannot know of the 3,000 that were handed over a moment ago, nor of their answer."""
        pool = Pool(plan=WIDE)
        pool.beat(kv_tokens=10_000, kv_usage=0.4)
        pool.ask("first", prompt_tokens=3000)
        assert len(pool.decide()) == 1
        pool.ask("next", prompt_tokens=tokens)

        assert len(pool.decide()) == fits

    def test_a_large_request_is_not_starved_by_small_ones(self):
        """KV for it is never free while small ones keep coming: its endpoint is kept from them until it fits."""
        pool = Pool(policy=Fcfs())
        pool.beat(kv_tokens=2000)
        for i in range(4):
            pool.ask(f"s{i}")
        running = [c for c in pool.decide() if isinstance(c, Assign)]
        pool.ask("large", prompt_tokens=1700)
        served = []
        for i in range(10):
            pool.ask(f"t{i}")
            if running:
                pool.reward(running.pop(0))
            new = [c for c in pool.decide(after_s=0.1) if isinstance(c, Assign)]
            running += new
            served += [c.job.id for c in new]

        assert served[0] == "large"

    def test_the_window_binds_late(self):
        """Only what starts within the commit window leaves; the rest follows as first tokens are seen."""
        pool = Pool(policy=Fcfs(), plan=WIDE)
        pool.beat()
        for i in range(10):
            pool.ask(f"r{i}", prompt_tokens=8000)
        first = pool.decide()
        assert [c.job.id for c in first] == ["r0", "r1"]
        assert pool.decide() == []

        pool.beat(started=("r0:1",), first_tokens=("r0:1:500",))

        assert [c.job.id for c in pool.decide()] == ["r2"]

    def test_the_next_is_handed_over_when_it_comes_within_the_window(self):
        """Nothing need happen: `wakeup_at` names the moment, no sooner and no later."""
        pool = Pool(policy=Fcfs(), plan=WIDE)
        pool.beat()
        for i in range(4):
            pool.ask(f"r{i}", prompt_tokens=9000)
        assert [c.job.id for c in pool.decide()] == ["r0", "r1"]
        wait_s = pool.core.wakeup_at() - pool.now
        assert wait_s > 2 * 9000 * A100_TOKEN_S - WIDE.commit_window_s

        assert pool.decide(after_s=wait_s - 2 * TICK_S) == []
        assert [c.job.id for c in pool.decide(after_s=2 * TICK_S + 1e-6)] == ["r2"]

    def test_a_first_token_teaches_at_once_while_little_is_known(self):
        """The reward comes with the answer's end, which may be a minute away, and teaches nothing twice."""
        pool = Pool()
        pool.beat(hardware="")
        pool.ask("r")
        [assign] = pool.decide()
        seconds = 3 * (assign.job.prefill_s or 0.0)

        pool.beat(hardware="", first_tokens=(f"r:1:{1e3 * seconds:.1f}",))

        speed = pool.core.view(pool.now).endpoints[0].speed
        assert speed > 1.1
        pool.reward(assign, prefill_s=seconds)
        assert pool.core.view(pool.now).endpoints[0].speed == speed

    @pytest.mark.parametrize(("hardware", "known"), [("", YOUNG), ("a100", 0)])
    def test_who_is_well_known_is_learned_by_rewards(self, hardware, known):
        """First tokens come in bursts that share their error, which looks like a drift and is none."""
        pool = Pool()
        pool.beat(hardware=hardware)
        for at in range(known + 1):
            pool.ask(f"r{at}")
            [assign] = pool.decide()
            seconds = assign.job.prefill_s or 0.0
            if at < known:
                pool.reward(assign, prefill_s=seconds)
        speed = pool.core.view(pool.now).endpoints[0].speed

        pool.beat(hardware=hardware, first_tokens=(f"r{known}:1:{3e3 * seconds:.1f}",))

        assert pool.core.view(pool.now).endpoints[0].speed == speed
        pool.reward(assign, prefill_s=3 * seconds)
        assert pool.core.view(pool.now).endpoints[0].speed > speed

    def test_nobody_waits_behind_a_horizon_that_all_goes(self):
        """Looking at four together, the step goes on as long as each four find a place; then it stops."""
        pool = Pool(plan=PlanSettings(horizon=4, commit_window_s=10.0))
        pool.beat(max_num_seqs=10)
        for i in range(15):
            pool.ask(f"r{i:02}")

        assert [c.job.id for c in pool.decide() if isinstance(c, Assign)] == [
            f"r{i:02}" for i in range(10)
        ]

    def test_a_hung_endpoint_is_not_taken_for_free(self):
        """A head that is long overdue pushes `free_in_s` out: silence about progress is no progress."""
        pool = Pool()
        pool.beat()
        pool.ask("a")
        pool.decide()
        for _ in range(10):
            pool.now += 1.0
            pool.beat()
            pool.decide()

        assert pool.core.view(pool.now).endpoints[0].free_in_s > 5.0

    def test_reports_that_make_no_sense_move_nothing(self):
        """Beats are people's and networks' words: unknown ids, old attempts and broken parts are passed over."""
        pool = Pool()
        pool.beat()
        pool.ask("r:1")
        pool.decide()

        pool.beat(started=("", ":", "r:1", "r:1:7", "x:1"), first_tokens=("r:1:1", "r:1:2:5", "::"))

        assert pool.core.view(pool.now).assigned == 1
        pool.beat(first_tokens=("r:1:1:40",))
        assert pool.core.view(pool.now).running == 1


class TestEnds:
    def test_a_returned_job_waits_again(self):
        """Handed back, it keeps its arrival and takes the next attempt."""
        pool = Pool()
        pool.beat()
        pool.ask("r")
        [assign] = pool.decide()

        pool.reward(assign, "returned")

        assert [c.job.attempt for c in pool.decide(0.25)] == [2]

    def test_an_endpoint_that_hands_back_rests_longer_each_time(self):
        """An engine that says 503 at once must not use up all attempts of all that wait; others go on."""
        pool = Pool(max_attempts=9)
        pool.beat()
        pool.ask("r")
        [assign] = pool.decide()
        rests = []
        for _ in range(3):
            pool.reward(assign, "returned")
            assert pool.decide() == []
            rests.append(pool.core.wakeup_at() - pool.now)
            [assign] = pool.decide(rests[-1])

        assert rests == [0.25, 0.5, 1.0]
        pool.reward(assign)
        pool.ask("again")
        [assign] = pool.decide()
        pool.reward(assign, "returned")
        assert pool.decide() == []
        assert pool.core.wakeup_at() - pool.now == 0.25, "what it completes is in its favour"
        [assign] = pool.decide(0.25)
        pool.reward(assign, "returned")
        pool.beat("e1")
        assert [c.endpoint for c in pool.decide() if isinstance(c, Assign)] == ["e1"]

    def test_a_reward_of_an_older_attempt_moves_nothing(self):
        """It may teach, but the present attempt goes on."""
        pool = Pool()
        pool.beat()
        pool.ask("r")
        [first] = pool.decide()
        pool.reward(first, "returned")
        pool.decide(0.25)

        pool.reward(first, "completed")

        assert pool.core.view(pool.now).assigned == 1

    def test_cancel_ends_a_waiting_request_and_aborts_a_held_one(self):
        """The core ends what it holds itself; a worker ends what it holds."""
        pool = Pool()
        pool.ask("r")
        pool.tell(Control(action="cancel", id="r"))
        assert [c.result.outcome for c in pool.decide()] == ["cancelled"]

        pool.beat()
        pool.ask("q")
        pool.decide()
        pool.tell(Control(action="cancel", id="q"))
        assert [type(c) for c in pool.decide()] == [Abort]

    def test_a_cancelled_request_is_not_tried_again(self):
        """Its endpoint dies before the abort arrives: it ends as cancelled."""
        pool = Pool()
        pool.beat()
        pool.ask("q")
        pool.decide()
        pool.tell(Control(action="cancel", id="q"))
        pool.decide()
        pool.beat(epoch=2)

        _, finish = pool.decide()

        assert finish.result.outcome == "cancelled"

    def test_an_endpoint_that_hands_back_what_was_cancelled_need_not_rest(self):
        """It was asked to."""
        pool = Pool()
        pool.beat()
        pool.ask("r")
        [assign] = pool.decide()
        pool.tell(Control(action="cancel", id="r"))
        pool.decide()
        pool.reward(assign, "returned")
        pool.ask("next")

        finish, assign = pool.decide()

        assert (finish.result.id, finish.result.outcome) == ("r", "cancelled")
        assert assign.job.id == "next"

    def test_what_redis_refuses_is_forgotten(self):
        """A refused move means somebody else ended it: its seat is free again."""
        pool = Pool()
        pool.beat(max_num_seqs=1)
        pool.ask("r")
        pool.decide()

        pool.tell(Refused(id="r", entry="1-0"))

        assert pool.core.view(pool.now).endpoints[0].seats == 0

    def test_i4_time_never_decreases(self):
        """I4: a clock that runs backwards is a bug of the driver's."""
        pool = Pool()
        pool.ask("r")
        with pytest.raises(AssertionError, match="I4"):
            pool.core.decide(pool.now - 1.0)


class TestRecovery:
    def test_what_an_endpoint_still_holds_stays_with_it(self):
        """A new leader takes over in flight work; the endpoint's first beat confirms it."""
        pool = Pool()
        request = Request(id="r", model="m", prompt_tokens=10)
        pool.tell(
            Recovered(
                request=request, entry="1-0", enqueued_at=90.0, attempt=2, endpoint="e0", epoch=7
            )
        )
        pool.now += 2.0
        pool.beat(epoch=7)

        assert pool.decide(after_s=2.0) == []
        assert pool.core.view(pool.now).assigned == 1

    def test_an_endpoint_that_never_speaks_again_loses_it(self):
        """A lease from the recovery on, then it waits again."""
        pool = Pool()
        request = Request(id="r", model="m")
        pool.tell(
            Recovered(
                request=request, entry="1-0", enqueued_at=90.0, attempt=1, endpoint="e0", epoch=7
            )
        )

        [reclaim] = pool.decide(after_s=3.0)

        assert reclaim.attempt == 1

    def test_what_an_endpoints_earlier_life_held_waits_again(self):
        """Its new life was heard before the old leader's work was found."""
        pool = Pool()
        pool.beat(epoch=8)
        self.found(pool, endpoint="e0", epoch=7)

        reclaim, again = pool.decide()

        assert (reclaim.attempt, again.job.attempt, again.job.epoch) == (1, 2, 8)

    def test_what_was_cancelled_under_an_earlier_leader_ends(self):
        """Where it waits at once, and where a worker holds it that one is asked to."""
        waiting, held = Pool(), Pool()
        self.found(waiting, cancelled=True)
        self.found(held, cancelled=True, endpoint="e0", epoch=7)

        assert [c.result.outcome for c in waiting.decide()] == ["cancelled"]
        assert held.decide() == [Abort(id="r", endpoint="e0", attempt=1)]

    @pytest.mark.parametrize("entry", ["1-0", "9-0"])
    def test_an_id_lives_under_the_entry_that_was_found(self, entry):
        """Redis had lost the other one, and its client sent it again; found twice under one, it waits once."""
        pool = Pool()
        pool.ask("r")
        self.found(pool, entry=entry)
        assert pool.core.view(pool.now).waiting == 1
        pool.beat()

        [assign] = pool.decide()

        assert assign.job.entry == entry

    def test_what_makes_no_sense_any_more_ends(self):
        """Its objective is gone from the settings since it was asked."""
        pool = Pool()
        request = Request(id="r", model="m", objective="gold")
        pool.tell(Recovered(request=request, entry="1-0", enqueued_at=90.0, attempt=1))

        assert [c.result.outcome for c in pool.decide()] == ["invalid"]

    def test_what_redis_says_is_alive_lives_though_it_had_ended_here(self):
        """Its end was refused, or its client sent it again after Redis had lost that it was over."""
        pool = Pool()
        pool.ask("r")
        pool.tell(Control(action="cancel", id="r"))
        pool.decide()
        self.found(pool, entry="9-0")

        assert pool.core.view(pool.now).waiting == 1
        assert pool.decide() == []

    def found(self, pool, **fields):
        """A new leader reads in Redis that it was assigned once."""
        request = Request(id="r", model="m", prompt_tokens=10)
        fields = {"entry": "1-0", "enqueued_at": 90.0, "attempt": 1, **fields}
        pool.tell(Recovered(request=request, **fields))

    def test_what_was_learned_is_taken_over_and_nonsense_is_not(self):
        """A snapshot warms the start; a broken one is refused whole and the start stays cold."""
        pool = Pool()
        pool.beat()
        for i in range(40):
            pool.ask(f"r{i}", prompt_tokens=2000)
            for assign in pool.decide(after_s=0.5):
                pool.reward(assign, prefill_s=0.4)
            pool.beat()
        taught = pool.core.snapshot()
        raw = msgspec.json.encode(taught)

        warm = Pool()
        assert warm.core.restore(msgspec.json.decode(raw, type=Snapshot))
        warm.beat()
        nonsense = msgspec.structs.replace(taught.learned.prefill, moment=(float("nan"),) * 5)
        broken = msgspec.structs.replace(
            taught, learned=msgspec.structs.replace(taught.learned, prefill=nonsense)
        )
        cold = Pool()
        assert not cold.core.restore(broken)
        cold.beat()

        seen = pool.core.view(pool.now).endpoints[0].speed
        assert warm.core.view(warm.now).endpoints[0].speed == pytest.approx(seen)
        assert cold.core.view(cold.now).endpoints[0].speed == 1.0


class TestUrgency:
    def test_setting_aside_is_reversible(self):
        """Hopeless on the present prediction, it is set aside; a faster endpoint joins and it is taken up again."""
        pool = Pool(policy=Urgency(aside_share=0.0), plan=WIDE)
        pool.beat("slow", hardware="l4", max_num_seqs=1)
        pool.ask("first", prompt_tokens=2000, ttft_s=9.0)
        pool.decide()
        pool.beat("slow", hardware="l4", max_num_seqs=2)
        pool.ask("r", prompt_tokens=20_000, ttft_s=1.5)
        assert "set_aside" in pool.notes()
        assert pool.core.view(pool.now).set_aside == 1

        pool.beat("fast", hardware="h100")

        commands = pool.core.decide(pool.now)
        assert [c.decision.kind for c in commands] == ["taken_up", "assigned"]

    def test_who_is_taken_up_stands_in_line_though_nothing_is_free_yet(self):
        """It can make it behind another: that is said once, and it is no longer among those set aside."""
        pool = Pool(policy=Urgency(aside_share=0.0), plan=WIDE)
        pool.beat("slow", hardware="l4")
        pool.ask("first", prompt_tokens=2000)
        pool.decide()
        pool.ask("r", prompt_tokens=20_000, ttft_s=2.5)
        assert "set_aside" in pool.notes()

        pool.beat("fast", hardware="h100")
        pool.ask("urgent", prompt_tokens=40_000, ttft_s=2.2)
        assert [c.job.id for c in pool.decide()] == ["urgent"]

        assert pool.notes() == ["taken_up"]
        assert pool.core.view(pool.now).set_aside == 0
        assert pool.notes() == []

    def test_a_change_is_noted_once_not_every_test(self):
        """Set aside once, tested at every step, noted once."""
        pool = Pool(policy=Urgency(), plan=WIDE)
        pool.beat()
        pool.ask("a", prompt_tokens=8_000)
        pool.decide()
        pool.ask("r", prompt_tokens=20_000, ttft_s=0.05)
        assert pool.notes() == ["read", "set_aside"]
        assert pool.notes() == []

    def test_an_idle_endpoint_serves_those_set_aside_shortest_first(self):
        """Late is better than never, where nobody urgent loses by it."""
        pool = Pool(policy=Urgency())
        pool.beat(max_num_seqs=1)
        pool.ask("long", prompt_tokens=9000, ttft_s=0.001)
        pool.ask("short", prompt_tokens=500, ttft_s=0.001)

        assigned = [c.job.id for c in pool.decide()]

        assert assigned == ["short"]

    def test_a_long_late_one_leaves_what_is_idle_to_the_urgent(self):
        """It could not be interrupted. Once nobody urgent waits, it is served there."""
        pool = Pool(policy=Urgency(aside_share=0.0))
        pool.beat("quick", hardware="h100")
        pool.ask("first", prompt_tokens=20_000)
        [first] = pool.decide()
        pool.beat("slow", hardware="l4")
        pool.ask("urgent", prompt_tokens=20_000, ttft_s=1.6)
        pool.ask("late", prompt_tokens=10_000, ttft_s=0.01)
        assert pool.decide() == []
        assert pool.core.view(pool.now).set_aside == 1

        pool.reward(first, prefill_s=0.6)

        taken = {c.job.id: c.endpoint for c in pool.decide() if isinstance(c, Assign)}
        assert taken == {"urgent": "quick", "late": "slow"}

    def test_urgent_work_overtakes_patient_work(self):
        """Earliest due first, and a level of priority is worth a band of seconds."""
        pool = Pool(policy=Urgency(band_s=5.0))
        pool.ask("batch")
        pool.ask("chat", ttft_s=2.0)
        pool.ask("vip", ttft_s=3.0, priority=1)
        pool.beat(max_num_seqs=3)

        assert [c.job.id for c in pool.decide()] == ["vip", "chat", "batch"]

    @pytest.mark.parametrize("priority", [0, -2])
    def test_nobody_starves_under_sustained_urgent_load(self, priority):
        """Twice what the endpoint can do arrives, all of it urgent: the patient and the late are served too."""
        pool = Pool(policy=Urgency(patience_s=10.0, aside_share=0.1))
        pool.beat()
        pool.ask("patient", prompt_tokens=4000, priority=priority)
        pool.ask("late", prompt_tokens=4000, ttft_s=0.001)
        served: list[str] = []
        flying: list[Assign] = []
        for step in range(160):
            for j in range(2):
                pool.ask(f"u{step}.{j}", prompt_tokens=4000, ttft_s=1.0)
            flying += [c for c in pool.decide(after_s=0.25) if isinstance(c, Assign)]
            pool.beat()
            if flying:
                done = flying.pop(0)
                served.append(done.job.id)
                pool.reward(done, prefill_s=0.26)

        assert "patient" in served
        assert "late" in served


class TestMissing:
    """A job that was handed over and that its worker does not have."""

    def handed_over(self) -> Pool:
        pool = Pool()
        pool.beat()
        pool.ask("r")
        assert [type(c) for c in pool.decide()] == [Assign]
        pool.now += 0.5
        return pool

    @pytest.mark.parametrize(
        "said", [{}, {"holds_to": "r"}, {"holds_after": "q"}], ids=["of all", "up to it", "from it"]
    )
    def test_it_is_taken_back_once_its_worker_has_said_so_for_long_enough(self, said):
        """Told twice, two seconds apart, and not held against the request."""
        pool = self.handed_over()
        pool.beat(read_at=pool.now, **said)
        assert pool.decide() == []

        pool.now += MISSED_S
        pool.beat(read_at=pool.now, **said)
        first, second = pool.decide()

        assert (first.id, first.endpoint, first.attempt) == ("r", "e0", 1)
        assert first.decision.reason == "e0 does not have it"
        assert (second.job.id, second.job.attempt) == ("r", 2)

    @pytest.mark.parametrize(
        "said",
        [
            pytest.param({}, id="says nothing"),
            pytest.param({"read_at": 100.0}, id="was read up to before it was handed over"),
            pytest.param({"read_at": 1e9, "holds": ("r:1",)}, id="has it"),
            pytest.param(
                {"read_at": 1e9, "holds": ("a:1",), "holds_to": "q"}, id="is not there yet"
            ),
            pytest.param({"read_at": 1e9, "holds": ("s:1",), "holds_after": "r"}, id="is past it"),
        ],
    )
    def test_it_stays_while_its_worker(self, said):
        """Silence about a job is no word against it."""
        pool = self.handed_over()
        for _ in range(10):
            pool.now += 1.0
            pool.beat(**said)
            assert pool.decide() == []

    def test_it_stays_until_that_has_lasted(self):
        """Its worker may be between reading it and noting it: twice within a second is not long enough."""
        pool = self.handed_over()
        for _ in range(2):
            pool.now += 0.49 * MISSED_S
            pool.beat(read_at=pool.now)
            assert pool.decide() == []

    def test_it_stays_if_it_is_found_after_all(self):
        """Missed once and then there: the next miss counts from its own moment."""
        pool = self.handed_over()
        for holds in ((), ("r:1",), (), ("r:1",)):
            pool.now += MISSED_S
            pool.beat(read_at=pool.now, holds=holds)
            assert pool.decide() == []

    def test_another_attempt_in_its_place_is_not_it(self):
        """What was taken back and handed over again is another job."""
        pool = self.handed_over()
        pool.beat(read_at=pool.now, holds=("r:2",))
        pool.now += MISSED_S
        pool.beat(read_at=pool.now, holds=("r:2",))

        assert [type(c) for c in pool.decide()] == [Reclaim, Assign]

    def test_an_answer_that_comes_in_the_same_breath_counts(self):
        """Its worker forgot it because it was done."""
        pool = Pool()
        pool.beat()
        pool.ask("r")
        [given] = pool.decide()
        for _ in range(2):
            pool.now += MISSED_S
            pool.beat(read_at=pool.now)
        pool.reward(given)

        assert pool.decide() == []

    def test_one_that_was_cancelled_ends(self):
        """Nobody would tell its client otherwise."""
        pool = self.handed_over()
        pool.tell(Control(action="cancel", id="r"))
        pool.decide()
        pool.beat(read_at=pool.now)
        pool.now += MISSED_S
        pool.beat(read_at=pool.now)

        reclaim, finish = pool.decide()
        assert isinstance(reclaim, Reclaim)
        assert finish.result.outcome == "cancelled"


class TestKvAccounts:
    def test_a_prefix_that_the_engine_forgot_is_not_believed(self):
        """Its next request counts no cached token there."""
        pool = Pool()
        pool.beat("e0", kv_epoch=1, kv_seq=1, kv_stored=("a", "b"))
        pool.ask("r1", prompt_tokens=400, blocks=("a", "b", "c"))
        [first] = pool.decide()
        assert first.job.cached_tokens == 256
        pool.reward(first, cached_tokens=256)

        pool.beat("e0", kv_epoch=1, kv_seq=2, kv_removed=("b", "c"))
        pool.ask("r2", prompt_tokens=400, blocks=("a", "b", "c"))
        [second] = pool.decide()

        assert second.job.cached_tokens == 128

    def test_a_capacity_that_comes_late_counts(self):
        """An engine's first beats may not know it."""
        pool = Pool()
        pool.beat("e0")
        pool.beat("e0", kv_tokens=2_000)
        pool.ask("long", prompt_tokens=1_900, blocks=tuple(f"b{n}" for n in range(14)))
        [first] = pool.decide()
        pool.reward(first)
        pool.ask("other", prompt_tokens=1_900, blocks=tuple(f"c{n}" for n in range(14)))
        [second] = pool.decide()
        pool.reward(second)

        pool.ask("again", prompt_tokens=1_900, blocks=tuple(f"b{n}" for n in range(14)))
        [third] = pool.decide()

        assert third.job.cached_tokens < 256

    def test_an_engine_that_finds_nothing_is_believed_to_keep_less(self):
        """What others were believed to have left there goes as well: the oldest first."""
        pool = Pool()
        pool.beat("e0", kv_tokens=20 * 128)
        ten = {name: tuple(f"{name}{n}" for n in range(10)) for name in ("old", "new")}
        for name, blocks in ten.items():
            pool.ask(name, prompt_tokens=1300, blocks=blocks)
            [first] = pool.decide()
            pool.reward(first)
        for turn in range(7):
            pool.ask(f"again{turn}", prompt_tokens=1300, blocks=ten["new"])
            [again] = pool.decide()
            assert again.job.cached_tokens == 1280
            pool.reward(again, cached_tokens=0)

        pool.ask("late", prompt_tokens=1300, blocks=ten["old"])
        [late] = pool.decide()
        assert late.job.cached_tokens < 1280


class TestNoPrefixCache:
    """An engine that forgets a prompt with its request, as vLLM does with `--no-enable-prefix-caching`."""

    BLOCKS = ("a", "b", "c")

    @pytest.mark.parametrize("prefix", [{"blocks": BLOCKS}, {"session": "talk"}])
    def test_nothing_is_found_there_again(self, prefix):
        """Nor what was sent before the worker had read the engine's own word."""
        pool = Pool()
        pool.beat()
        pool.ask("r1", prompt_tokens=400, **prefix)
        [first] = pool.decide()
        pool.reward(first)
        pool.beat(no_prefix_cache=True)
        pool.ask("r2", prompt_tokens=400, **prefix)
        [second] = pool.decide()
        pool.reward(second)
        pool.ask("r3", prompt_tokens=400, **prefix)
        [third] = pool.decide()

        assert second.job.cached_tokens == third.job.cached_tokens == 0

    @pytest.mark.parametrize(("off", "fit"), [(False, 2), (True, 1)])
    def test_what_begins_alike_is_held_for_each(self, off, fit):
        """Two prompts of 400 tokens with 384 in common fit an engine of 600 only where they share their KV."""
        pool = Pool()
        pool.beat(kv_tokens=600, no_prefix_cache=off)
        for name in ("r1", "r2"):
            pool.ask(name, prompt_tokens=400, expected_tokens=1, blocks=self.BLOCKS)

        assert len(pool.decide()) + len(pool.decide()) == fit


class TestSessions:
    def test_a_session_without_blocks_goes_where_it_was(self):
        """Its earlier prompt and answer count as cached there, and nowhere else."""
        pool = Pool()
        for name in ("e0", "e1", "e2"):
            pool.beat(name)
        pool.ask("turn1", prompt_tokens=4_000, session="talk")
        [first] = pool.decide()
        pool.reward(first, prompt_tokens=4_000, output_tokens=100, cached_tokens=0)

        pool.ask("turn2", prompt_tokens=4_500, session="talk")
        pool.ask("other", prompt_tokens=4_500, session="another")
        jobs = {assign.job.id: assign for assign in pool.decide()}

        assert jobs["turn2"].endpoint == first.endpoint
        assert jobs["turn2"].job.cached_tokens == 4_100
        assert jobs["other"].job.cached_tokens == 0

    def test_a_session_of_which_engines_find_nothing_is_soon_believed_nowhere(self):
        """As one whose turns have nothing in common."""
        pool, believed = Pool(), []
        pool.beat()
        for turn in range(20):
            pool.ask(f"turn{turn}", prompt_tokens=4_000, session="talk")
            [assign] = pool.decide()
            believed.append(assign.job.cached_tokens)
            pool.reward(assign, prompt_tokens=4_000, output_tokens=100, cached_tokens=0)

        assert believed[1] == 3_999
        assert believed[-1] < 1_000

    def test_a_session_that_still_runs_is_where_it_runs(self):
        """Turns may overlap: what the first one brings there counts as soon as it is computed."""
        pool = Pool()
        for name in ("e0", "e1", "e2", "e3"):
            pool.beat(name)
        pool.ask("turn1", prompt_tokens=4_000, session="talk")
        [first] = pool.decide()
        pool.beat(first.endpoint, first_tokens=("turn1:1:200",))

        pool.ask("turn2", prompt_tokens=4_500, session="talk")
        [second] = pool.decide()

        assert (second.endpoint, second.job.cached_tokens) == (first.endpoint, 4_000)


def test_a_pace_is_learned_halfway_between_the_load_at_its_beginning_and_at_its_end():
    """Alone at first and one of three at last: an answer as slow as the mean of both is no surprise, and says nothing new."""
    pool = Pool(plan=PlanSettings(commit_window_s=9.0))
    pool.beat()
    pace, ledger = pool.core._memory.predictor.pace, pool.core._memory.book.ledger

    def pace_s() -> float:
        row = pace.row(0, *ledger.load(0), pool.now)
        return sum(row)  # untaught weights are one

    pool.ask("r", prompt_tokens=1)
    [first] = pool.decide()
    pool.core.settle()
    alone_s = pace_s()
    for name in ("a", "b"):
        pool.ask(name, prompt_tokens=30_000)
    assert len(pool.decide()) == 2
    pool.now += 2.0
    pool.beat()
    together_s = pace_s()
    assert together_s > 1.2 * alone_s
    pool.reward(first, tpot_s=0.5 * (alone_s + together_s))

    assert pace.errors == pytest.approx([0.0], abs=1e-3)


@pytest.mark.parametrize(
    "tell",
    [
        pytest.param(lambda pool: pool.beat(epoch=2), id="an endpoint's new life"),
        pytest.param(lambda pool: pool.ask("r", model="n"), id="a request"),
        pytest.param(lambda pool: pool.tell(Control(action="cancel", id="held")), id="a wish"),
    ],
)
def test_whatever_has_news_is_looked_at_at_once(tell):
    """I: no fact waits for the next one."""
    pool = Pool()
    pool.beat()
    pool.ask("held")
    pool.decide()
    assert pool.core.wakeup_at() > pool.now

    tell(pool)

    assert pool.core.wakeup_at() == pool.now


class TestExploration:
    def test_a_new_endpoint_is_probed_by_one_at_a_time(self):
        """Drawn evenly: until the first completion says what it takes, nobody else is sent there to find out."""
        pool = Pool(plan=PlanSettings(commit_window_s=60.0, explore=100.0, fill=0.0))
        pool.beat("known", hardware="h100")
        pool.ask("first")
        [first] = pool.decide()
        pool.reward(first, prefill_s=0.01)
        pool.beat("new", hardware="l4")

        def probes(name):
            """Who goes to the new one, while the other is at once through with whatever it gets."""
            found = []
            for number in range(20):
                pool.ask(f"{name}-{number}")
                [sent] = pool.decide(0.01)
                if sent.endpoint == "new":
                    found.append(sent)
                else:
                    pool.reward(sent, prefill_s=0.01)
            return found

        [probe] = probes("before")
        pool.reward(probe, prefill_s=0.01)
        assert len(probes("after")) > 3

    def test_a_profiles_chances_are_those_of_all_it_could_have_taken(self):
        """Whoever could start now and the picker might have drawn stands in the record, beyond the nearest five."""
        pool = Pool(profile=Profile(picker=Random()))
        for number in range(8):
            pool.beat(f"e{number}")
        pool.ask("a", prompt_tokens=16_000)
        [_] = pool.decide()
        pool.ask("b")

        [assign] = pool.decide()

        chances = [float(part.partition("=")[2].split(",")[0]) for part in assign.decision.weighed]
        assert chances == pytest.approx([1 / 7] * 7, rel=1e-3)
        assert len(assign.decision.candidates) == 8 - 1
