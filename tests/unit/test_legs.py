"""A request in two legs: who computes its prompt, who decodes it, and what happens when either is lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core import CoreSettings, Scheduler
from scheduler.endpoints import PATIENCE_S
from scheduler.events import Arrived, Assign, Note, Recovered
from scheduler.fairness import FairnessSettings
from scheduler.fleet import Eligible
from scheduler.plan import PlanSettings
from scheduler.planner import Planner
from scheduler.state import Ticket
from scheduler.wire.client import Control, Request
from scheduler.wire.worker import Beat, Reward

PARAMS = b'{"remote_engine_id": "p0"}'


def beat(
    name: str,
    role: str,
    *,
    epoch: int = 1,
    link_gbps: float = 320.0,
    kv_tokens: int = 100_000,
    models: tuple[str, ...] = ("llama",),
    **fields: object,
) -> Beat:
    """An endpoint; prompts are computed ten times as fast on the one for prefill."""
    return Beat(
        endpoint=name,
        epoch=epoch,
        roles=(role,),
        models=models,
        hardware="h100" if role == "prefill" else "v100",
        kv_tokens=kv_tokens,
        max_model_len=50_000,
        link_gbps=link_gbps,
        kv_token_bytes=131_072,
        **fields,  # type: ignore[arg-type]
    )


class Pool:
    """A core and a clock."""

    def __init__(self, *beats: Beat, **settings: object) -> None:
        self.core = Scheduler(CoreSettings(**settings), np.random.default_rng(0))  # type: ignore[arg-type]
        self.now = 1000.0
        for one in beats:
            self.core.receive(one, self.now)

    def ask(self, request_id: str = "r1", prompt_tokens: int = 8000, **fields: object) -> None:
        fields = {"model": "llama", "prompt_tokens": prompt_tokens, **fields}
        request = Request(id=request_id, **fields)  # type: ignore[arg-type]
        self.core.receive(
            Arrived(request=request, entry=f"{request_id}-0", enqueued_at=self.now), self.now
        )

    def assigned(self) -> list[tuple[str, str]]:
        """What is handed over now: leg and endpoint."""
        self.jobs = [c for c in self.core.decide(self.now) if isinstance(c, Assign)]
        return [(c.job.leg, c.endpoint) for c in self.jobs]

    def answer(
        self, outcome: str, *, at: int = 0, kv_params: bytes = b"", **fields: object
    ) -> None:
        """The worker of the latest job says how it went."""
        command = self.jobs[at]
        job = command.job
        reward = Reward(
            id=job.id,
            endpoint=command.endpoint,
            epoch=job.epoch,
            attempt=job.attempt,
            leg=job.leg,
            outcome=outcome,
            kv_params=kv_params,
            features=job.features,
            **fields,  # type: ignore[arg-type]
        )
        self.core.receive(reward, self.now)


@pytest.fixture
def pool() -> Pool:
    return Pool(beat("p0", "prefill"), beat("d0", "decode"))


def test_the_endpoint_that_decodes_is_bound_after_the_prompt_is_computed(pool):
    pool.ask()
    assert pool.assigned() == [("prefill", "p0")]
    pool.core.receive(beat("d1", "decode"), pool.now)
    pool.core.receive(beat("d0", "decode", state="draining"), pool.now)
    pool.now += 0.3
    pool.answer("prefilled", kv_params=PARAMS, cached_tokens=48)
    assert pool.assigned() == [("decode", "d1")]
    job = pool.jobs[0].job
    assert (job.attempt, job.kv_params, job.kv_cached_tokens) == (2, PARAMS, 48)
    assert job.kv_until_at > pool.now


def test_nobody_is_given_a_prompt_whose_answer_nobody_could_decode(pool):
    """A place is pledged before the prompt is sent: three fill the one who decodes, the fourth waits."""
    pool.core.receive(beat("d0", "decode", max_num_seqs=3), pool.now)
    for name in ("r1", "r2", "r3", "r4"):
        pool.ask(name, prompt_tokens=500)
    assert [leg for leg, _ in pool.assigned()] == ["prefill"] * 3


@pytest.mark.parametrize(("kv_tokens", "n_prefills"), [(16_001, 1), (16_002, 2)])
def test_a_prefill_leg_holds_its_prompt_and_the_first_token(kv_tokens, n_prefills):
    """Not its answer, and nothing less: two prompts of 8,000 have room on 16,002 tokens of KV."""
    pool = Pool(beat("p0", "prefill", kv_tokens=kv_tokens), beat("d0", "decode"))
    pool.ask("r1")
    pool.ask("r2")
    assert pool.assigned().count(("prefill", "p0")) == n_prefills


def test_a_leg_handed_back_goes_to_another_that_prefills(pool):
    pool.core.receive(beat("p1", "prefill"), pool.now)
    pool.ask()
    (first,) = pool.assigned()
    pool.answer("returned")
    (second,) = pool.assigned()
    assert {first, second} == {("prefill", "p0"), ("prefill", "p1")}


def test_with_nobody_left_to_prefill_all_of_it_goes_to_whoever_decodes(pool):
    pool.ask()
    pool.assigned()
    pool.core.receive(beat("p0", "prefill", state="draining"), pool.now)
    pool.answer("returned")
    assert pool.assigned() == [("whole", "d0")]


def test_a_decode_leg_lost_before_its_first_token_is_prefilled_again(pool):
    pool.ask(max_attempts=2)
    pool.assigned()
    pool.answer("prefilled", kv_params=PARAMS)
    assert pool.assigned() == [("decode", "d0")]
    pool.core.receive(beat("d0", "decode", epoch=2), pool.now)
    assert pool.assigned() == [("prefill", "p0")]


@pytest.mark.parametrize(("first_token_at", "is_kept"), [(None, True), (1000.0, False)])
def test_kv_is_kept_until_the_other_leg_has_fetched_it(first_token_at, is_kept):
    """An answer that failed behind its first token had its KV; before that, the engine keeps it for nobody."""
    pool = Pool(beat("p0", "prefill", kv_tokens=10_000), beat("d0", "decode"))
    pool.ask()
    pool.assigned()
    pool.answer("prefilled", kv_params=PARAMS)
    assert pool.assigned() == [("decode", "d0")]
    pool.answer("failed", first_token_at=first_token_at)

    pool.ask("r2")
    assert (("prefill", "p0") not in pool.assigned()) == is_kept


@pytest.mark.parametrize("lost_by", ["a new life", "its lease", "its engine"])
def test_kv_that_is_lost_while_it_waits_is_computed_again(pool, lost_by):
    pool.ask()
    pool.assigned()
    pool.core.receive(beat("d0", "decode", state="draining"), pool.now)
    pool.answer("prefilled", kv_params=PARAMS)
    assert pool.assigned() == []
    if lost_by == "its lease":
        pool.now += CoreSettings().kv_lease_s + 0.1
        assert pool.core.wakeup_at() <= pool.now
    if lost_by == "its engine":
        pool.core.receive(beat("p0", "prefill", state="away"), pool.now)
        pool.core.receive(beat("p0", "prefill"), pool.now)
    elif lost_by == "a new life":
        pool.core.receive(beat("p0", "prefill", epoch=2), pool.now)
    else:
        pool.core.receive(beat("p0", "prefill"), pool.now)
    pool.core.receive(beat("d0", "decode"), pool.now)
    assert [leg for leg, _ in pool.assigned()] == ["prefill"]


def test_a_deadline_ends_who_waits_between_the_legs(pool):
    """Nobody asks for its answer any more: not even the wait for an endpoint that decodes goes on."""
    pool.ask(deadline_at=pool.now + 5.0)
    pool.assigned()
    pool.core.receive(beat("d0", "decode", state="draining"), pool.now)
    pool.answer("prefilled", kv_params=PARAMS)
    assert pool.assigned() == []
    assert pool.core.wakeup_at() <= pool.now + 5.0
    pool.now += 5.0
    ended = [c for c in pool.core.decide(pool.now) if not isinstance(c, Note)]
    assert [c.result.outcome for c in ended] == ["expired"]


def test_a_pledged_place_goes_with_its_endpoint():
    """A new life in that slot owes it to nobody."""
    pool = Pool(beat("p0", "prefill"), beat("d0", "decode", kv_tokens=10_000))
    pool.ask("r1")
    assert pool.assigned() == [("prefill", "p0")]
    pool.ask("r2")
    assert pool.assigned() == []
    pool.core.receive(beat("d0", "decode", epoch=2, kv_tokens=10_000), pool.now)

    assert pool.assigned() == [("prefill", "p0")]


@pytest.mark.parametrize("kv_params", [b"", b"x" * 131_073], ids=["none", "too long"])
def test_a_prefill_leg_that_does_not_say_where_its_kv_is_has_failed(pool, kv_params):
    pool.ask(max_attempts=1)
    pool.assigned()
    pool.answer("prefilled", kv_params=kv_params)
    notes = [c for c in pool.core.decide(pool.now) if not isinstance(c, Note)]
    assert [c.result.outcome for c in notes] == ["failed"]


@pytest.mark.parametrize("is_helped", [False, True])
def test_a_decode_leg_that_would_break_more_than_it_gains_waits_a_little(is_helped):
    """A long prompt's KV would slow sixteen; where another decodes it goes at once, over however slow a link."""
    pool = Pool(beat("p0", "prefill"), beat("d0", "decode"), plan=PlanSettings(commit_window_s=9.0))
    for at in range(16):
        pool.ask(f"r{at}", prompt_tokens=500, tpot_s=0.022)
    assert pool.assigned() == 16 * [("prefill", "p0")]
    paced = pool.jobs
    pool.ask("long", prompt_tokens=40_000)
    assert pool.assigned() == [("prefill", "p0")]
    long, pool.jobs = pool.jobs, paced
    for at in range(16):
        pool.answer("prefilled", at=at, kv_params=PARAMS)
    assert pool.assigned() == 16 * [("decode", "d0")]

    if is_helped:
        pool.core.receive(beat("d1", "decode", link_gbps=1.0), pool.now)
    pool.jobs = long
    pool.answer("prefilled", kv_params=PARAMS)

    bound = []
    for after_s in (0.0, PATIENCE_S - 0.01, 0.02):
        pool.now += after_s
        bound.append(pool.assigned())
    assert bound == ([[("decode", "d1")], [], []] if is_helped else [[], [], [("decode", "d0")]])


