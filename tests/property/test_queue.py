"""A line beside a sorted list of whoever stands in it."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.fairness import Accounts, FairnessSettings
from scheduler.order import Lines
from scheduler.queue import GAP_MAX, Queue, by_age, by_rank, by_size
from scheduler.slo import Promise
from scheduler.state import Ticket
from scheduler.wire.client import Request

FREE = Promise(ttft_s=None, tpot_s=None, deadline_at=None, priority=0, weight=1.0, refuse_at=None)
SHEDDABLE = msgspec.structs.replace(FREE, priority=-1)

TURNS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from([0.0, 1.0, 2.0]), st.integers(1, 400)),
        st.tuples(st.just("remove"), st.floats(0, 1), st.integers(1, 2 * GAP_MAX)),
    ),
    max_size=20,
)


def ticket(number: int, rank: float) -> Ticket:
    return Ticket(
        request=Request(id=f"r{number:05d}", model="mn"[number % 2]),
        entry="1-0",
        enqueued_at=0.0,
        promise=FREE,
        prompt_tokens=1,
        output_tokens=0,
        due_at=0.0,
        rank=rank,
        max_attempts=3,
    )


@given(turns=TURNS)
def test_a_line_is_what_sorting_would_say(turns):
    """Whoever comes and leaves, at the front, behind it or in the midst, and comes back: order, ends and length are right."""
    line, waiting, gone = Queue(by_rank), [], []
    for number, (what, where, count) in enumerate(turns):
        if what == "add":
            new = [ticket(1000 * number + i, where) for i in range(count)] + gone[:3]
            del gone[:3]
            for one in new:
                line.add(one)
            waiting = sorted(waiting + new, key=by_rank)
        else:
            at = int(where * len(waiting))
            gone = waiting[at : at + count]
            del waiting[at : at + count]
            for one in gone:
                line.remove(one)

        assert list(line) == waiting
        assert len(line) == len(waiting)
        assert (line.head(5), line.tail(5)) == (waiting[:5], waiting[::-1][:5])
        assert list(line.items(9)) == [(by_rank(one), one) for one in waiting[:9]]
        assert not waiting or line.first == by_rank(waiting[0])


MOVES = st.lists(
    st.tuples(
        st.sampled_from(["add", "remove", "set_aside", "take_up", "resize"]), st.integers(0, 99)
    ),
    max_size=40,
)


@pytest.mark.parametrize("has_tenants", [False, True])
@given(moves=MOVES)
def test_all_lines_tell_of_the_same_requests(has_tenants, moves):
    """Who waits and who is set aside, in every order, by model and in tokens, also where a length was misjudged."""
    accounts = Accounts(FairnessSettings(quantum_tokens=1000)) if has_tenants else None
    lines, waiting, aside = Lines(accounts), [], []
    for number, (move, one) in enumerate(moves):
        everybody = waiting + aside
        if move == "add":
            came = ticket(number, rank=float(one % 5))
            came.enqueued_at, came.prompt_tokens = float(-one), one
            came.promise = (FREE, SHEDDABLE)[one % 3 == 0]
            came.transition("read")
            lines.add(came)
            waiting.append(came)
        elif move == "set_aside" and waiting:
            aside.append(waiting.pop(one % len(waiting)))
            lines.set_aside(aside[-1])
        elif move == "take_up" and aside:
            waiting.append(aside.pop(one % len(aside)))
            lines.take_up(waiting[-1])
        elif everybody and move in ("remove", "resize"):
            chosen = everybody[one % len(everybody)]
            if move == "resize":
                lines.resize(chosen, one)
            else:
                lines.remove(chosen)
                (waiting if chosen in waiting else aside).remove(chosen)

        everybody = waiting + aside
        assert lines.waiting.head(len(everybody)) == sorted(waiting, key=by_rank)
        for line, place in (
            (lines.aside, by_rank),
            (lines.aside_by_size, by_size),
            (lines.aside_by_age, by_age),
        ):
            assert list(line) == sorted(aside, key=place)
        assert {one for same in lines.by_model.values() for one in same} == {
            one.id for one in everybody
        }
        assert all(lines.by_model.values())
        assert len(lines.sheddable) == sum(one.promise is SHEDDABLE for one in everybody)
        assert (len(lines), lines.tokens) == (
            len(everybody),
            sum(one.prompt_tokens for one in everybody),
        )
