"""One step's plan: where the next ones go, and who must wait for what."""

import math
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.externality import STEP_TOKENS, others_s
from scheduler.fleet import Capacities, Eligible
from scheduler.ledger import Backlog, Ledger, Line, Rates, uncached
from scheduler.pace import Load, Noise
from scheduler.pins import Pins
from scheduler.plan import PlanSettings
from scheduler.planner import ASIDE_MAX, BLOCKED_MAX, Planner
from scheduler.policies import Terms
from scheduler.pressure import pressed, pressure
from scheduler.price import Usual
from scheduler.room import Decodes, Room
from scheduler.slo import Promise
from scheduler.state import Ticket
from scheduler.wire.client import Request
from scheduler.work import Work, left

SETTINGS = PlanSettings(commit_window_s=1.0, tie=0.0)
FREE = Promise(ttft_s=None, tpot_s=None, deadline_at=None, priority=0, weight=1.0, refuse_at=None)


def ticket(name: str, tokens: int, due_at: float = math.inf) -> Ticket:
    return Ticket(
        state="waiting",
        request=Request(id=name, model="m"),
        entry="1-0",
        enqueued_at=0.0,
        promise=FREE,
        prompt_tokens=tokens,
        output_tokens=0,
        due_at=due_at,
        rank=0.0,
        max_attempts=3,
    )


def usual() -> Usual:
    made = Usual()
    made.learn(0.1, 100.0)
    return made


def planner(
    token_s: list[float],
    *,
    busy_tokens: list[float] | None = None,
    overdue_s: list[float] | None = None,
    kv: list[float] | None = None,
    cached: list[float] | None = None,
    asked: list[str] | None = None,
    settings: PlanSettings = SETTINGS,
    answer_part: float = 1.0,
    broken: list[float] | None = None,
    now: float = 0.0,
    standing: Callable[[str], float] | None = None,
    **terms: float,
) -> Planner:
    """Endpoints of these speeds, with nothing but tokens to cost anything."""
    n = len(token_s)
    busy = np.array(busy_tokens or [0.0] * n)
    free_kv = np.array(kv or [np.inf] * n)
    room = Room(
        rates=Rates(overhead_s=np.zeros(n), token_s=np.array(token_s), pair_s=np.zeros(n)),
        backlog=Backlog(tokens=busy, pairs=np.zeros(n), overdue_s=np.array(overdue_s or [0.0] * n)),
        seats=np.full(n, 100.0),
        kv=free_kv.copy(),
        capacities=Capacities.of(kv=free_kv.copy(), length=np.full(n, np.inf)),
        pins=Pins(),
        decodes=Decodes(
            lambda: Load(
                np.full(n, 0.01), np.zeros(n), np.zeros(n), np.full(n, 0.01), np.full(n, 0.01)
            ),
            tightest_s=np.full(n, np.inf),
            promised=np.zeros(n),
            is_bound=False,
        ),
        eligible=Eligible.by(np.zeros(n)),
        answer_part=answer_part,
    )
    held = None if cached is None else np.array(cached)
    for slot in range(n):
        room.pins.open(slot)

    def work(one: Ticket) -> Work:
        if asked is not None:
            asked.append(one.id)
        return left(one, held)

    return Planner(
        room,
        now=now,
        settings=settings,
        terms=Terms(**terms),
        odds=lambda _, log_ratio: float(log_ratio >= 0),
        usual=usual(),
        noise=Noise,
        broken=lambda _: np.array(broken or [0.0] * n),
        standing=standing,
        work=work,
        barrier=lambda _: np.zeros(n),
        rng=np.random.default_rng(0),
    )


def served(made: Planner) -> list[tuple[str, int]]:
    return [(choice.ticket.id, choice.slot) for choice in made.choices]


@pytest.mark.parametrize(
    ("answer_part", "fitting"),
    [
        pytest.param(1.0, 1, id="room for the ends of all answers"),
        pytest.param(0.5, 2, id="room for what is said on average"),
    ],
)
def test_an_answer_counts_in_part(answer_part, fitting):
    """Where KV is given away a request counts with its prompt and a part of its expected answer."""
    asking = [ticket("a", 100), ticket("b", 100)]
    for one in asking:
        one.output_tokens = 199
    made = planner([0.001], kv=[400.0], answer_part=answer_part)

    made.serve(asking)

    assert [choice.line.kv for choice in made.choices] == fitting * [
        100 + math.ceil(199 * answer_part)
    ]