def decoding(count: int, tpot_s: float) -> Pool:
    """A pool in which so many answers are decoded that were promised this pace."""
    pool = Pool(beat("p0", "prefill"), beat("d0", "decode"), plan=PlanSettings(patience=0.0))
    for at in range(count):
        pool.ask(f"d{at}", prompt_tokens=500, tpot_s=tpot_s)
        pool.assigned()
        pool.answer("prefilled", kv_params=PARAMS)
        pool.assigned()
    return pool


def offered(pool: Pool, slots: int = 2, **fields: object) -> tuple[Planner, Ticket]:
    """The plan of the next step, and whom it is asked for."""
    pool.ask("r", **fields)
    eligible = Eligible.by(np.zeros(slots))
    return pool.core._planning._planner(eligible), pool.core._memory.book.tickets["r"]


@pytest.mark.parametrize(("tpot_s", "is_open"), [(0.04, True), (0.022, False)])
def test_where_a_pace_is_nearly_broken_no_prompt_is_computed_beside_it(tpot_s, is_open):
    """Three quarters of the tightest promise are taken; more who decode may come all the same."""
    planner, ticket = offered(decoding(4, tpot_s))
    whole = planner.offers.of(ticket)
    second = planner.onward.second_leg(planner.offers.whole(ticket), source=0)
    assert np.isfinite(whole.service_s).tolist() == [True, is_open]
    assert np.isfinite(second.service_s[1])


