"""How long is waited for a deadline, for KV, for an engine's next word; and that nothing is looked at sooner."""

import math

import pytest
from attempts import held

from scheduler.settings import WorkerSettings
from workers import vigil as vigils
from workers.attempt import STALE, Stop
from workers.vigil import BLIND_S, Vigil

NOW, TICK = 1000.0, 5000.0
"What the clocks say, unless a test says otherwise."

SETTINGS = WorkerSettings(first_token_s=100.0, gap_s=30.0, stall_s=5.0)


@pytest.fixture(autouse=True)
def tick(monkeypatch):
    """Sets what the second clock says."""

    def says(tick):
        monkeypatch.setattr(vigils, "perf_counter", lambda: tick)

    says(TICK)
    return says


class Watch(Vigil):
    """One whose clock stands still, and which counts what became due before all else."""

    def __init__(self, settings=SETTINGS):
        self.sooner = 0
        super().__init__(settings, lambda: NOW, self._count)

    def _count(self):
        self.sooner += 1

    def ended(self, *attempts, heard_s=0.0):
        """Those that are over, where the engine last sent something so many seconds ago."""
        return list(self.over(attempts, TICK - heard_s))


def running(*, silent_s, has_spoken=True, is_done=False, **fields):
    """In the engine, which has said nothing for it for so many seconds."""
    one = held(**fields)
    one.stage = "running"
    one.last_tick = TICK - silent_s
    one.first_token_at = NOW if has_spoken else None
    one.answer.is_done = is_done
    return one


class TestDue:
    def test_nothing_is_due_of_nothing(self):
        """It sleeps until somebody says something."""
        watch = Watch()
        watch.arrived(held())

        assert watch.due_s() == math.inf
        assert watch.ended(held()) == []
        assert watch.due_s() == math.inf

    def test_the_earliest_counts(self):
        """Whoever sleeps is woken by what comes sooner, and by nothing else."""
        watch = Watch()
        for deadline_at, sooner in ((NOW + 50, 1), (NOW + 50, 1), (NOW + 80, 1), (NOW + 20, 2)):
            watch.arrived(held(deadline_at=deadline_at))
            assert watch.sooner == sooner
        assert watch.due_s() == 20.0

        watch.arrived(held(deadline_at=NOW + 90, kv_until_at=NOW + 10))
        assert watch.due_s() == 10.0

    def test_an_engine_has_time_to_its_first_token_and_then_between_two(self):
        """While one speaks the whole engine must: the next token is due by the shorter of two silences."""
        watch = Watch()
        watch.began(TICK)
        assert watch.due_s() == 100.0
        watch.spoke(TICK)
        assert watch.due_s() == 5.0

        patient = Watch(WorkerSettings(first_token_s=100.0, gap_s=30.0, stall_s=60.0))
        patient.spoke(TICK)
        assert patient.due_s() == 30.0

    def test_it_is_looked_again_when_the_next_may_be_over(self):
        """Every token has moved its own later; what was due before is forgotten."""
        watch = Watch()
        watch.arrived(held(deadline_at=NOW + 1))
        one = running(silent_s=3.0, has_spoken=False, deadline_at=NOW + 200)

        assert watch.ended(one) == []
        assert watch.due_s() == 97.0

        assert watch.ended(one, held(deadline_at=NOW + 60)) == []
        assert watch.due_s() == 60.0

    @pytest.mark.parametrize(("heard_s", "due_s"), [(2.0, 3.0), (7.0, vigils.AGAIN_S)])
    def test_a_frozen_engine_is_looked_for_while_answers_are_under_way(self, heard_s, due_s):
        """When its silence may be long enough; where it is already, soon again."""
        watch = Watch()

        assert watch.ended(running(silent_s=0.0), heard_s=heard_s) == []

        assert watch.due_s() == pytest.approx(due_s)

    @pytest.mark.parametrize(
        "one",
        [
            pytest.param(running(silent_s=0.0, has_spoken=False), id="its prompt is computed"),
            pytest.param(running(silent_s=0.0, is_done=True), id="all is said"),
        ],
    )
    def test_who_waits_for_no_token_proves_nothing(self, one):
        """An engine may be silent for long over a prompt."""
        watch = Watch()

        assert watch.ended(one, heard_s=7.0) == []
        assert watch.due_s() >= 5.0
        assert watch.stalled([one], TICK - 7.0) == ""


