"""What a worker has in hand, and who of it goes into the engine."""

import pytest
from attempts import held, job

from scheduler.errors import EngineError
from scheduler.settings import EngineAddress, WorkerSettings
from workers.admission import Admission
from workers.engine import Engine
from workers.hands import Hands
from workers.health import Health
from workers.metrics import Gaps
from workers.rhythm import Rhythm

ADDRESS = EngineAddress(name="e0", url="http://127.0.0.1:1", max_num_seqs=4)


def taken(hands, *attempts):
    for one in attempts:
        hands.take(one)
        hands.hold(one)
    return attempts


class TestHands:
    def test_an_attempt_goes_through(self):
        """Held, running, through with the engine, gone; in hand until the last."""
        hands = Hands(2)
        assert hands.empty.is_set()
        [one] = taken(hands, held())
        assert (one.stage, list(hands.held.values())) == ("held", [one])
        assert not hands.empty.is_set()

        hands.start(one)
        assert (one.stage, hands.held, list(hands.running.values())) == ("running", {}, [one])
        hands.leave(one)
        assert (hands.running, list(hands.all.values())) == ({}, [one])
        hands.leave(one)
        assert not hands.empty.is_set()
        hands.forget(one)

        assert (one.stage, hands.all) == ("gone", {})
        assert hands.empty.is_set()

    def test_there_is_room_for_so_many(self):
        """Whatever they do; who reads waits until one is gone."""
        hands = Hands(2)
        one, two = taken(hands, held("r1"), held("r2"))
        assert hands.room == 0
        assert not hands.has_room.is_set()

        hands.start(one)
        assert not hands.has_room.is_set()
        hands.forget(two)

        assert hands.room == 1
        assert hands.has_room.is_set()
        assert not hands.empty.is_set(), "one is left"

    def test_the_last_place_is_a_place(self):
        """It is full with the second of two, not with the first."""
        hands = Hands(2)
        taken(hands, held("r1"))

        assert hands.has_room.is_set()

    def test_overfull_it_waits_for_two(self):
        """What a predecessor left is adopted, room or none."""
        hands = Hands(1)
        one, two = taken(hands, held("r1"), held("r2"))

        hands.forget(one)
        assert not hands.has_room.is_set()
        hands.forget(two)
        assert hands.has_room.is_set()

    def test_an_attempt_is_known_by_its_number_and_entry(self):
        """Another number is a later attempt; another entry a request that Redis lost and got again."""
        hands = Hands(2)
        taken(hands, held())

        assert hands.knows(job())
        assert not hands.knows(job(attempt=2))
        assert not hands.knows(job(entry="2-0"))
        assert not hands.knows(job("r2"))

    def test_who_was_replaced_takes_nothing_along(self):
        """The newer attempt of the same id stays, though the older one ends late."""
        hands = Hands(4)
        [old] = taken(hands, held())
        hands.start(old)
        [new] = taken(hands, held(attempt=2))
        hands.forget(old)
        assert list(hands.all.values()) == [new]
        hands.start(new)

        hands.leave(old)

        assert list(hands.running.values()) == [new]


@pytest.fixture
def door():
    """A door at time 0, its hands and its engine's health: it is there."""
    hands, settings = Hands(64), WorkerSettings(margin=0.0, step_s=None)
    health = Health(Engine(ADDRESS, connect_s=1.0), ADDRESS, settings, clock=lambda: 0.0)
    health.away = ""
    rhythm = Rhythm("a100", Gaps())

    def made(**changed):
        return Admission(
            ADDRESS,
            WorkerSettings(**{"margin": 0.0} | changed),
            health=health,
            rhythm=rhythm,
            hands=hands,
            clock=lambda: 0.0,
        )

    return made, hands, health


class TestAdmission:
    def test_nobody_goes_to_an_engine_that_is_away(self, door):
        """Nor to one of which it is asked at this moment whether it is."""
        made, hands, health = door
        taken(hands, held("r1"), held("r2"))
        assert len(made().chosen()) == 2
        health._doubts = 1
        assert made().chosen() == []
        health._doubts = 0
        for _ in range(3):
            health.failed(EngineError("broken"))
        assert health.away

        assert made().chosen() == []

    def test_a_lonely_one_always_goes(self, door):
        """However slow it will be: alone in the engine is the best that it can get."""
        made, hands, _ = door
        [one] = taken(hands, held(tpot_s=1e-9, prompt_tokens=10**6))

        assert made().chosen() == [one]
        assert made(step_s=1e-9).chosen() == [one]

        taken(hands, held("r2"))
        assert len(made(step_s=1e-9).chosen()) == 1, "and one of two"

    def test_beside_others_the_promises_are_asked(self, door):
        """One held alone is judged by those in the engine, and by the operator's own bound."""
        made, hands, _ = door
        first, second = taken(hands, held("r1"), held("r2", prompt_tokens=1000))
        hands.start(first)

        assert made().chosen() == [second]
        assert made(step_s=1e-9).chosen() == []

    def test_nobody_waits_there_for_a_seat(self, door):
        """No more than the engine has; those that may go, in the order of their priority."""
        made, hands, _ = door
        [first] = taken(hands, held("r0"))
        hands.start(first)
        taken(hands, *(held(f"r{n}", priority=n, expected_tokens=10) for n in range(1, 7)))

        assert [one.job.id for one in made().chosen()] == ["r6", "r5", "r4"]

    def test_patience_and_margin_are_the_settings(self, door):
        """Who has waited longer than that goes first; a promise is kept with so much to spare."""
        made, hands, _ = door
        [first] = taken(hands, held("r0"))
        hands.start(first)
        taken(hands, held("r1", priority=1), held("r2", pulled_at=-10.0))
        assert [one.job.id for one in made(patience_s=5.0).chosen()] == ["r2", "r1"]
        assert [one.job.id for one in made(patience_s=50.0).chosen()] == ["r1", "r2"]

        hands.held.clear()
        [paced] = taken(hands, held("r3", tpot_s=0.05))
        assert made(margin=0.0).chosen() == [paced]
        assert made(margin=0.9).chosen() == []
