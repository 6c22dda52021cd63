"""Generated workloads follow their laws, and the same seed gives the same bytes."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.sim import trace
from scheduler.sim.generate import (
    ARXIV_PROMPT,
    AZURE_CHAT_PROMPT,
    AZURE_CODE_OUTPUT,
    DEMO,
    Arrivals,
    Crowd,
    Lengths,
    generated,
    moments,
    replayed,
)
from scheduler.sim.summary import prefix_share


def chance(seed=1):
    return np.random.default_rng(seed)


def demo(seed=1, duration_s=60.0, mix=DEMO):
    return generated(mix, duration_s=duration_s, rng=chance(seed))


class TestLengths:
    @pytest.mark.parametrize("law", [ARXIV_PROMPT, AZURE_CHAT_PROMPT, AZURE_CODE_OUTPUT])
    def test_hits_every_published_quantile(self, law):
        """Within 5 % of each point, a log-normal and a law with two humps alike."""
        drawn = law.draw(chance(), 100_000)

        for share, tokens in law.points:
            assert np.quantile(drawn, share) == pytest.approx(tokens, rel=0.05, abs=1)

    @given(seed=st.integers(0, 2**32))
    @settings(max_examples=20)
    def test_stays_within_its_bounds(self, seed):
        """No draw is below `least` or above `most`."""
        law = Lengths(points=((0.5, 100), (0.9, 1000)), least=20, most=2000)

        drawn = law.draw(chance(seed), 1000)

        assert 20 <= drawn.min() <= drawn.max() <= 2000


class TestMoments:
    @pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
    def test_has_the_rate_and_burstiness_asked_for(self, cv):
        """Mean rate within 5 %, coefficient of variation within 10 %."""
        at_s = moments(Arrivals(rate_per_s=100.0, cv=cv), duration_s=300.0, rng=chance())

        gaps_s = np.diff(at_s)
        assert len(at_s) / 300.0 == pytest.approx(100.0, rel=0.05)
        assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.1)

    def test_a_crowd_comes_when_it_is_told(self):
        """Ten times the arrivals inside the stretch, the old rate before and after."""
        flash = Arrivals(rate_per_s=50.0, crowds=(Crowd(start_s=20.0, end_s=30.0, times=10.0),))

        at_s = moments(flash, duration_s=60.0, rng=chance())

        inside = np.count_nonzero((at_s >= 20) & (at_s < 30))
        assert inside / 10 == pytest.approx(500, rel=0.05)
        assert (len(at_s) - inside) / 50 == pytest.approx(50, rel=0.1)

    @given(
        rate=st.floats(0.1, 50),
        cv=st.floats(0.2, 5),
        start=st.floats(0, 40),
        seed=st.integers(0, 9),
    )
    @settings(max_examples=30)
    def test_rises_within_the_duration(self, rate, cv, start, seed):
        """Moments never fall and all lie inside, wherever a crowd stands, even beyond the end."""
        crowd = Crowd(start_s=start, end_s=start + 5, times=3.0)
        arrivals = Arrivals(rate_per_s=rate, cv=cv, crowds=(crowd,))

        at_s = moments(arrivals, duration_s=20.0, rng=chance(seed))

        assert np.all(np.diff(at_s) >= 0)
        assert np.all((at_s >= 0) & (at_s < 20))

    @pytest.mark.parametrize(
        ("arrivals", "message"),
        [
            (Arrivals(rate_per_s=0.0), r"rate is 0\.0/s"),
            (Arrivals(rate_per_s=1.0, cv=-1.0), r"cv -1\.0"),
            (Arrivals(rate_per_s=1e9), "arrivals would follow, wanted at most"),
            (Arrivals(rate_per_s=1.0, crowds=(Crowd(3.0, 2.0, 2.0),)), "is no crowd"),
        ],
    )
    def test_refuses_what_cannot_be(self, arrivals, message):
        """The value found and the value wanted stand in the error."""
        with pytest.raises(ValueError, match=message):
            moments(arrivals, duration_s=60.0, rng=chance())


class TestGenerated:
    def test_same_seed_same_bytes(self):
        """I6: the trace file of a seed is fixed, and another seed's differs."""
        one, again, other = (
            b"".join(trace.written(trace.Header(trace="demo"), demo(seed))) for seed in (1, 1, 2)
        )

        assert one == again != other
        # A change here changes every figure that was made with the demo mix: say so in the log.
        assert hashlib.sha256(one).hexdigest()[:16] == "4ff636dcb64f68b2"

    def test_rows_stand_in_order_inside_the_duration(self):
        """Moments rise, and no turn comes after the end."""
        rows = demo(duration_s=120.0)

        assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(rows))
        assert 0 <= rows[0].at_s <= rows[-1].at_s < 120.0

    def test_every_class_brings_its_promise(self):
        """The four kinds of work of the demo, each in its tenant."""
        found = {(a.client, a.tenant, a.ttft_s, a.tpot_s, a.deadline_s) for a in demo()}

        assert found == {
            ("chat", "assistant", 1.0, 0.05, None),
            ("code", "editor", 0.5, None, None),
            ("summarise", "library", 5.0, None, None),
            ("batch", "archive", None, None, 60.0),
        }

    def test_a_turn_holds_all_of_the_turn_before(self):
        """A follow-up names its parent, comes later, is longer, and starts with its blocks."""
        rows = demo(duration_s=300.0)
        follow_ups = [a for a in rows if a.parent is not None]

        assert len(follow_ups) > 50
        for a in follow_ups:
            before = rows[a.parent]
            assert (before.session, before.turn) == (a.session, a.turn - 1)
            assert a.at_s == pytest.approx(before.at_s + a.gap_s)
            assert a.prompt_tokens > before.prompt_tokens + before.output_tokens
            assert a.blocks[: len(before.blocks)] == before.blocks

    def test_sessions_share_their_system_prompt_only(self):
        """Two chats agree on the 256 shared tokens and on nothing after."""
        chats = [a for a in demo() if a.client == "chat" and a.turn == 1]

        assert len({a.blocks[:4] for a in chats}) == 1
        later = [b for a in chats for b in a.blocks[4:]]
        assert len(later) == len(set(later))

    def test_the_demo_has_something_to_cache(self):
        """Golden: the share of prompt tokens an endless cache serves in five minutes."""
        assert prefix_share(demo(duration_s=300.0)) == pytest.approx(0.143, abs=0.001)

    def test_a_work_more_leaves_the_others_as_they_were(self):
        """The first work draws the same rows alone and in company."""
        chat_alone = [(a.at_s, a.prompt_tokens) for a in demo(mix=DEMO[:1])]
        chat_of_all = [(a.at_s, a.prompt_tokens) for a in demo() if a.client == "chat"]

        assert chat_alone == chat_of_all

    def test_refuses_an_endless_day(self):
        """A duration is a positive number."""
        with pytest.raises(ValueError, match="duration is inf s"):
            demo(duration_s=np.inf)


def test_replayed_pairs_stay_pairs():
    """Lengths without arrivals come at drawn moments, prompt and output as they stood."""
    pairs = np.array([[10, 1], [20, 2], [30, 3]])

    rows = replayed(pairs, Arrivals(rate_per_s=5.0), duration_s=20.0, rng=chance())

    assert {(a.prompt_tokens, a.output_tokens) for a in rows} == {(10, 1), (20, 2), (30, 3)}
