"""Chained hashes, and who is believed to hold what."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.prefix import BLOCK_TOKENS, Account, Index, blocks
from scheduler.sessions import Sessions
from scheduler.slo import Promise
from scheduler.state import Ticket
from scheduler.wire.client import Request
from scheduler.work import Works


def index(room_tokens: int = 100 * BLOCK_TOKENS) -> Index:
    made = Index()
    made.open(0, room_tokens)
    made.open(1, room_tokens)
    return made


def test_equal_hashes_mean_equal_beginnings():
    """A hash is chained over all before it: the same block behind another beginning differs."""
    a, b = blocks("a" * 512 + "c" * 512), blocks("b" * 512 + "c" * 512)

    assert len(a) == len(b) == 2
    assert a[1] != b[1]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        pytest.param("", 0, id="nothing"),
        pytest.param("x" * 511, 0, id="a part has no hash"),
        pytest.param("x" * 512, 1, id="four bytes a token"),
        pytest.param("é" * 256, 1, id="bytes, not letters"),
        pytest.param(list(range(300)), 2, id="token ids"),
        pytest.param("x" * 512 * 600, 512, id="bounded"),
    ],
)
def test_only_whole_blocks_are_hashed(prompt, expected):
    """128 tokens a block, at most 512 of them."""
    assert len(blocks(prompt)) == expected


def test_only_a_beginning_without_gap_matches():
    """A later block alone is of no use to an engine."""
    held = index()
    held.insert(0, ("a", "b", "c"))
    held.insert(1, ("a",))

    assert held.match(("a", "b", "x", "c")) == {0: 2, 1: 1}
    assert held.match(("b", "c")) == {0: 2}
    assert held.match(("x", "a")) == {}
    assert held.match(()) == {}


def test_the_least_recent_goes_first_and_its_tail_before_its_head():
    """As the engine evicts: a chain loses its end, its beginning stays of use."""
    held = index(4 * BLOCK_TOKENS)
    held.insert(0, ("a1", "a2", "a3"))
    held.insert(0, ("b1", "b2"))

    assert held.match(("a1", "a2", "a3")) == {0: 2}
    assert held.match(("b1", "b2")) == {0: 2}


def test_a_new_life_holds_nothing():
    """An engine that began anew has an empty cache."""
    held = index()
    held.insert(0, ("a",))
    held.open(0, 0)

    assert held.match(("a",)) == {}


def test_what_was_not_found_is_believed_gone_at_once():
    """A tenth of its room with each surprise, tails first."""
    held, chain = index(10 * BLOCK_TOKENS), tuple(f"b{at}" for at in range(10))
    held.insert(0, chain)

    held.correct(0, believed_tokens=10 * BLOCK_TOKENS, cached_tokens=0)

    assert held.match(chain) == {0: 9}


def test_a_new_life_is_believed_from_its_first_word():
    """Neither what the last one was found to forget nor what it told counts against it."""
    held = index()
    for _ in range(200):
        held.correct(0, believed_tokens=10, cached_tokens=0)
    held.hear(0, Account(epoch=9, seq=1))
    held.open(0, 100 * BLOCK_TOKENS)

    held.insert(0, ("a",))
    held.hear(0, Account(epoch=1, seq=1, stored=("b",)))

    assert held.match(("a",)) == held.match(("b",)) == {0: 1}


def test_an_engine_that_finds_less_than_believed_is_believed_less():
    """An endpoint without prefix cache is not favoured for long; one that confirms grows back."""
    held = index()
    chain = tuple(f"b{i}" for i in range(50))
    for _ in range(60):
        held.insert(0, chain)
        held.correct(0, believed_tokens=50 * BLOCK_TOKENS, cached_tokens=0)
    assert held.match(chain) == {}

    for _ in range(200):
        held.correct(0, believed_tokens=10, cached_tokens=10)
        held.insert(0, chain)
    assert held.match(chain) == {0: 50}
    long = tuple(f"c{i}" for i in range(150))
    held.insert(0, long)
    assert held.match(long) == {0: 100}, "no more than the engine has"


CHAIN = tuple(f"b{at}" for at in range(6))
TURNS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "insert", "correct", "resize", "open", "lengthen"]),
        st.integers(0, 1),
        st.integers(0, len(CHAIN)),
    ),
    max_size=20,
)


@given(turns=TURNS)
def test_what_is_remembered_of_a_prompt_is_what_looking_it_up_says(turns):
    """Whatever was sent, lost or forgotten meanwhile, and also once the prompt's length is known better."""
    held, waits = index(), promised_nothing(len(CHAIN) * BLOCK_TOKENS)
    remembering = Works(held, Sessions(), (None, None))
    for what, slot, count in turns:
        if what == "insert":
            held.insert(slot, CHAIN[:count])
        elif what == "correct":
            held.correct(slot, believed_tokens=count, cached_tokens=0)
        elif what == "resize":
            held.resize(slot, count * BLOCK_TOKENS)
        elif what == "open":
            held.open(slot, count * BLOCK_TOKENS)
        else:
            waits.prompt_tokens = len(CHAIN) * BLOCK_TOKENS + count

        known = remembering.of(waits)
        anew = Works(held, Sessions(), (None, None)).of(waits)
        assert str(known) == str(anew)


def promised_nothing(tokens: int) -> Ticket:
    promise = Promise(
        ttft_s=None, tpot_s=None, deadline_at=None, priority=0, weight=1.0, refuse_at=None
    )
    return Ticket(
        request=Request(id="r", model="m", blocks=CHAIN),
        entry="1-0",
        enqueued_at=0.0,
        promise=promise,
        prompt_tokens=tokens,
        output_tokens=0,
        due_at=math.inf,
        rank=0.0,
        max_attempts=3,
    )
