"""Who may enter the engine: promises, KV tokens and seats stop it; nobody waits for ever."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, composite

from scheduler.batching import Candidate, Limits, Member, admit
from scheduler.steptime import Law

LAW = Law(base_s=0.010, sequence_s=0.0, kv_s=1e-6, prefill_s=0.0)
EXACT = Limits(margin=0.0)


def held(prompt=1000, output=1.0, uncached=0, **more):
    return Candidate(prompt_tokens=prompt, uncached_tokens=uncached, output_tokens=output, **more)


def member(context=1000, **more):
    return Member(context_tokens=context, remaining_tokens=100.0, **more)


class TestPromises:
    def test_fills_to_the_promise_in_kv_tokens(self):
        """Requests join until one more would break the tightest TPOT: here five times a thousand tokens."""
        chosen = admit([], [held(tpot_s=0.0151)] * 9, LAW, EXACT, now=0.0)

        assert len(chosen) == 5

    def test_one_long_member_takes_the_place_of_many_short(self):
        """The cap counts tokens, not seats."""
        running = [member(4000, tpot_s=0.0151)]

        assert len(admit(running, [held()] * 9, LAW, EXACT, now=0.0)) == 1
        assert len(admit([member(0, tpot_s=0.0151)], [held()] * 9, LAW, EXACT, now=0.0)) == 5

    def test_who_is_ahead_may_be_slowed(self):
        """A promise is a mean: banked seconds are spent on company."""
        late = member(4900, tpot_s=0.015)
        ahead = member(4900, tpot_s=0.015, banked_s=0.2)

        assert admit([late], [held()], LAW, EXACT, now=0.0) == []
        assert admit([ahead], [held()], LAW, EXACT, now=0.0) == [0]

    def test_a_lost_promise_binds_nobody(self):
        """Who cannot keep its promise even alone does not keep others out."""
        lost = member(1000, tpot_s=0.005)

        assert admit([lost], [held()] * 3, LAW, EXACT, now=0.0) == [0, 1, 2]

    @pytest.mark.parametrize(("banked_s", "joined"), [(-0.3, []), (-1.0, [0])])
    def test_who_can_never_catch_up_binds_nobody(self, banked_s, joined):
        """A hundred tokens are left to make up for what it is behind: 3 ms a token it could, 10 ms nobody can."""
        behind = member(1000, tpot_s=0.015, banked_s=banked_s)

        assert admit([behind], [held(9000)], LAW, EXACT, now=0.0) == joined

    def test_who_will_miss_its_promise_anyway_binds_nobody(self):
        """The prompt that is in the engine already costs it more than what it was ahead: no newcomer is to blame."""
        law = Law(base_s=0.010, sequence_s=0.0, kv_s=1e-6, prefill_s=1e-3)
        decoding = Member(context_tokens=4500, remaining_tokens=100.0, tpot_s=0.015)
        prompt = Member(context_tokens=0, remaining_tokens=100.0, prefill_tokens=2000)

        assert admit([decoding], [held()], law, EXACT, now=0.0) == []
        assert admit([decoding, prompt], [held()], law, EXACT, now=0.0) == [0]

    def test_a_prompt_that_stalls_the_members_is_no_reason_to_wait(self):
        """It has to be computed, and whoever is there then waits for it: held back, only its own first token is later."""
        law = Law(base_s=0.010, sequence_s=0.0, kv_s=0.0, prefill_s=1e-3)

        assert admit([member(tpot_s=0.011)], [held(uncached=2000)], law, EXACT, now=0.0) == [0]

    @pytest.mark.parametrize(
        ("remaining", "n_joined"),
        [
            pytest.param(10.0, 1, id="they leave before they grow"),
            pytest.param(1000.0, 0, id="they grow as long as it decodes"),
        ],
    )
    def test_members_grow_until_they_leave(self, remaining, n_joined):
        """A thousand tokens more each would be too many for the promise, and who leaves soon says no thousand."""
        running = [
            Member(context_tokens=1000, remaining_tokens=remaining, tpot_s=0.014) for _ in range(2)
        ]
        newcomer = held(output=1000.0, tpot_s=0.014)

        assert len(admit(running, [newcomer], LAW, EXACT, now=0.0)) == n_joined

    def test_the_margin_is_kept_back(self):
        """A tenth held back of a 15 ms promise leaves room for three thousand tokens of five."""
        chosen = admit([], [held(tpot_s=0.0151)] * 9, LAW, Limits(margin=0.1), now=0.0)

        assert len(chosen) == 3

    def test_the_operator_may_cap_the_step(self):
        """Without any promise the step still stays under the operator's own bound."""
        limits = Limits(margin=0.0, step_s=0.0131)

        assert len(admit([], [held()] * 9, LAW, limits, now=0.0)) == 3

    def test_nobody_is_kept_out_for_want_of_kv(self):
        """Blocks are the dispatcher's account: kept here as well they stood empty beside those who waited for them."""
        vast = held(10**9, output=1e9, uncached=10**9)

        assert len(admit([member(10**9)], [vast] * 9, LAW, EXACT, now=0.0)) == 9


