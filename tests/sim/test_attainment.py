"""Loads at which a policy keeps a share: found by halving, each load asked once, and something told whatever there is."""

import pytest

from scheduler.sim import attainment


class Kept:
    """A policy that keeps all up to `from_load` and nothing from `to_load` on."""

    def __init__(self, from_load=0.4, to_load=1.2):
        self.from_load, self.to_load, self.asked = from_load, to_load, []

    def __call__(self, load):
        self.asked.append(load)
        left = (self.to_load - load) / (self.to_load - self.from_load)
        return min(1.0, max(0.0, left))


def test_as_near_as_a_point():
    """Whatever the order in which shares are asked for, and never the same load twice."""
    kept = Kept()

    found = attainment.loads(kept, [0.3, 0.95, 0.6])

    assert found == pytest.approx([0.96, 0.44, 0.72], abs=0.01)
    assert len(kept.asked) == len(set(kept.asked)) < 30


@pytest.mark.parametrize(
    ("kept", "found"),
    [
        (lambda _: 1.0, attainment.LOAD_MOST),
        (lambda _: 0.1, attainment.LOAD_LEAST),
    ],
    ids=["always kept", "never kept"],
)
def test_the_end_of_the_scale_is_the_nearest(kept, found):
    assert attainment.loads(kept, [0.6]) == [found]


def test_a_cliff_ends_the_search():
    """Where a share is jumped over, one side of the jump is told."""
    [load] = attainment.loads(lambda load: 1.0 if load < 0.7 else 0.0, [0.6])

    assert load == pytest.approx(0.7, rel=attainment.APART - 1)


def test_chance_does_not_lead_it_astray():
    """A share that rises again behind a fall: the first load that was seen to have fallen counts."""
    found = attainment.loads(
        lambda load: 1.0 if load < 0.5 or 0.8 < load < 1.0 else 0.5, [0.8, 0.8]
    )

    assert found[0] == found[1] == pytest.approx(0.5, rel=0.01)