def test_a_prompt_costs_each_who_decodes_beside_it():
    """A tenth of its seconds for each of four; where nobody decodes it costs nobody."""
    planner, ticket = offered(decoding(4, 0.05))
    offer = planner.offers.of(ticket)
    assert planner.onward.stalls_s(offer) == pytest.approx([0.0, 0.4 * offer.work_s[1]])


@pytest.mark.parametrize(("has_promise", "slot"), [(False, 1), (True, 2)])
def test_an_answer_is_planned_where_its_pace_is_kept(has_promise, slot):
    """Over a slower link, if it must be; to whom no pace was promised the first token counts alone."""
    pool = decoding(16, 0.05)
    pool.core.receive(beat("d1", "decode", link_gbps=8.0), pool.now)
    decodes = pool.core._planning._planner(Eligible.by(np.zeros(3))).room.decodes
    _, crowded_s, empty_s = decodes.pace_s(np.full(3, 8200.0)).tolist()
    assert empty_s < crowded_s
    tpot_s = 0.5 * (empty_s + crowded_s) if has_promise else None

    planner, ticket = offered(pool, tpot_s=tpot_s, slots=3)
    planner.offers.of(ticket)

    assert planner.onward.target(ticket)[0] == slot


def test_a_pace_that_nobody_keeps_is_decoded_where_it_begins_first(pool):
    """Its place is pledged there, and not where nothing is decoded."""
    pool.ask(tpot_s=0.001)
    assert pool.assigned() == [("prefill", "p0")]
    assert pool.core._memory.book.legs.pledges["r1"].slot == 1


