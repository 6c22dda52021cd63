"""What clients say of their answers' lengths, and who may use it."""

import numpy as np
from test_instrument import crowd

from scheduler.sim import arriving, chain, foresight
from scheduler.sim.workload import Arrival


def answers(lengths):
    return [Arrival(at_s=0.0, prompt_tokens=1, output_tokens=int(n)) for n in lengths]


LENGTHS = np.random.default_rng(3).lognormal(5.0, 1.0, 5000).astype(int) + 1


class TestForeseen:
    def test_unknown_says_nothing_and_known_the_truth(self):
        rows = answers(LENGTHS[:50])

        assert {row.expected_tokens for row in foresight.foreseen(rows, "unknown")} == {None}
        known = foresight.foreseen(rows, "known")
        assert [row.expected_tokens for row in known] == [row.output_tokens for row in rows]

    def test_a_guess_errs_as_the_classifier_did(self):
        """Five guesses, right as often as published: better than one usual length, far from the truth."""
        guesses = np.array(foresight.guessed(LENGTHS))
        place = np.argsort(np.argsort(LENGTHS)) * 5 // len(LENGTHS)
        classes = np.searchsorted(np.unique(guesses), guesses)

        assert len(np.unique(guesses)) == 5
        drawn = np.array(
            [[(classes[place == row] == one).mean() for one in range(5)] for row in range(5)]
        )
        assert np.abs(drawn - np.array(foresight.CONFUSION)).max() < 0.05
        error, usual = np.log(guesses / LENGTHS), np.log(np.median(LENGTHS) / LENGTHS)
        assert 0.3 < error.std() < 0.8 * usual.std()

    def test_the_same_rows_get_the_same_guesses(self):
        assert foresight.guessed(LENGTHS) == foresight.guessed(LENGTHS)

    def test_the_request_carries_it(self):
        """It is a field that any application may set, and nothing else of the request differs."""
        rows = crowd(20)
        plain = arriving.rows(rows)
        told = arriving.rows(foresight.foreseen(rows, "known"))

        assert [row.request.expected_tokens for row in told] == [row.output_tokens for row in rows]
        assert {row.request.expected_tokens for row in plain} == {None}
        assert chain.hashes(rows[0]) == told[0].request.blocks
