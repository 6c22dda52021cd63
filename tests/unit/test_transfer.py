"""What handing KV over is believed to take, and what teaches it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler import cost
from scheduler.speed import LOG_MAX, RECALLED_MAX, Speeds
from scheduler.transfer import LINK_MAX, LINK_MIN, TOKEN_BYTES_MAX, Transfer
from scheduler.wire.worker import Beat, Reward

GIGABYTE = 1e9
STEP_S = 0.02


def transfer(*links_gbps: float) -> Transfer:
    made = Transfer()
    for slot, link_gbps in enumerate(links_gbps):
        made.open(slot, Beat(endpoint=f"e{slot}", epoch=1, link_gbps=link_gbps))
    return made


def teach(
    made: Transfer, slot: int, seconds: float, *, of: float = GIGABYTE, **fields: object
) -> None:
    """So many bytes were fetched there over a link of its own speed, and took so long."""
    features = made.features(own=of, ahead=0.0, step_s=STEP_S, link=made.links[slot])
    said = {"features": features, "pulled_at": 7.0, "first_token_at": 7.0 + seconds, **fields}
    made.learn(Reward(id="r", endpoint="e", epoch=1, attempt=1, outcome="completed", **said), slot)


def predicted_s(made: Transfer, of: float = GIGABYTE) -> list[float]:
    each = np.ones(len(made.links))
    return made.seconds(of * each, 0 * each, STEP_S * each, made.links).tolist()


@given(
    loads=st.lists(st.tuples(*[st.floats(0, 1e10)] * 2, st.floats(0, 1)), min_size=2, max_size=2),
    links=st.lists(st.floats(1, 1000), min_size=2, max_size=2),
)
def test_more_to_fetch_over_less_takes_no_less_time(loads, links):
    """Its own bytes, those before it, a step's wait and the link: each only ever adds."""
    few, many = zip(*(sorted(pair) for pair in zip(*loads, strict=True)), strict=True)
    narrow, wide = sorted(links)
    made = transfer(wide, narrow)

    quick_s, slow_s = made.seconds(*map(np.array, zip(few, many, strict=True)), made.links)

    assert 0 < quick_s <= slow_s


def test_untaught_a_transfer_takes_what_is_declared():
    """A gigabyte at 80 Gbit/s is a tenth of a second, and as much again behind another; then a step and the handshake."""
    made = transfer(80.0)

    [alone_s] = made.seconds(np.array([1e9]), np.array([0.0]), np.array([0.02]), made.links)
    [behind_s] = made.seconds(np.array([1e9]), np.array([1e9]), np.array([0.02]), made.links)

    assert alone_s == pytest.approx(0.1 + 0.02 + 0.005)
    assert behind_s == pytest.approx(alone_s + 0.1)


@pytest.mark.parametrize(
    ("link_gbps", "token_bytes", "link", "believed_bytes"),
    [
        pytest.param(8.0, 1000, 1e9, 1000, id="as declared"),
        pytest.param(0.0, 0, 0.0, cost.KV_BYTES, id="nothing: no link, and KV as of a usual model"),
        pytest.param(-1.0, -5, 0.0, cost.KV_BYTES, id="less than nothing"),
        pytest.param(1e-9, 1, LINK_MIN, 1, id="next to nothing"),
        pytest.param(1e30, 1 << 60, LINK_MAX, TOKEN_BYTES_MAX, id="more than there is"),
    ],
)
def test_what_is_declared_is_believed_within_reason(link_gbps, token_bytes, link, believed_bytes):
    """A link is in bytes a second here."""
    made = Transfer()

    made.open(0, Beat(endpoint="e", epoch=1, link_gbps=link_gbps, kv_token_bytes=token_bytes))

    assert (made.links[0], made.token_bytes[0]) == (link, believed_bytes)


def test_each_endpoints_link_has_its_own_speed():
    """Alike by what they declare, one takes three times as long: soon it is told apart, and from both sides."""
    made = transfer(80.0, 80.0)
    for _ in range(60):
        teach(made, 0, 0.125)
        teach(made, 1, 0.375)

    assert predicted_s(made) == pytest.approx([0.125, 0.375], rel=0.1)


def test_what_the_declared_link_is_worth_is_learned_by_the_whole_fleet():
    """Bytes take four times as long as they should and steps do not: told apart by small transfers among large ones."""
    made = transfer(80.0, 80.0)
    for turn in range(200):
        teach(made, turn % 2, 0.425, of=1e9)
        teach(made, turn % 2, 0.029, of=1e7)

    assert predicted_s(made, of=1e9) == pytest.approx([0.425] * 2, rel=0.15)
    assert predicted_s(made, of=1e7) == pytest.approx([0.029] * 2, rel=0.15)


@pytest.mark.parametrize(
    "nonsense",
    [
        {"features": ()},
        {"features": ("kv_handshake=0.005", "kv_own=x", "kv_ahead=0", "kv_step=0.02")},
        {"features": ("kv_handshake=0.005", "kv_own=-1", "kv_ahead=0", "kv_step=0.02")},
        {"features": ("kv_handshake=0.005", "kv_own=nan", "kv_ahead=0", "kv_step=0.02")},
        {"first_token_at": None},
        {"first_token_at": 6.0},
        {"first_token_at": 1e6},
        {"pulled_at": None},
    ],
    ids=lambda said: ",".join(f"{name}={value}" for name, value in said.items())[-40:],
)
def test_what_is_no_measurement_teaches_nothing(nonsense):
    """And ends nobody who reads it."""
    made = transfer(80.0)
    before = predicted_s(made)

    teach(made, 0, 5.0, **nonsense)

    assert predicted_s(made) == before
    assert made.speeds.numbers(0) == (0.0, 0.0)


def test_an_admission_stands_for_a_pull_that_nobody_noted():
    """As older workers say it."""
    made = transfer(80.0)

    teach(made, 0, 5.0, pulled_at=None, admitted_at=7.0)

    assert made.speeds.numbers(0)[1] == 1.0


class TestSpeeds:
    @given(errors=st.lists(st.floats(-9, 9), max_size=60))
    def test_it_moves_towards_what_it_learns_and_never_beyond_belief(self, errors):
        """Slower where it took longer than predicted, faster where less."""
        made = Speeds()
        made.open(0)
        for log_error in errors:
            before = made.log.item(0)
            made.learn(0, log_error)
            step = made.log.item(0) - before

            assert abs(made.log.item(0)) <= LOG_MAX
            assert step * log_error >= 0
            assert abs(step) <= abs(log_error)

    @pytest.mark.parametrize("count", [3.0, 1000.0])
    def test_an_earlier_life_is_remembered_as_no_more_than_a_few_lessons(self, count):
        """A new one may differ: what it says must move it."""
        made = Speeds()
        made.open(0)
        made.recall(0, 0.5, count)

        assert made.numbers(0) == (0.5, min(count, RECALLED_MAX))
        made.open(0)
        assert made.numbers(0) == (0.0, 0.0)
