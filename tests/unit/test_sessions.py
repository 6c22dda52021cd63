"""What a session left where, for requests that bring no blocks."""

import pytest

from scheduler.sessions import Sessions


def sessions(room: int = 10_000) -> Sessions:
    made = Sessions()
    made.open(0, room)
    made.open(1, room)
    return made


def test_a_session_is_where_its_last_prompt_was():
    """As far as the shorter of the two prompts goes."""
    held = sessions()
    held.insert(0, "talk", 500)

    assert held.match("talk", 800) == {0: 500}
    assert held.match("talk", 300) == {0: 300}
    assert held.match("other", 800) == {}


def test_the_least_recent_goes_first():
    """An endpoint has no more than its engine can hold."""
    held = sessions(room=1_000)
    for name in ("a", "b", "a", "c"):
        held.insert(0, name, 450)

    assert held.match("a", 450) == {0: 450}
    assert held.match("b", 450) == {}
    assert held.match("c", 450) == {0: 450}


def test_an_engine_that_turns_out_smaller_holds_no_more_than_it_can():
    """At once, the least recent first."""
    held = sessions(room=1_000)
    held.insert(0, "a", 450)
    held.insert(0, "b", 450)
    held.resize(0, 500)

    assert held.match("a", 450) == {}
    assert held.match("b", 450) == {0: 450}


def test_one_longer_than_all_is_nowhere():
    """And takes nothing with it that it should not."""
    held = sessions(room=1_000)
    held.insert(0, "long", 5_000)
    held.insert(1, "long", 400)

    assert held.match("long", 5_000) == {1: 400}


def test_sessions_that_share_nothing_are_soon_believed_nothing():
    """What engines find says how far a session is to be believed; who shares earns it back."""
    held = sessions()
    held.insert(0, "talk", 500)
    for _ in range(50):
        held.correct(0, expected_tokens=500, cached_tokens=0)
    assert held.match("talk", 500)[0] < 5

    for _ in range(50):
        held.correct(0, expected_tokens=500, cached_tokens=490)
    assert held.match("talk", 500)[0] == pytest.approx(490, rel=0.02)


def test_a_new_life_has_none():
    """Whoever was there before."""
    held = sessions()
    held.insert(0, "talk", 500)
    held.open(0, 10_000)

    assert held.match("talk", 500) == {}