def test_a_decode_leg_goes_nowhere_its_model_is_not_served():
    """However idle, and though others go there."""
    pool = Pool(
        beat("p0", "prefill"), beat("d0", "decode"), beat("d1", "decode", models=("other",))
    )
    pool.ask()
    pool.assigned()
    pool.core.receive(beat("d0", "decode", state="draining"), pool.now)
    pool.answer("prefilled", kv_params=PARAMS)
    pool.ask("r2", model="other")
    assert pool.assigned() == [("whole", "d1")]
    pool.core.receive(beat("d0", "decode"), pool.now)
    assert pool.assigned() == [("decode", "d0")]


def test_a_decode_leg_tells_what_it_fetches():
    """All of its prompt's KV over the slower of the two links, whoever else has a faster one; in seconds."""
    quick = beat("p1", "prefill", state="draining")
    pool = Pool(beat("p0", "prefill", link_gbps=80.0), quick, beat("d0", "decode"))
    pool.ask()
    pool.assigned()
    pool.answer("prefilled", kv_params=PARAMS)
    pool.assigned()
    said = dict(feature.split("=") for feature in pool.jobs[0].job.features)
    assert float(said["kv_own"]) == pytest.approx(8000 * 131_072 / 10e9, rel=1e-4)
    assert float(said["kv_ahead"]) == 0.0


def test_a_decode_leg_fetches_only_what_its_own_cache_has_not(pool):
    """The second prompt begins with ten of the blocks that the first one brought there."""
    fetched = []
    for name in ("r1", "r2"):
        pool.ask(name, blocks=tuple(f"{at if at < 10 else name + str(at)}" for at in range(62)))
        assert pool.assigned() == [("prefill", "p0")]
        pool.answer("prefilled", kv_params=PARAMS)
        assert pool.assigned() == [("decode", "d0")]
        said = dict(feature.split("=") for feature in pool.jobs[0].job.features)
        fetched.append(float(said["kv_own"]))
        pool.answer("completed", first_token_at=pool.now)
    assert fetched[1] == pytest.approx(fetched[0] * (8000 - 10 * 128) / 8000, rel=1e-4)


def test_the_core_wakes_when_the_first_kv_may_be_forgotten(pool):
    """Of two who wait for somebody to decode them, computed one after the other."""
    lease_s, began_at = CoreSettings().kv_lease_s, pool.now
    for name in ("r1", "r2"):
        pool.ask(name, prompt_tokens=1000)
    assert pool.assigned() == 2 * [("prefill", "p0")]
    pool.core.receive(beat("d0", "decode", state="draining"), pool.now)
    for at in range(2):
        pool.answer("prefilled", at=at, kv_params=PARAMS)
        pool.now += 1.0
    pool.now = began_at + lease_s - 0.5
    pool.core.receive(beat("p0", "prefill"), pool.now)
    pool.core.receive(beat("d0", "decode", state="draining"), pool.now)
    pool.assigned()
    assert pool.core.wakeup_at() == began_at + lease_s


@pytest.mark.parametrize("is_lost", [False, True])
def test_kv_of_an_endpoints_earlier_life_takes_no_room(is_lost):
    """Nobody had fetched it yet: the new life has all of its KV for others."""
    pool = Pool(beat("p0", "prefill", kv_tokens=10_000), beat("d0", "decode"))
    pool.ask("r1")
    pool.assigned()
    pool.answer("prefilled", kv_params=PARAMS)
    assert pool.assigned() == [("decode", "d0")]
    if is_lost:
        pool.now += CoreSettings().lease_s
        pool.core.receive(beat("d0", "decode"), pool.now)
        assert pool.assigned() == []
    pool.core.receive(beat("p0", "prefill", kv_tokens=10_000, epoch=2), pool.now)

    pool.ask("r2")
    assert ("prefill", "p0") in pool.assigned()