class TestOrder:
    def test_the_feasible_go_first(self):
        """Who can still keep its promise goes before who cannot."""
        lost, kept = held(due_at=0.005), held(due_at=1.0)

        assert admit([member()], [lost, kept], LAW, EXACT, now=0.0) == [1, 0]

    def test_then_the_cheapest_for_its_worth(self):
        """Least KV tokens times steps for its weight."""
        dear, cheap, worthy = held(4000), held(1000), held(4000, weight=10.0)

        assert admit([member()], [dear, cheap, worthy], LAW, EXACT, now=0.0) == [2, 1, 0]

    @given(prompt=st.integers(0, 9999), output=st.integers(0, 9999), more=st.integers(1, 9999))
    def test_a_price_is_the_tokens_held_summed_over_the_steps(self, prompt, output, more):
        """Each step holds one more than the last; who says nothing stays for one step all the same, and nobody is free."""
        by_step = [prompt + step + 0.5 for step in range(output)] or [prompt]

        assert held(prompt, output).kv_seconds == pytest.approx(max(sum(by_step), 1.0))
        assert held(prompt + more, output).kv_seconds >= held(prompt, output).kv_seconds
        assert held(prompt, output + more).kv_seconds >= held(prompt, output).kv_seconds

    def test_priority_comes_before_price(self):
        """Higher first."""
        assert admit([member()], [held(), held(9000, priority=1)], LAW, EXACT, now=0.0) == [1, 0]

    def test_patience_ends(self):
        """Who has waited longest goes first in the end, and nobody passes it while it does not fit."""
        tight = member(3000, tpot_s=0.015)
        old = held(9000, held_at=0.0)

        assert admit([tight], [old, held(held_at=9.0)], LAW, EXACT, now=4.0) == [1]
        assert admit([tight], [old, held(held_at=9.0)], LAW, EXACT, now=9.0) == []

    @pytest.mark.parametrize(("now", "joined"), [(4.0, [1]), (9.0, [])])
    def test_who_does_not_fit_is_passed_while_it_is_patient(self, now, joined):
        """Though it stands first: what has room for a short one is not left empty for a long one's sake."""
        first, short = held(9000, priority=1), held(100, held_at=9.0)

        assert admit([member(4000, tpot_s=0.0145)], [first, short], LAW, EXACT, now) == joined

    def test_an_empty_batch_takes_one_whatever_it_costs(self):
        """Otherwise a request whose promise nobody can keep would wait for ever."""
        hopeless = held(10**6, tpot_s=1e-9, due_at=0.0)
        limits = Limits(step_s=1e-9)

        assert admit([], [hopeless] * 2, LAW, limits, now=1e9) == [0]


SECONDS = st.floats(0, 1) | st.just(math.inf)


@composite
def members(draw: DrawFn) -> list[Member]:
    return draw(
        st.lists(
            st.builds(
                Member,
                context_tokens=st.integers(0, 50_000),
                remaining_tokens=st.floats(0, 5000),
                tpot_s=st.floats(1e-4, 1) | st.just(math.inf),
                banked_s=st.floats(-5, 5),
                prefill_tokens=st.floats(0, 5000),
            ),
            max_size=12,
        )
    )


@composite
def candidates(draw: DrawFn) -> list[Candidate]:
    return draw(
        st.lists(
            st.builds(
                Candidate,
                prompt_tokens=st.integers(0, 50_000),
                uncached_tokens=st.floats(0, 50_000),
                output_tokens=st.floats(0, 5000),
                tpot_s=st.floats(1e-4, 1) | st.just(math.inf),
                due_at=st.floats(0, 100) | st.just(math.inf),
                held_at=st.floats(0, 100),
                priority=st.integers(-2, 2),
            ),
            max_size=12,
        )
    )


LAWS = st.builds(Law, *[st.floats(0, 1e-2)] * 4)


@given(members(), candidates(), LAWS, st.integers(1, 16), st.floats(0, 100))
def test_i3_never_overfills(running, waiting, law, seats, now):
    """I3: running + joined <= seats, each at most once, whatever the prediction says; and never a standstill."""
    running = running[:seats]

    joined = admit(running, waiting, law, Limits(seats=seats), now)

    assert len(running) + len(joined) <= seats
    assert len(set(joined)) == len(joined)
    assert all(0 <= index < len(waiting) for index in joined)
    if waiting and not running:
        assert joined


CALM = st.builds(
    Law, st.floats(1e-3, 1e-2), st.floats(0, 1e-3), st.floats(0, 1e-6), prefill_s=st.just(0.0)
)
PROMISED = st.floats(2e-3, 0.1) | st.just(math.inf)
SIZED = st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 500), PROMISED), max_size=8)


@given(SIZED, SIZED, CALM)
def test_who_joins_breaks_no_promise_that_holds(running, waiting, law):
    """Whose pace held before has it still, and who joins keeps its own unless nobody could."""
    inside = [Member(context, output, tpot_s) for context, output, tpot_s in running]
    outside = [held(prompt, output, tpot_s=tpot_s) for prompt, output, tpot_s in waiting]

    joined = [waiting[index] for index in admit(inside, outside, law, Limits(margin=0.1), now=0.0)]

    read = sum(context for context, _, _ in running)
    before_s = law.step_s(len(running), read)
    after_s = law.step_s(len(running) + len(joined), read + sum(prompt for prompt, _, _ in joined))
    held_before = [tpot_s for _, _, tpot_s in running if before_s <= 0.9 * tpot_s]
    could = [tpot_s for prompt, _, tpot_s in joined if law.step_s(1, prompt) <= 0.9 * tpot_s]
    assert all(after_s <= 0.9 * tpot_s + 1e-9 for tpot_s in held_before + could)


@given(candidates(), LAWS)
def test_everybody_gets_in_once_the_batch_is_empty(waiting, law):
    """Admitting into an emptied engine again and again empties the line: no deadlock."""
    turns = 0
    while waiting:
        joined = set(admit([], waiting, law, Limits(), now=50.0))
        waiting = [one for index, one in enumerate(waiting) if index not in joined]
        turns += 1
        assert turns <= 12