class TestOver:
    def test_a_deadline_ends_it_wherever_it_is(self):
        """Held or running; at the moment itself it is still in time."""
        late = {"deadline_at": NOW - 0.001}
        watch = Watch()

        assert [stop.kind for _, stop in watch.ended(held(**late))] == ["expired"]
        assert [stop.kind for _, stop in watch.ended(running(silent_s=0, **late))] == ["expired"]
        assert watch.ended(held(deadline_at=NOW)) == []

    def test_kv_is_relied_on_before_its_end_alone(self):
        """From then on it may be somebody else's; who has fetched it does not mind."""
        watch, fetched = Watch(), running(silent_s=0.0, kv_until_at=NOW)
        stale, fresh = held(kv_until_at=NOW), held(kv_until_at=NOW + 1)

        assert watch.ended(stale, fresh, fetched) == [(stale, STALE)]

    @pytest.mark.parametrize(
        ("silent_s", "how", "words"),
        [
            (100.0, {"has_spoken": False}, None),
            (101.0, {"has_spoken": False}, "silent for 100 s before the first token"),
            (30.0, {}, None),
            (31.0, {}, "silent for 30 s between two tokens"),
            (5.0, {"is_done": True}, None),
            (6.0, {"is_done": True}, "silent for 5 s after [DONE]"),
        ],
    )
    def test_an_engines_silence_has_a_bound(self, silent_s, how, words):
        """Before the first token, between two, and after the last; each has its own."""
        one = running(silent_s=silent_s, **how)

        stops = [stop for _, stop in Watch().ended(one)]

        expected = [] if words is None else [Stop("silent", f"the engine was {words}")]
        assert stops == expected

    def test_who_ends_already_is_left_alone(self):
        """A second reason would be no news, and a second end one too many."""
        stopped = running(silent_s=999.0, deadline_at=NOW - 1)
        stopped.stop = Stop("cancelled")
        ending = running(silent_s=999.0, deadline_at=NOW - 1)
        ending.stage = "ending"
        watch = Watch()

        assert watch.ended(stopped, ending, heard_s=-90.0) == []
        assert watch.due_s() > 5.0, "nor is it waited for"

    def test_each_is_judged_by_itself(self):
        """One that is over takes nobody along."""
        late, sound = held(deadline_at=NOW - 1), running(silent_s=0.0)

        assert [one for one, _ in Watch().ended(late, sound)] == [late]


class TestStalled:
    def _looked(self):
        """One that has just looked, and so was not blind."""
        watch = Watch()
        watch.stalled([], 0.0)
        return watch

    def test_no_token_from_anywhere_is_a_frozen_engine(self):
        """Decoding brings one every step; how many wait is said."""
        two = [running(silent_s=0.0), running(silent_s=0.0, has_spoken=False)]

        reason = self._looked().stalled(two, TICK - 6.0)

        assert reason == "the engine sent nothing for 5 s with 2 answers under way"
        assert self._looked().stalled(two, TICK - 4.0) == ""

    def test_an_engine_that_is_just_in_time_is_not(self):
        """Its silence must be longer than the bound."""
        assert self._looked().stalled([running(silent_s=0.0)], TICK - 5.0) == ""

    def test_who_stood_still_himself_knows_nothing(self, tick):
        """What was sent meanwhile lies unread: the next look tells."""
        watch, one = Watch(), running(silent_s=0.0)
        heard_tick = TICK - 60.0

        assert watch.stalled([one], heard_tick) == "", "its first look"
        assert watch.stalled([one], heard_tick) != ""
        tick(TICK + BLIND_S)
        assert watch.stalled([one], heard_tick) != ""
        tick(TICK + 2 * BLIND_S + 0.1)
        assert watch.stalled([one], heard_tick) == ""
        assert watch.stalled([one], heard_tick) != ""