@settings(max_examples=20)
@given(n_paced=st.integers(1, 16), tokens=st.integers(100, 20_000), tpot_s=st.floats(0.02, 0.05))
def test_a_prefill_leg_is_worth_what_its_decode_leg_is(n_paced, tokens, tpot_s):
    """Where that would be bound: beside those who decode there, and beside nobody's prefill."""
    planner, ticket = offered(decoding(n_paced, tpot_s), prompt_tokens=tokens, tpot_s=0.03)

    first = planner.worth.of(planner.offers.of(ticket))
    second = planner.worth.of(planner.onward.second_leg(planner.offers.whole(ticket), source=0))

    assert first[0] == second[1]


def test_who_only_decodes_is_measured_by_what_it_fetches(pool):
    """Else it would be explored with one request at a time for ever."""
    predictor = pool.core._memory.predictor
    pool.ask()
    pool.assigned()
    pool.answer("prefilled", kv_params=PARAMS)
    pool.assigned()
    assert predictor.is_new().tolist() == [True, True]

    pool.answer("completed", pulled_at=pool.now, first_token_at=pool.now + 0.1)

    assert predictor.is_new().tolist() == [True, False]


def test_a_handed_over_leg_is_no_attempt_that_failed(pool):
    """One attempt is allowed, and both legs are it."""
    pool.ask(max_attempts=1)
    pool.assigned()
    pool.answer("prefilled", kv_params=PARAMS)
    assert pool.assigned() == [("decode", "d0")]
    assert pool.jobs[0].job.attempt <= pool.jobs[0].job.max_attempts


def test_the_same_prompt_is_served_whole_where_handing_it_over_takes_longer():
    """No threshold decides, but the link: the same request in the same pool, over a fast one and a slow one."""
    legs = []
    for link_gbps in (320.0, 0.5):
        pool = Pool(
            beat("p0", "prefill", link_gbps=link_gbps), beat("d0", "decode", link_gbps=link_gbps)
        )
        pool.ask()
        legs.append(pool.assigned()[0][0])
    assert legs == ["prefill", "whole"]


def test_what_transfers_really_take_changes_the_choice(pool):
    """Learned: a link of 320 Gbit/s on paper that takes a second and a half is used no more."""
    for turn in range(60):
        pool.ask(f"r{turn}")
        if pool.assigned() == [("whole", "d0")]:
            break
        pool.answer("prefilled", kv_params=PARAMS)
        pool.assigned()
        pool.answer("completed", pulled_at=pool.now, first_token_at=pool.now + 1.5)
    assert 1 < turn < 60


def test_without_a_link_nothing_is_handed_over():
    """A worker that cannot hand KV over says so by no link: its endpoint takes no half requests."""
    pool = Pool(beat("p0", "prefill", link_gbps=0.0), beat("d0", "decode", link_gbps=0.0))
    pool.ask()
    assert pool.assigned() == [("whole", "d0")]


def test_kv_that_nobody_fetches_takes_room_until_its_lease_ends():
    """Cancelled between its legs: the engine keeps its prompt's KV all the same, and another of that size has no room."""
    pool = Pool(beat("p0", "prefill", kv_tokens=10_000), beat("d0", "decode"))
    pool.ask()
    pool.assigned()
    pool.answer("prefilled", kv_params=PARAMS)
    pool.core.receive(Control(action="cancel", id="r1"), pool.now)

    pool.ask("r2")
    assert ("prefill", "p0") not in pool.assigned()

    pool.now += CoreSettings().kv_lease_s
    for one in (beat("p0", "prefill", kv_tokens=10_000), beat("d0", "decode")):
        pool.core.receive(one, pool.now)
    pool.ask("r3")
    assert ("prefill", "p0") in pool.assigned()


def test_a_tenant_is_charged_for_both_legs():
    """The decode leg finds the prompt's KV, as if it were cached; what the prefill leg computed is charged all the same."""
    fairness = FairnessSettings(quantum_tokens=1000, output_weight=2.0)
    pool = Pool(beat("p0", "prefill"), beat("d0", "decode"), fairness=fairness)
    pool.ask(tenant="a")
    pool.assigned()
    accounts = pool.core._memory.book.lines.by_tenant.accounts
    planned = accounts.had("a")
    pool.answer("prefilled", kv_params=PARAMS, prompt_tokens=8000, cached_tokens=500)
    assert accounts.had("a") == planned - 500
    pool.assigned()

    pool.answer("completed", prompt_tokens=8000, cached_tokens=8000, output_tokens=10)

    assert accounts.had("a") == 7500 + 2.0 * 10