def test_the_first_token_comes_earliest():
    """A fast endpoint with a queue against an idle slow one: predicted seconds decide."""
    made = planner([0.001, 0.002], busy_tokens=[600.0, 0.0])

    made.serve([ticket("short", 500), ticket("long", 1000)])

    assert served(made) == [("short", 1), ("long", 0)]


def test_a_cached_prefix_is_worth_its_seconds():
    """Nine tenths are there already: no speed makes up for it."""
    made = planner([0.001, 0.002], cached=[0.0, 900.0])

    made.serve([ticket("r", 1000)])

    assert served(made) == [("r", 1)]
    assert made.choices[0].line.tokens == 100.0


def test_what_starts_beyond_the_window_keeps_its_place_and_is_not_handed_over():
    """The fast endpoint is kept for the more urgent; the next one does not slip in before it."""
    made = planner([0.001, 0.1], busy_tokens=[1500.0, 0.0])

    made.serve([ticket("urgent", 1000), ticket("small", 10)])

    assert served(made) == [("small", 1)]
    assert made.room.start_s[0] == 2.5


def test_the_plan_ends_when_nothing_more_can_start():
    """A full fleet costs nothing: the pricer is not asked."""
    made = planner([0.001], busy_tokens=[1001.0])
    made.serve([ticket("r", 10)])

    assert not made.is_exhausted
    assert served(made) == []


def test_the_line_is_looked_at_as_far_as_its_last_who_fits():
    """Time and a seat are no opening for those whose KV is nowhere free: nobody behind the last who fits is priced."""
    for sizes, priced in (([500, 600, 700], []), ([90, 500, 600], ["r0"])):
        asked = []
        made = planner([0.001], kv=[1000.0], asked=asked)
        made.room.take(0, 0.0, Line(tokens=0.0, pairs=0.0, kv=900.0))
        made.serve([ticket(f"r{i}", size) for i, size in enumerate(sizes)])

        assert asked == priced
        assert not made.is_exhausted


SIZES = st.lists(st.integers(1, 1500), min_size=1, max_size=ASIDE_MAX)
SOME = st.lists(st.sampled_from([0.0, 200.0, 500.0, 900.0, 1100.0, 3000.0]), min_size=3, max_size=3)


