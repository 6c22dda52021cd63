"""Closed loops: a turn waits for its answer, and nobody thinks faster because others are many."""

import pytest
from test_instrument import PAIR, lab

from scheduler.sim import policy
from scheduler.sim.workload import Arrival


def sessions(n=12, turns=3, pause_s=4.0, apart_s=5.0):
    """Sessions that begin one after the other, each with turns `pause_s` apart, in order of time."""
    rows = [
        (apart_s * session + pause_s * turn, session, turn)
        for session in range(n)
        for turn in range(turns)
    ]
    order = {(session, turn): at for at, (_, session, turn) in enumerate(sorted(rows))}
    return [
        Arrival(
            at_s=at_s,
            prompt_tokens=500 + 400 * turn,
            output_tokens=30,
            session=session,
            turn=turn + 1,
            parent=None if turn == 0 else order[session, turn - 1],
            gap_s=None if turn == 0 else pause_s,
        )
        for at_s, session, turn in sorted(rows)
    ]


def played(rate_rps):
    stage = lab(PAIR, sessions(), closed=True)
    _, world = stage.run(policy.named("least-request"), label="x", seed=0, rate_rps=rate_rps)
    return world.fates


@pytest.mark.parametrize("rate_rps", [0.2, 2.0, 50.0])
def test_a_turn_comes_when_its_answer_is_there_and_the_pause_is_over(rate_rps):
    """At any load: never before the answer, never sooner after the last turn than the trace says."""
    fates = played(rate_rps)

    for fate in fates:
        if fate.arrival.parent is not None:
            before = fates[fate.arrival.parent]
            wanted = max(before.finished_at, before.enqueued_at + 4.0)
            assert fate.enqueued_at == pytest.approx(wanted, abs=0.05)


def test_a_higher_load_only_brings_sessions_closer():
    """Sessions begin at rows x starts / rate: twice the load, half the time between them."""
    starts = [
        [fate.enqueued_at for fate in played(rate_rps) if fate.arrival.parent is None]
        for rate_rps in (1.0, 2.0)
    ]

    assert starts[0] == pytest.approx([2 * at for at in starts[1]])
    assert starts[1][-1] == pytest.approx(36 / 2.0)