class TestANewLeader:
    """What stood between two legs is told by the first leg's reward; what was under way by its leg."""

    def pool(self, **settings: object) -> Pool:
        return Pool(beat("p0", "prefill"), beat("d0", "decode"), **settings)

    def recover(self, pool: Pool, *, prefilled_s: float | None = None, **fields: object) -> None:
        prefilled = None
        if prefilled_s is not None:
            prefilled = Reward(
                id="r1",
                endpoint="p0",
                epoch=1,
                attempt=1,
                leg="prefill",
                outcome="prefilled",
                finished_at=pool.now - prefilled_s,
                kv_params=PARAMS,
            )
        request = Request(id="r1", model="llama", prompt_tokens=8000, max_attempts=1)
        event = Recovered(
            request=request,
            entry="r1-0",
            enqueued_at=pool.now,
            attempt=1,
            leg="prefill",
            prefilled=prefilled,
            **fields,  # type: ignore[arg-type]
        )
        pool.core.receive(event, pool.now)

    def test_goes_on_with_the_kv_that_is_kept(self):
        """Its one attempt is not spent, and the lease counts from the prefill's own end."""
        pool = self.pool()
        self.recover(pool, handovers=1, prefilled_s=5.0)
        assert pool.assigned() == [("decode", "d0")]
        job = pool.jobs[0].job
        assert (job.attempt, job.kv_params) == (2, PARAMS)
        assert job.kv_until_at == pool.now - 5.0 + CoreSettings().kv_lease_s

    def test_counts_a_prefill_leg_as_the_old_one_did(self):
        """Its prompt and the first token, and not its answer."""
        old, new = self.pool(), self.pool()
        old.ask()
        old.assigned()
        self.recover(new, endpoint="p0", epoch=1)
        ledgers = [one.core._memory.book.ledger for one in (old, new)]
        assert ledgers[0].kv.tolist() == ledgers[1].kv.tolist() == [8001.0, 0.0]

    def test_begins_again_where_the_kv_may_be_forgotten(self):
        pool = self.pool()
        self.recover(pool, handovers=1, prefilled_s=CoreSettings().kv_lease_s + 0.1)
        assert pool.assigned() == [("prefill", "p0")]

    def test_begins_again_where_the_endpoint_began_a_new_life(self):
        pool = self.pool()
        pool.core.receive(beat("p0", "prefill", epoch=2), pool.now)
        pool.core.decide(pool.now)
        self.recover(pool, handovers=1, prefilled_s=5.0)
        assert [leg for leg, _ in pool.assigned()] == ["prefill"]

    def test_a_prefill_leg_under_way_may_still_hand_over(self):
        pool = self.pool()
        self.recover(pool, endpoint="p0", epoch=1)
        reward = Reward(
            id="r1",
            endpoint="p0",
            epoch=1,
            attempt=1,
            leg="prefill",
            outcome="prefilled",
            kv_params=PARAMS,
        )
        pool.core.receive(reward, pool.now)
        assert pool.assigned() == [("decode", "d0")]

    def test_what_was_cancelled_between_the_legs_ends(self):
        pool = self.pool()
        self.recover(pool, handovers=1, prefilled_s=1.0, cancelled=True)
        ended = [c for c in pool.core.decide(pool.now) if not isinstance(c, Note)]
        assert [c.result.outcome for c in ended] == ["cancelled"]


def test_kv_is_relied_on_from_when_the_engine_was_done():
    """A reward that was long on its way makes no KV younger: after the engine's lease it is somebody else's text."""
    pool = Pool(beat("p0", "prefill"), beat("d0", "decode"))
    pool.ask()
    pool.assigned()
    pool.now += 12.0
    for name, role in (("p0", "prefill"), ("d0", "decode")):
        pool.core.receive(beat(name, role), pool.now)
    pool.answer("prefilled", kv_params=PARAMS, finished_at=pool.now - 11.0)
    assert pool.assigned() == [("decode", "d0")]
    assert pool.jobs[0].job.kv_until_at == pool.now - 11.0 + CoreSettings().kv_lease_s
