"""A line beside a sorted list of whoever stands in it."""

from hypothesis import given
from hypothesis import strategies as st

from scheduler.queue import GAP_MAX, Queue, by_rank
from scheduler.slo import Promise
from scheduler.state import Ticket
from scheduler.wire.client import Request

FREE = Promise(ttft_s=None, tpot_s=None, deadline_at=None, priority=0, weight=1.0, refuse_at=None)

TURNS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from([0.0, 1.0, 2.0]), st.integers(1, 400)),
        st.tuples(st.just("remove"), st.floats(0, 1), st.integers(1, 2 * GAP_MAX)),
    ),
    max_size=20,
)


def ticket(number: int, rank: float) -> Ticket:
    return Ticket(
        request=Request(id=f"r{number:05d}", model="m"),
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
