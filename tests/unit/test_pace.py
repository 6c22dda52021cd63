"""What one more decode costs, and whose promise per token it breaks."""

import math

import numpy as np
import pytest

from scheduler.cost import CLASSES
from scheduler.ledger import Ledger, Line
from scheduler.pace import LATELY_S, Noise, Pace
from scheduler.pins import Pins


def pace(*hardware: str) -> Pace:
    made = Pace()
    for slot, name in enumerate(hardware or ("a100",)):
        made.open(slot, CLASSES[name])
    return made


class TestPace:
    def test_untaught_it_says_what_the_data_sheet_says(self):
        """One sequence more: the weights are read once, then its own share and its KV."""
        rated = CLASSES["a100"]
        load = pace().load(np.array([9.0]), np.array([50_000.0]), now=0.0)

        expected_s = rated.step_s + 10 * rated.sequence_s + 50_000 * rated.kv_s
        assert load.joined_s == pytest.approx([expected_s])

    def test_prefill_stretches_every_token_and_fades(self):
        """An engine that prefills for half of its time decodes in the other half."""
        made = pace()
        idle_s = made.load(np.zeros(1), np.zeros(1), now=0.0).joined_s[0]
        made.prefill(0, 2.5, now=10.0)

        assert made.load(np.zeros(1), np.zeros(1), now=10.0).joined_s[0] == pytest.approx(
            2 * idle_s
        )
        assert made.load(np.zeros(1), np.zeros(1), now=99.0).joined_s[0] == pytest.approx(idle_s)

    def test_the_pace_of_late_follows_and_begins_anew_with_the_endpoint(self):
        made, few, many, kv = pace(), np.array([1.0]), np.array([100.0]), np.zeros(1)
        before_s = made.load(few, kv, now=0.0).joined_s
        crowded = made.load(many, kv, now=LATELY_S * math.log(2))

        assert crowded.joined_s > before_s
        assert crowded.lately_s == pytest.approx((before_s + crowded.joined_s) / 2)
        later = made.load(many, kv, now=99 * LATELY_S)
        assert later.lately_s == pytest.approx(later.joined_s)

        made.open(0, CLASSES["a100"])
        assert made.load(few, kv, now=99 * LATELY_S).lately_s == before_s

    def test_what_is_learned_from_is_what_was_predicted(self):
        """The terms of the sequence that has just joined add up to the pace that was predicted for it, prefill and all."""
        made = pace("a100", "l40s")
        made.prefill(1, 2.0, now=10.0)

        joined_s = made.load(np.full(2, 9.0), np.full(2, 50_000.0), now=12.0).joined_s

        for slot in range(2):
            assert sum(made.row(slot, 10.0, 50_000.0, now=12.0)) == pytest.approx(joined_s[slot])

    def test_a_slow_server_is_known_by_its_answers(self):
        """Twice as slow as declared: forty answers tell, and its neighbour is not blamed."""
        made, rng = pace("a100", "a100"), np.random.default_rng(0)
        for turn in range(80):
            slot, batch = turn % 2, float(rng.integers(1, 60))
            row = np.array(made.row(slot, batch, 1500 * batch, now=0.0))
            made.learn(slot, row, (1 + slot) * float(row.sum()) * float(rng.lognormal(0, 0.05)))

        joined_s = made.load(np.full(2, 20.0), np.full(2, 30_000.0), now=0.0).joined_s
        assert 1.7 < joined_s[1] / joined_s[0] < 2.3

    def test_a_slow_engine_speaks_no_louder(self):
        """Errors are relative: a class ten times as slow, with the same errors, teaches the same weights."""
        learned = []
        for factor in (1.0, 10.0):
            made, rng = pace(), np.random.default_rng(0)
            for _ in range(60):
                batch = float(rng.integers(1, 60))
                row = factor * np.array(made.row(0, batch, 1500 * batch, now=0.0))
                made.learn(0, row, float(row @ [1.0, 1.5, 0.7, 1.0] * rng.lognormal(0, 0.2)))
            learned.append(made.export().weights)

        assert learned[0] != (1.0, 1.0, 1.0, 1.0)
        assert np.allclose(learned[0], learned[1])

    @pytest.mark.parametrize("absurd", [0.0, -1.0, math.inf, math.nan, 1e6])
    def test_what_is_no_pace_teaches_nothing(self, absurd):
        """Rewards come from Redis."""
        made = pace()
        before = made.load(np.zeros(1), np.zeros(1), now=0.0).joined_s[0]

        made.learn(0, np.array(made.row(0, 1.0, 100.0, now=0.0)), absurd)

        assert made.load(np.zeros(1), np.zeros(1), now=0.0).joined_s[0] == before


class TestNoise:
    def test_it_is_what_answers_were_off_by(self):
        """Until enough were seen, a guess; then their own scatter."""
        made, rng = pace(), np.random.default_rng(0)
        assert made.noise() == Noise()
        for _ in range(300):
            batch = float(rng.integers(1, 60))
            row = np.array(made.row(0, batch, 1500 * batch, now=0.0))
            made.learn(0, row, float(row.sum() * rng.lognormal(0, 0.4)))

        assert made.noise().sigma == pytest.approx(0.4, abs=0.06)
        assert made.noise().bias == pytest.approx(0.0, abs=0.1)

    def test_harm_is_greatest_where_it_is_doubtful(self):
        """Far below or far above the promise one more changes nothing; near it, a little changes much."""
        odds = Noise().odds(np.full(3, 0.05), np.array([0.02, 0.05, 0.2]))
        harm = Noise().fall(odds, np.full(3, 0.01))

        assert harm[1] > 10 * harm[0]
        assert harm[1] > 10 * harm[2]


class TestAccounts:
    def test_a_shared_beginning_is_held_once(self):
        """Two agents with the same ten blocks take them once; the last to leave frees them."""
        book = Ledger()
        book.open(0)
        for name, kv in (("a", 1400.0), ("b", 1500.0)):
            line = Line(tokens=1.0, pairs=0.5, kv=kv, blocks=tuple(f"b{i}" for i in range(10)))
            book.commit(0, name, line, now=0.0)

        assert book.kv[0] == 1400.0 + 1500.0 - 1280.0
        book.release(0, "a", now=1.0)
        assert book.kv[0] == 1500.0
        book.release(0, "b", now=1.0)
        assert book.kv[0] == 0.0

    def test_a_block_is_in_use_until_the_last_who_holds_it_goes(self):
        """Each holds its own chain, and the shared beginning outlives one of them."""
        pins = Pins()
        pins.open(0)
        pins.hold(0, ("a", "b", "c"))
        pins.hold(0, ("a", "x"))
        pins.drop(0, ("a", "b", "c"))

        assert list(pins.held(0)) == ["a", "x"]

    def test_the_tightest_promise_is_kept_in_sight(self):
        """It goes with its request; without any, nothing binds."""
        book = Ledger()
        book.open(0)
        for name, tpot_s in (("a", 0.05), ("b", 0.02), ("c", math.inf)):
            book.commit(0, name, Line(tokens=1.0, pairs=0.5, kv=1.0, tpot_s=tpot_s), now=0.0)

        assert (book.tightest_s[0], book.promised[0]) == (0.02, 2)
        book.release(0, "b", now=1.0)
        assert (book.tightest_s[0], book.promised[0]) == (0.05, 1)
        book.release(0, "a", now=1.0)
        assert (book.tightest_s[0], book.promised[0]) == (math.inf, 0)