@given(
    sizes=SIZES, busy=SOME, free=SOME, held=st.integers(0, 5), odds_min=st.sampled_from([0, 0.5])
)
def test_whoever_is_looked_at_no_more_would_not_have_started(sizes, busy, free, held, odds_min):
    """To end early hands over the same, at the same places, as to look at everybody."""
    found = []
    for is_patient in (False, True):
        made = planner([0.001, 0.002, 0.004], busy_tokens=busy, kv=[3000.0] * 3, odds_min=odds_min)
        made.room.withhold(3000.0 - np.array(free))
        made.room.pins.hold(1, tuple(f"b{i}" for i in range(held)))
        line = [ticket(f"r{i}", size, due_at=1.0 + i) for i, size in enumerate(sizes)]
        for one in line[::2]:
            blocks = tuple(f"b{i}" for i in range(one.prompt_tokens // 128))
            one.request = msgspec.structs.replace(one.request, blocks=blocks)
        if is_patient:
            for one in line:
                made._place(made.offers.of(one))
        else:
            made.serve(line)
        found.append(served(made))

    assert found[0] == found[1]


def test_whoever_finds_no_room_keeps_one_endpoint_from_those_set_aside():
    """The one that suits it best empties for it; what is idle besides may serve somebody late."""
    made = planner([0.001, 0.002], kv=[1000.0, 1000.0])
    made.room.withhold(np.array([900.0, 900.0]))

    made.serve([ticket("large", 500)])
    assert made.has_idle()
    made.fill([ticket("late", 50), ticket("later", 50)], is_calm=False)

    assert served(made) == [("late", 1)]


def test_whoever_shares_what_others_hold_counts_as_one_who_fits():
    """Its own KV is what must be free: a prefix in use there is held once."""
    for held, expected in (("a", [("r", 0)]), ("b", [])):
        made = planner([0.001], kv=[1000.0])
        made.room.pins.hold(0, tuple(f"{held}{i}" for i in range(7)))
        made.room.take(0, 0.0, Line(tokens=0.0, pairs=0.0, kv=900.0))
        waits = ticket("r", 920)
        waits.request = msgspec.structs.replace(
            waits.request, blocks=tuple(f"a{i}" for i in range(7))
        )
        made.serve([waits])

        assert served(made) == expected


def test_the_hopeless_are_set_aside_for_those_who_can():
    """Feasibility before deadline order: the lost one costs the other nothing."""
    made = planner([0.001], odds_min=0.5)

    made.serve([ticket("lost", 900, due_at=0.5), ticket("can", 400, due_at=0.6)])

    assert [one.ticket.id for one in made.asides] == ["lost"]
    assert served(made) == [("can", 0)]


def test_where_many_wait_the_dearest_gives_way():
    """In overload a second is worth more to the short; with nobody behind it the long one is served (I10: price 0)."""
    line = [ticket("long", 800, due_at=1.0), *(ticket(f"r{i}", 50, due_at=1.0) for i in range(8))]
    for price, waiting, dropped in ((0.5, line, ["long"]), (0.5, line[:1], []), (0.0, line, [])):
        made = planner([0.001], odds_min=0.5, price=price)
        made.serve(waiting)

        gave_way = [one.ticket.id for one in made.asides]
        assert gave_way[:1] == dropped or (dropped == [] and "long" not in gave_way)


def test_an_endpoint_that_hangs_makes_nobody_elses_time_dear():
    """A minute that one is late by is nothing that anybody could have: the other serves as if it were alone."""
    made = planner([0.001, 0.001], overdue_s=[60.0, 0.0], odds_min=0.5, price=0.5)

    made.serve([ticket("r", 100, due_at=1.0)])

    assert served(made) == [("r", 1)]


def test_the_usual_request_is_the_mean_of_those_so_far():
    """The first says all there is to say, and a thousandth next to nothing."""
    made = Usual()
    for work_s, mean_s in ((1.0, 1.0), (3.0, 2.0), (5.0, 3.0)):
        made.learn(work_s, 100.0 * work_s)
        assert (made.work_s, made.tokens) == pytest.approx((mean_s, 100.0 * mean_s))
    for _ in range(1000):
        made.learn(3.0, 300.0)
    made.learn(103.0, 300.0)
    assert made.work_s == pytest.approx(4.0, abs=0.01)


@pytest.mark.parametrize(
    ("weight", "standing", "is_aside"),
    [(1.0, None, True), (10.0, None, False), (10.0, lambda _: 0.1, True)],
    ids=["usual", "worth ten", "of a tenant whose promises count a tenth"],
)
def test_a_greater_worth_buys_dearer_time(weight, standing, is_aside):
    """Where the price sets the usual aside, who counts ten times as much is served."""
    line = [ticket("r", 800, due_at=1.0), *(ticket(f"r{i}", 50, due_at=1.0) for i in range(8))]
    line[0].promise = msgspec.structs.replace(FREE, weight=weight)
    made = planner([0.001], odds_min=0.5, price=0.5, standing=standing)
    made.serve(line)

    assert ("r" in [one.ticket.id for one in made.asides]) == is_aside


def test_whoever_could_make_it_alone_gets_another_place_in_the_plan():
    """By the plain prediction, behind what runs there now; whom no prompt is short enough for is not even priced."""
    asked = []
    made = planner([0.001], busy_tokens=[500.0], asked=asked, now=7.0)
    aside = [
        ticket(n, 100, due_at=at) for n, at in (("late", 7.4), ("hardly", 7.59), ("can", 7.61))
    ]

    assert [one.id for one in made.hopeful(aside)] == ["can"]
    assert asked == ["hardly", "can"]


def test_one_step_sets_aside_a_bounded_number():
    """I8: behind a thousand hopeless ones the next step goes on."""
    made = planner([0.001], odds_min=0.5)
    made.serve([ticket(f"r{i}", 900, due_at=0.1) for i in range(100)])

    assert len(made.asides) == ASIDE_MAX
    assert made.is_cut


def test_idle_endpoints_serve_those_set_aside():
    """Short against the window, or in calm, whatever the length."""
    long, short = ticket("long", 5000), ticket("short", 100)
    busy = planner([0.001])
    busy.fill([long, short], is_calm=False)
    assert served(busy) == [("short", 0)]

    calm = planner([0.001])
    calm.fill([long], is_calm=True)
    assert served(calm) == [("long", 0)]


def test_a_place_kept_for_the_urgent_is_not_idle():
    """Nobody late slips in before it."""
    made = planner([0.001])
    made.room.reserve(0, 0.0, tokens=1.0, pairs=0.0)

    made.fill([ticket("late", 10)], is_calm=True)

    assert served(made) == []


def test_equals_are_drawn_with_their_propensity():
    """A tie is decided by chance and says so, for off-policy evaluation."""
    made = planner([0.001] * 4)
    made.serve([ticket("r", 100)])

    assert made.choices[0].propensity == 0.25


class TestLedger:
    def test_a_new_leader_counts_as_the_old_one_did(self):
        """What is taken over without a word about its cache stands there as if planned on an empty one."""
        made, one = planner([0.001]), ticket("r", 1000)
        one.output_tokens = 300
        made.serve([one])

        taken_over = uncached(one, answer_part=1.0, kv_max=math.inf)
        assert msgspec.structs.replace(made.choices[0].line, begins_at=-math.inf) == taken_over

    def test_a_head_is_presumed_to_progress_but_never_to_be_done(self):
        """Dead reckoning between the facts: half its time, half its tokens; at the end 5 % are left."""
        rates = Rates(overhead_s=np.zeros(1), token_s=np.full(1, 0.001), pair_s=np.zeros(1))
        book = Ledger()
        book.open(0)
        book.commit(0, "a", Line(tokens=1000.0, pairs=0.0, kv=10.0), now=0.0)

        assert book.backlog(rates, 0.5).seconds(rates)[0] == pytest.approx(0.5)
        assert book.backlog(rates, 1.5).seconds(rates)[0] == pytest.approx(0.05)

    @pytest.mark.parametrize(("overhead_s", "overdue_s"), [(0.0, 10.0), (0.5, 9.0)])
    def test_an_overdue_head_pushes_what_is_behind_it(self, overhead_s, overdue_s):
        """Twice its time, overhead included, and it is late: the endpoint is less free the longer it says nothing."""
        rates = Rates(
            overhead_s=np.full(1, overhead_s), token_s=np.full(1, 0.001), pair_s=np.zeros(1)
        )
        book = Ledger()
        book.open(0)
        book.commit(0, "a", Line(tokens=1000.0, pairs=0.0, kv=10.0), now=0.0)

        assert book.backlog(rates, 12.05).overdue_s[0] == pytest.approx(overdue_s)

    def test_what_is_entered_is_released_to_the_last_token(self):
        """Whatever the order, an empty endpoint has an empty account."""
        book = Ledger()
        book.open(0)
        for name in "abc":
            book.commit(0, name, Line(tokens=3.0, pairs=0.5, kv=7.0, tpot_s=0.05), now=0.0)
        assert book.bound == 3
        book.first_token(0, "b", now=1.0)
        book.first_token(0, "b", now=1.0)
        for name in "cab":
            book.release(0, name, now=2.0)

        for row in (book.tokens, book.pairs, book.seats, book.kv, book.decode_kv, book.read_kv):
            assert row[0] == 0.0
        assert (book.bound, book.tightest_s[0]) == (0, math.inf)


def decoding(
    promised: list[float],
    pace_s: list[float],
    alone_s: float = 0.01,
    settings: PlanSettings = SETTINGS,
    asked: list[str] | None = None,
    lately_s: float | None = None,
) -> Planner:
    """Two alike but for what decodes there: this many promises of 50 ms, at this pace, of late as well if not said."""
    made = planner([0.001, 0.001], settings=settings, asked=asked)
    late_s = np.array(pace_s) if lately_s is None else np.full(2, lately_s)
    load = Load(np.array(pace_s), np.full(2, 0.001), np.zeros(2), np.full(2, alone_s), late_s)
    made.room.decodes = Decodes(
        lambda: load,
        tightest_s=np.where(np.array(promised) > 0, 0.05, np.inf),
        promised=np.array(promised),
        is_bound=any(promised),
    )
    return made


def paced(name: str, tokens: int = 100, tpot_s: float = 0.05) -> Ticket:
    made = ticket(name, tokens)
    made.promise = msgspec.structs.replace(FREE, tpot_s=tpot_s)
    return made


@pytest.mark.parametrize(
    ("keep_clear", "late_worth", "expected"),
    [
        pytest.param(1.0, 0.3, [("late", 1)], id="where less is broken than it counts"),
        pytest.param(0.0, 0.3, [("late", 0)], id="off: where it is soonest (I10)"),
        pytest.param(1.0, 0.1, [], id="nowhere, if it counts less"),
    ],
)
def test_the_late_keep_the_quick_clear_for_those_to_come(keep_clear, late_worth, expected):
    """Both stand idle; at the quick one two of those to come would be late for it, at the slow one a fifth of one."""
    settings = msgspec.structs.replace(SETTINGS, keep_clear=keep_clear, late_worth=late_worth)
    made = planner([0.001, 0.002], broken=[2.0, 0.2], settings=settings)
    late = ticket("late", 3000, due_at=-1.0)
    late.transition("set_aside")

    made.fill([late], is_calm=True)

    assert served(made) == expected


class TestPace:
    def test_a_promise_per_token_is_put_where_it_can_be_kept(self):
        """The first token would come sooner where decoding is too slow for what was promised."""
        made = decoding([0.0, 0.0], [0.2, 0.02])
        made.room.start_s[1] = made.room.open_s[1] = 0.5

        made.serve([paced("r")])

        assert served(made) == [("r", 1)]
        assert made.choices[0].line.tpot_s == 0.05

    @pytest.mark.parametrize(
        ("lately_s", "due_at", "expected"),
        [
            pytest.param(0.046, 1.0, [], id="they have no slack"),
            pytest.param(0.02, 1.0, ["r"], id="they are ahead"),
            pytest.param(0.02, math.inf, [], id="but it loses nothing by waiting"),
        ],
    )
    def test_who_has_been_fast_of_late_may_be_slowed(self, lately_s, due_at, expected):
        """A promise is a mean over the whole answer. Both decode at 46 of 50 ms."""
        made = decoding([40.0, 40.0], [0.046, 0.046], lately_s=lately_s)
        one = paced("r")
        one.due_at, one.output_tokens = due_at, 100

        made.serve([one])

        assert [name for name, _ in served(made)] == expected

    @pytest.mark.parametrize(
        ("due_at", "slot"),
        [
            pytest.param(0.4, 0, id="the better pace begins too late"),
            pytest.param(math.inf, 1, id="it may come when it likes"),
        ],
    )
    def test_no_better_pace_is_waited_for_into_lateness(self, due_at, slot):
        """A place that gains more is none where the first token would be late and here it would not."""
        made = decoding([10.0, 0.0], [0.03, 0.02])
        made.room.start_s[1] = made.room.open_s[1] = 0.5
        one = paced("r")
        one.due_at, one.output_tokens = due_at, 24

        made.serve([one])

        assert served(made) == [("r", slot)]

    def test_a_better_pace_where_there_is_no_room_is_none(self):
        """Who gains most on an endpoint without a seat goes where there is one."""
        made = decoding([10.0, 0.0], [0.03, 0.02])
        made.room.shut(1)

        made.serve([paced("r")])

        assert served(made) == [("r", 0)]

    def test_nobody_is_put_where_it_would_break_more_than_it_gains(self):
        """Forty members at the edge of their promise: one more waits; it is not set aside."""
        made = decoding([40.0, 40.0], [0.05, 0.05])

        made.serve([paced("r")])

        assert served(made) == []
        assert made.asides == []

    def test_it_can_be_switched_off(self):
        """I10: with no worth for pace, the earliest first token decides alone."""
        settings = msgspec.structs.replace(SETTINGS, pace_worth=0.0)
        made = decoding([40.0, 40.0], [0.05, 0.05], settings=settings)

        made.serve([paced("r")])

        assert len(served(made)) == 1

    def test_who_has_time_leaves_the_place_to_others(self):
        """Where one more does a little harm a minute's promise waits and a second's does not; off, neither (I10)."""
        for patience, starting in ((1.0, ["soon"]), (0.0, ["soon", "minute"])):
            settings = msgspec.structs.replace(SETTINGS, patience=patience)
            for name, due_at in (("soon", 1.0), ("minute", 60.0)):
                made = decoding([40.0, 40.0], [0.035, 0.035], settings=settings)
                one = ticket(name, 100, due_at=due_at)
                one.output_tokens = 100

                made.serve([one])

                assert ([name] if served(made) else []) == [name] * (name in starting)
                assert made.asides == []

    def test_where_it_would_stay_longer_is_no_better_place(self):
        """Who has time to spare goes where it is served soonest, and not where its answer would take four times as long."""
        made = decoding([1.0, 1.0], [0.01, 0.04])
        made.room.start_s[1] = made.room.open_s[1] = 0.1
        one = ticket("r", 100, due_at=10.0)
        one.output_tokens = 100

        made.serve([one])

        assert served(made) == [("r", 0)]

    def test_who_is_late_already_breaks_less_for_a_place(self):
        """The same place is worth breaking something for one in time; worth nothing late, it is left empty (I10)."""
        for late_worth, n_served in ((1.0, 1), (0.0, 0)):
            settings = msgspec.structs.replace(SETTINGS, late_worth=late_worth)
            made = decoding([40.0, 40.0], [0.035, 0.035], settings=settings)
            late = ticket("late", 100, due_at=-1.0)
            late.output_tokens = 100
            late.transition("set_aside")

            made.fill([late], is_calm=True)

            assert len(served(made)) == n_served

    def test_who_waits_for_a_pace_does_not_wait_for_time(self):
        """Two who find no pace are told apart from those who wait for an endpoint, and ask no price of its time."""
        made = decoding([40.0, 40.0], [0.05, 0.05])
        blocked = [paced("a", tokens=500), paced("b", tokens=500)]

        made.serve(blocked)

        assert made.for_pace == blocked
        before = usual().waits(blocked, made.room)
        for one in blocked:
            one.waits_for_pace = True
        assert usual().waits(blocked, made.room) < before == 5.0

    def test_behind_so_many_others_who_were_promised_a_pace_are_not_tried(self):
        """I8: they wait for a pace too, without a price; whoever was promised none is still asked for."""
        asked = []
        made = decoding([40.0, 40.0], [0.05, 0.05], asked=asked)
        blocked = [paced(f"r{at}") for at in range(BLOCKED_MAX + 3)]

        made.serve([*blocked, ticket("free", 100)])

        assert made.for_pace[: len(blocked)] == blocked
        assert asked == [*(one.id for one in blocked[:BLOCKED_MAX]), "free"]

    def test_a_promise_that_nobody_could_keep_binds_nobody(self):
        """It is served, and whoever comes later need not mind it."""
        made = decoding([0.0, 0.0], [0.2, 0.2], alone_s=0.1)

        made.serve([paced("r")])

        assert made.choices[0].line.tpot_s == math.inf


class TestCachePatience:
    """Endpoint 0 has half of the prompt and no KV free, endpoint 1 could begin at once: one second for half a second."""

    def placed(self, one, *, token_s=(0.001, 0.001), cached=(500.0, 0.0), **settings):
        made = planner(
            list(token_s),
            kv=[2000.0, 2000.0],
            cached=list(cached),
            settings=msgspec.structs.replace(SETTINGS, **{"cache_patience": 1.0, **settings}),
        )
        made.room.withhold(np.array([1500.0, 0.0]))
        made.serve([one])
        return made

    def test_it_waits_where_its_prefix_is_for_as_long_as_it_would_save(self):
        made = self.placed(ticket("r", 1000))

        assert served(made) == []
        assert made.waits_until_at == pytest.approx(0.5)

    def test_then_it_goes_elsewhere(self):
        late = ticket("r", 1000)
        late.enqueued_at = -0.6

        made = self.placed(late)

        assert served(made) == [("r", 1)]
        assert made.waits_until_at == math.inf

    def test_a_faster_endpoint_is_not_waited_for(self):
        """The slower one would stand idle meanwhile, and nobody would have computed less."""
        assert served(self.placed(ticket("r", 1000), token_s=(0.0005, 0.001), cached=(0, 0))) == [
            ("r", 1)
        ]

    def test_a_faster_endpoint_is_waited_for_as_long_as_its_cache_saves(self):
        made = self.placed(ticket("r", 1000), token_s=(0.0001, 0.001))

        assert made.waits_until_at == pytest.approx(0.5)

    def test_whose_prompt_nobody_has_waits_for_nobody(self):
        """Not even for an endpoint ten times as fast."""
        made = planner([0.0001, 0.001], kv=[2000.0, 2000.0])
        made.room.withhold(np.array([1500.0, 0.0]))

        made.serve([ticket("r", 1000)])

        assert served(made) == [("r", 1)]

    def test_nobody_waits_into_lateness(self):
        """There must be time left for twice what is predicted elsewhere."""
        assert served(self.placed(ticket("r", 1000, due_at=2.1))) == []
        assert served(self.placed(ticket("r", 1000, due_at=1.9))) == [("r", 1)]

    def test_it_can_be_switched_off(self):
        assert served(self.placed(ticket("r", 1000), cache_patience=0.0)) == [("r", 1)]


class TestExternality:
    """What taking an endpoint's time costs others."""

    @given(
        prompt=st.floats(1, 100_000),
        cached=st.floats(0, 0.999),
        less=st.floats(0, 0.999),
        few=st.floats(0, 9),
        more=st.floats(0, 9),
    )
    def test_it_grows_with_who_is_there_and_with_what_is_cached_elsewhere(
        self, prompt, cached, less, few, more
    ):
        """Nothing where nobody is and nobody has more; never beyond the work itself for each of them and once more."""
        new = 1.0 - np.array([max(cached, less), min(cached, less), min(cached, less)])
        work_s = prompt * new * 1e-4
        joined = np.array([0.0, min(few, more), max(few, more)])

        nothing, least, most = others_s(prompt, work_s, new, joined)

        assert 0 == nothing <= least <= most <= work_s[2] * (1 + joined[2])

    def test_a_long_prompt_delays_nobody_by_more_than_a_step(self):
        """It comes in parts, and only the first is computed with those before it."""
        step_s = STEP_TOKENS * 1e-4
        alone = np.ones(1)

        cold_s = others_s(5 * STEP_TOKENS, 5 * step_s * alone, None, alone)
        warm_s = others_s(5 * STEP_TOKENS, step_s * alone, 0.2 * alone, alone)

        assert [cold_s[0], warm_s[0]] == pytest.approx([step_s, step_s])

    @pytest.mark.parametrize(
        ("one", "externality", "slot"),
        [
            (ticket("r", 1000), 1.0, 1),
            (ticket("r", 1000), 0.0, 0),
            (ticket("r", 1000, due_at=100.0), 1.0, 0),
        ],
        ids=["nothing", "switched off", "a first token"],
    )
    def test_who_was_handed_over_a_moment_ago_is_not_joined(self, one, externality, slot):
        """It would wait as long as the newcomer; who was promised a first token looks to its own."""
        settings = msgspec.structs.replace(SETTINGS, externality=externality, fill=0.0)
        made = planner([0.001, 0.0015], settings=settings)
        made.room.unbegun[0] = 1.0

        made.serve([one])

        assert served(made) == [("r", slot)]

    def test_two_of_one_step_do_not_join_each_other(self):
        """The first choice counts at once, though its endpoint would be the sooner for both."""
        for externality, slots in ((1.0, [0, 1]), (0.0, [0, 0])):
            settings = msgspec.structs.replace(SETTINGS, externality=externality, fill=0.0)
            made = planner([0.001, 0.0025], settings=settings)

            made.serve([ticket("a", 100), ticket("b", 100)])

            assert [slot for _, slot in served(made)] == slots

    def test_what_is_cached_elsewhere_counts_twice(self):
        """An endpoint a little sooner is not worth computing it anew: whoever comes next waits for that as well."""
        for externality, slot in ((1.0, 1), (0.0, 0)):
            settings = msgspec.structs.replace(SETTINGS, externality=externality, fill=0.0)
            made = planner(
                [0.001, 0.001], cached=[0.0, 500.0], busy_tokens=[0.0, 700.0], settings=settings
            )

            made.serve([ticket("r", 1000)])

            assert served(made) == [("r", slot)]

    def test_one_is_joined_until_its_engine_has_surely_begun(self):
        """From one to none within a step after the moment at which it could begin; none with its first token."""
        step_s, book = np.full(2, 0.1), Ledger()
        book.open(0)
        book.open(1)
        book.commit(1, "a", Line(tokens=9.0, pairs=0.0, kv=9.0, begins_at=5.0), now=4.0)
        book.commit(1, "b", Line(tokens=9.0, pairs=0.0, kv=9.0), now=4.0)

        found = [book.unbegun(step_s, now)[1] for now in (4.0, 5.0, 5.05, 5.1)]

        assert found == pytest.approx([1.0, 1.0, 0.5, 0.0])
        book.first_token(1, "a", now=4.5)
        assert book.unbegun(step_s, 4.5).tolist() == [0.0, 0.0]


class TestPressure:
    """What giving KV away costs others."""

    @given(
        used=st.floats(0, 1),
        more=st.floats(0, 1),
        cached=st.integers(0, 999),
        longer=st.integers(0, 999),
        promised=st.booleans(),
    )
    def test_it_grows_with_what_is_in_use_and_falls_with_what_is_cached(
        self, used, more, cached, longer, promised
    ):
        """Between nothing and one; the first half of the KV costs no more than the second."""
        low, high = sorted((used, more))
        few, many = sorted((cached, longer))
        least, emptier, fuller = pressure(
            np.array([low, low, high]),
            1.0 - np.array([many, few, few]) / 1000.0,
            is_promised=promised,
        )

        assert 0 <= least <= emptier <= fuller <= 1
        assert pressure(np.array([0.5 * high]), None, is_promised=promised)[0] <= 0.5 * high

    @given(pace_s=st.floats(1e-4, 1), slower_s=st.floats(1e-4, 1), promised_s=st.floats(1e-3, 1))
    def test_a_pace_presses_the_more_the_less_is_left_of_it(self, pace_s, slower_s, promised_s):
        """Nobody below half of what was promised, everybody beyond three quarters."""
        quick_s, slow_s = sorted((pace_s, slower_s))

        assert 0 <= pressed(quick_s, promised_s) <= pressed(slow_s, promised_s) <= 1
        assert pressed(0.49 * promised_s, promised_s) == 0
        assert pressed(0.76 * promised_s, promised_s) == 1


class TestFill:
    def test_among_near_equals_the_emptier_is_taken(self):
        """A full KV cache is worth some seconds of wait; off, only the first token counts (I10)."""
        for fill, slot in ((0.6, 1), (0.0, 0)):
            settings = msgspec.structs.replace(SETTINGS, fill=fill)
            made = planner([0.001, 0.0011], settings=settings)
            made.room.used[:] = 0.9, 0.1

            made.serve([ticket("r", 1000)])

            assert served(made) == [("r", slot)]

    def test_among_equally_full_the_one_that_has_the_prompt_is_taken(self):
        """It asks for less KV there: its first token comes as soon on both."""
        for cached, slot in (([500.0, 0.0], 0), ([0.0, 500.0], 1)):
            token_s = [0.002 if tokens else 0.001 for tokens in cached]
            made = planner(token_s, cached=cached)
            made.room.used[:] = 0.9, 0.9

            made.serve([ticket("r", 1000)])

            assert served(made) == [("r", slot)]

    @pytest.mark.parametrize(
        ("one", "slot"),
        [
            (ticket("r", 1000), 0),
            (ticket("r", 1000, due_at=100.0), 1),
            (paced("r", 1000, tpot_s=0.013), 1),
            (paced("r", 1000, tpot_s=0.02), 0),
        ],
        ids=["nothing", "a first token", "a pace", "a pace that all keep with ease"],
    )
    def test_whoever_was_promised_anything_is_spread_more_evenly(self, one, slot):
        """A half full endpoint is next to nothing to who was promised nothing; a crowded batch breaks promises."""
        made = planner([0.001, 0.0011])
        made.room.used[:] = 0.5, 0.1

        made.serve([one])

        assert served(made) == [("r", slot)]

    def test_the_tightest_pace_of_the_pool_is_pressed_not_only_ones_own(self):
        """Who has time to spare per token crowds those who have not."""
        for tightest_s, slot in ((0.02, 0), (0.013, 1)):
            made = planner([0.001, 0.0011])
            made.room.used[:] = 0.5, 0.1
            made.room.decodes.tightest_s[1] = tightest_s

            made.serve([paced("r", 1000, tpot_s=0.1)])

            assert served(made) == [("r", slot)]

    def test_who_would_be_late_there_does_not_pay_for_others(self):
        """Its slack ends before the emptier endpoint's first token."""
        made = planner([0.001, 0.0011])
        made.room.used[:] = 0.9, 0.1

        made.serve([ticket("r", 1000, due_at=1.05)])

        assert served(made) == [("r", 0)]

    def test_the_best_prefix_match_is_written_down(self):
        """Beside the one that was taken: what not following it cost can be told."""
        made = planner([0.0001, 0.01], cached=[0.0, 900.0])

        made.serve([ticket("r", 1000)])

        assert served(made) == [("r", 0)]
        assert (made.choices[0].cached_tokens, made.choices[0].best_cached_tokens) == (0, 900)


class TestWeight:
    def test_promises_of_more_worth_are_broken_for_nobody_of_less(self):
        """One promise of weight 8 there counts as eight would: the same newcomer is not put beside it."""
        light = decoding([1.0, 0.0], [0.049, 0.2])
        heavy = decoding([8.0, 0.0], [0.049, 0.2])

        for made in (light, heavy):
            made.serve([paced("r")])

        assert (served(light), served(heavy)) == ([("r", 0)], [])

    def test_a_newcomer_of_more_worth_is_put_where_a_lesser_is_not(self):
        """What it gains counts by its own weight."""
        lesser, greater = paced("r"), paced("r")
        greater.promise = msgspec.structs.replace(greater.promise, weight=20.0)
        found = []
        for one in (lesser, greater):
            made = decoding([8.0, 8.0], [0.049, 0.049])
            made.serve([one])
            found.append(len(served(made)))

        assert found == [0, 1]

    def test_the_ledger_adds_up_what_promises_are_worth(self):
        """And leaves no dust when the last is gone."""
        book = Ledger()
        book.open(0)
        for name, weight in (("a", 0.1), ("b", 0.2), ("c", 0.7)):
            book.commit(0, name, Line(tokens=1, pairs=1, kv=1, tpot_s=0.05, weight=weight), 0.0)
        assert book.promised[0] == pytest.approx(1.0)

        for name in "abc":
            book.release(0, name, 1.0)

        assert book.promised[0] == 0.0
