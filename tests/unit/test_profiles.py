"""Profiles: the plan is one of them, llm-d's is another, and none can break what the plan must keep."""

import itertools
import math

import conformance
import msgspec
import numpy as np
import planned
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import structs

from scheduler.core import CoreSettings, Scheduler
from scheduler.events import Arrived, Assign
from scheduler.plan import PlanSettings
from scheduler.profile.casting import Assembly, fetched
from scheduler.profile.fetchers import BUILT_IN as FETCHERS
from scheduler.profile.fetchers import LATENCY, PREFIX_MATCH
from scheduler.profile.filters import InTime, Label, Pace, PrefixAffinity, Role, Saturation
from scheduler.profile.pickers import MaxScore, Random, RoundRobin, WeightedRandom
from scheduler.profile.profile import Profile
from scheduler.profile.scorers import (
    Cost,
    Externality,
    KvCache,
    KvPressure,
    LeastRequest,
    Load,
    LoraAffinity,
    NoHitLru,
    PredictedLatency,
    PrefixCache,
    Queue,
    SessionAffinity,
)
from scheduler.profile.trail import Trail
from scheduler.sim.baselines import affinity
from scheduler.wire.client import Request
from scheduler.wire.worker import Beat, Reward

PLAN = PlanSettings()
AS_PLANNED = planned.of_plan(fill=PLAN.fill, externality=PLAN.externality, tie=PLAN.tie)

ALL = np.ones(4, dtype=bool)


def scene(**said):
    """Four idle endpoints that may all take the request, but for what is said."""
    [idle] = conformance.scenes(Queue(), sizes=(4,), seeds=(0,))
    hardware = ("a100", "h100", "h100", "l4")
    plain = {
        "beats": tuple(
            Beat(endpoint=f"e{i}", epoch=1, models=("m",), hardware=hardware[i]) for i in range(4)
        ),
        "eligible": ALL,
        "first_token_s": np.full(4, 0.1),
        "work_s": np.full(4, 0.1),
        "given_at": np.full(4, -np.inf),
        "cold_at": np.full(4, -np.inf),
        "model_at": np.full(4, -np.inf),
    }
    arrays = {k: np.array(v, float) if isinstance(v, list) else v for k, v in said.items()}
    return fetched([kind() for kind in FETCHERS], structs.replace(idle, **{**plain, **arrays}), {})


def kept(part, seen, candidates=ALL):
    return part.keep(seen, candidates).astype(int).tolist()


class TestFilters:
    def test_role_wants_both_legs_or_the_one(self):
        """An endpoint of both roles takes everything."""
        roles = (("both",), ("prefill",), ("decode",), ("prefill", "decode"))
        beats = tuple(Beat(endpoint=f"e{i}", epoch=1, roles=one) for i, one in enumerate(roles))

        assert kept(Role(), scene(beats=beats)) == [1, 0, 0, 1]
        assert kept(Role(role="decode"), scene(beats=beats)) == [1, 0, 1, 1]

    def test_label_allows_and_denies_by_pattern(self):
        """By any word of the heartbeat."""
        seen = scene()

        assert kept(Label(by="hardware", allow=("h100", "l?")), seen) == [0, 1, 1, 1]
        assert kept(Label(by="endpoint", deny=("e[01]",)), seen) == [0, 0, 1, 1]

    def test_saturation_looks_at_kv_and_queue(self):
        """Either is enough."""
        seen = scene(kv_used=[0.2, 0.96, 0.2, 0.95], queued=[0, 0, 6, 5])

        assert kept(Saturation(), seen) == [1, 0, 0, 1]

    def test_affinity_sticks_until_the_lag(self):
        """The warm one, while it is at most so much later; else anybody."""
        warm = {"cached_tokens": [0, 900, 0, 0], "first_token_s": [1.0, 5.0, 2.0, 3.0]}

        assert kept(PrefixAffinity(lag_s=4.0), scene(**warm)) == [0, 1, 0, 0]
        assert kept(PrefixAffinity(lag_s=3.9), scene(**warm)) == [1, 1, 1, 1]

    def test_in_time_or_the_earliest(self):
        """Who makes it; where nobody does, the first."""
        seconds = {"first_token_s": [1.0, 2.0, 3.0, np.inf]}

        assert kept(InTime(), scene(left_s=2.0, **seconds)) == [1, 1, 0, 0]
        assert kept(InTime(), scene(left_s=0.5, **seconds)) == [1, 0, 0, 0]

    @pytest.mark.parametrize(
        ("left_s", "expected"),
        [
            pytest.param(math.inf, [0, 1, 1, 0], id="the best of those with room"),
            pytest.param(2.0, [0, 0, 0, 1], id="and in time"),
            pytest.param(
                0.1, [0, 1, 1, 0], id="whose first token is late everywhere loses no more"
            ),
        ],
    )
    def test_no_better_pace_is_waited_for(self, left_s, expected):
        """Not where it is full, and not where the first token would be late while elsewhere it would not."""
        data = {
            "pace-worth": np.array([1.9, 0.85, 0.8, 0.1]),
            "predicted-latency": np.array([0.5, 3.0, 4.0, 1.0]),
        }
        seen = structs.replace(scene(), left_s=left_s, data=data)

        assert kept(Pace(), seen, np.array([False, True, True, True])) == expected


class TestScorers:
    @pytest.mark.parametrize(
        ("part", "said", "expected"),
        [
            (Queue(), {"queued": [0, 1, 2, 4]}, [1, 0.75, 0.5, 0]),
            (Queue(), {"queued": [3, 3, 3, 3]}, [1, 1, 1, 1]),
            (KvCache(), {"kv_used": [0.0, 0.25, 1.0, 1.2]}, [1, 0.75, 0, 0]),
            (
                KvPressure(),
                {"kv_used": [0.0, 0.5, 0.5, 1.2], "cached_tokens": [0, 0, 500, 0]},
                [1, 0.875, 0.9375, 0],
            ),
            (
                KvPressure(),
                {"kv_used": [0.0, 0.5, 1.0, 1.2], "tpot_s": 0.05, "pressed": 0.5},
                [1, 0.75, 0.5, 0.5],
            ),
            (
                Externality(worst_s=0.2),
                {"unbegun": [0, 1, 2, 9], "work_s": [0.05, 0.1, 0.05, 0.1]},
                [1, 0.5, 0.5, 0],
            ),
            (Externality(), {"unbegun": [9, 9, 9, 9], "left_s": 1.0}, [1, 1, 1, 1]),
            (Load(), {"queued": [0, 64, 128, 999]}, [0.5, 0.25, 0, 0]),
            (LeastRequest(), {"queued": [0, 1, 0, 4], "running": [0, 1, 4, 0]}, [1, 0.5, 0, 0]),
            (PrefixCache(), {"cached_tokens": [0, 250, 500, 999]}, [0, 0.25, 0.5, 0.999]),
            (PredictedLatency(worst_s=4), {"first_token_s": [0, 1, 4, np.inf]}, [1, 0.75, 0, 0]),
            (SessionAffinity(), {"session": "s", "session_slot": 2}, [0, 0, 1, 0]),
            (SessionAffinity(), {"session_slot": -1}, [0, 0, 0, 0]),
            (LoraAffinity(keep_s=10), {"model_at": [1000, 995, 1, -np.inf]}, [1, 0.5, 0, 0]),
            (NoHitLru(), {"cold_at": [9, -np.inf, 7, 8]}, [0, 1, 2 / 3, 1 / 3]),
            (NoHitLru(), {"cached_tokens": [0, 1, 0, 0]}, [0.5, 0.5, 0.5, 0.5]),
            (Cost(prices={"h100": 3.0, "l4": 2.0}), {"work_s": [1, 1, 1, 1]}, [1, 0, 0, 0.5]),
            (Cost(prices={"h100": 3.0}), {"work_s": [1, 0.1, 0.4, 1]}, [-1, 1, 0, -1]),
        ],
        ids=lambda value: getattr(value, "label", None),
    )
    def test_by_hand(self, part, said, expected):
        """1 is best, 0 worst; -1 stands for anything between."""
        scores = part.score(scene(**said), ALL)

        for score, wanted in zip(scores, expected, strict=True):
            assert wanted == -1 or score == pytest.approx(wanted)

    def test_the_scale_is_the_candidates(self):
        """Who is no candidate does not stretch it."""
        seen = scene(queued=[0, 2, 3, 4])

        assert Queue().score(seen, np.array([False, True, True, True]))[1:].tolist() == [1, 0.5, 0]


class TestPickers:
    def test_round_robin_gives_everybody_a_turn(self):
        """Whoever was given nothing for the longest, and only candidates."""
        trail, order = Trail(), []
        trail.meet(["e0", "e1", "e2", "e3"])
        scores = np.array([0.9, 0.1, -np.inf, 0.5])
        for now in range(6):
            [slot] = RoundRobin().chances(scene(given_at=trail.given_at), scores).nonzero()[0]
            trail.add(slot, model="m", session="", is_cold=True, now=float(now))
            order.append(slot)

        assert order == [0, 1, 3, 0, 1, 3]

    def test_a_tie_is_a_part_of_what_is_lacking(self):
        """0.80 lacks 0.20; a tenth more is 0.22."""
        scores = np.array([0.80, 0.785, 0.77, -np.inf])
        assert MaxScore(tie=0.1).chances(scene(), scores).tolist() == [0.5, 0.5, 0, 0]

    def test_chances_follow_the_scores(self):
        """In proportion; without any score, all alike."""
        scores = np.array([0.6, 0.0, -np.inf, 0.2])

        assert WeightedRandom().chances(scene(), scores) == pytest.approx([0.75, 0, 0, 0.25])
        assert Random().chances(scene(), scores) == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
        assert WeightedRandom().chances(scene(), np.zeros(4)).tolist() == [0.25] * 4


def test_sessions_are_found_where_their_endpoint_stands_now():
    """A slot that another endpoint took keeps nothing of the one before."""
    trail = Trail()
    trail.meet(["e0", "e1"])
    trail.add(1, model="m", session="s", is_cold=True, now=5.0)

    trail.meet(["e1", "", "e2"])

    assert trail.session_slot("s") == 0
    assert trail.given_at.tolist() == [5.0, -math.inf, -math.inf]
    assert trail.model_at("m").tolist() == [5.0, -math.inf, -math.inf]
    trail.meet(["", "", "e2"])
    assert trail.session_slot("s") == -1


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.floats(0, 1), st.integers(0, 1000)), min_size=4, max_size=4
    )
)
def test_llm_ds_weights_score_as_the_labs_llm_d_does(endpoints):
    """Queue 2, KV 2, prefix 3: the same sums, but for our dividing by all weights."""
    waiting, used, cached = ([float(v) for v in column] for column in zip(*endpoints, strict=True))
    composed = Profile(scorers=(Queue(weight=2), KvCache(weight=2), PrefixCache(weight=3)))
    seen = scene(queued=waiting, kv_used=used, cached_tokens=cached)

    ours = 7 * Assembly(composed).scores(seen, ALL)

    share = [tokens / 1000 for tokens in cached]
    theirs = affinity.weighted(waiting, used, share, range(4), (2.0, 2.0, 3.0))
    assert ours == pytest.approx(theirs)


def decided(made, rows, seed=0):
    """What a core does with these requests on three unlike endpoints, answered as it goes."""
    core = Scheduler(CoreSettings(profile=made), np.random.default_rng(seed))
    for slot, hardware in enumerate(("a100", "h100", "l40s", "a100")):
        beat = Beat(
            endpoint=f"e{slot}",
            epoch=1,
            models=("m",),
            hardware=hardware,
            max_num_seqs=12,
            kv_tokens=30_000,
            max_model_len=12_000,
        )
        core.receive(beat, 0.0)
    sent, now = [], 0.0
    for number, (gap_s, tokens, ttft_s, tpot_s, shared, session) in enumerate(rows):
        now += gap_s
        request = Request(
            id=f"r{number}",
            model="m",
            prompt_tokens=tokens,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            session=session,
            blocks=tuple(f"b{shared}-{i}" for i in range(tokens // 128)),
        )
        core.receive(Arrived(request=request, entry=f"{number}-0", enqueued_at=now), now)
        sent += [
            (now, command.job.id, command.endpoint, command.decision.propensity)
            for command in core.decide(now)
            if isinstance(command, Assign)
        ]
        if number % 3 == 0:
            for one in sent[len(sent) - len(sent) // 2 :][:2]:
                core.receive(_answer(one), now)
    return sent


def _answer(sent):
    return Reward(
        id=sent[1],
        endpoint=sent[2],
        epoch=1,
        attempt=1,
        outcome="completed",
        prompt_tokens=100,
        output_tokens=20,
    )


rows = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.01, 0.3]),
        st.sampled_from([50, 700, 3000, 9000, 11_000]),
        st.sampled_from([None, 0.2, 1.0]),
        st.sampled_from([None, None, 0.02, 0.08]),
        st.integers(0, 3),
        st.sampled_from(["", "s", "t"]),
    ),
    min_size=5,
    max_size=40,
)


LATE_BESIDE_A_PACE = [
    (0.0, 9000, None, None, 0, ""),
    (0.0, 9000, 0.2, None, 0, ""),
    (0.0, 50, None, None, 0, ""),
    (0.0, 50, None, None, 0, ""),
    (0.0, 9000, 0.2, None, 0, ""),
    (0.0, 50, 0.2, 0.02, 0, ""),
    (0.01, 9000, 0.2, None, 0, ""),
]
"The last two: a promised pace, and one that is late anyhow, whose own promise counts half."

LATE_WHERE_OTHERS_WILL_COME = [
    (0.0, 11_000, None, None, 1, ""),
    (0.0, 3000, 0.2, None, 0, ""),
    (0.0, 9000, 1.0, None, 0, ""),
    (0.0, 9000, 0.2, None, 0, ""),
    (0.0, 9000, 0.2, None, 1, ""),
]
"The fastest of those that are idle is kept clear of the last."


@settings(max_examples=300)
@given(rows=rows)
@example(rows=LATE_BESIDE_A_PACE)
@example(rows=LATE_WHERE_OTHERS_WILL_COME)
def test_the_plan_is_the_profile_of_its_parts(rows):
    """I10: its eligibility as filters, its seconds and fill as scorers, its tie as picker choose just as it does."""
    assert decided(AS_PLANNED, rows) == decided(None, rows)


PARTS = st.builds(
    Profile,
    filters=st.lists(st.sampled_from([Saturation(kv_max=0.3), Pace(), InTime()]), max_size=2).map(
        tuple
    ),
    scorers=st.lists(
        st.sampled_from([Queue(), PrefixCache(weight=3), SessionAffinity(), Cost(), NoHitLru()]),
        max_size=3,
    ).map(tuple),
    picker=st.sampled_from([MaxScore(), WeightedRandom(), RoundRobin(), Random()]),
)


@settings(max_examples=100)
@given(made=PARTS, rows=rows)
def test_no_profile_breaks_what_the_plan_keeps(made, rows):
    """I3, I6: seats and KV hold whatever the parts say, each is handed over once, and the same again."""
    sent = decided(made, rows)

    held = {f"e{i}": 0 for i in range(4)}
    for _, _, endpoint, propensity in sent:
        held[endpoint] += 1
        assert 0 < propensity <= 1
    assert len({one[1] for one in sent}) == len(sent)
    assert sent == decided(made, rows)


def test_a_rule_that_leaves_nothing_lets_the_request_wait():
    """It is not lost, and not put where it must not go."""
    nowhere = Profile(filters=(Label(by="hardware", allow=("b200",)),))

    assert decided(nowhere, [(0.0, 100, None, None, 0, "")] * 5) == []


def test_a_session_stays_where_it_is():
    """With nothing but affinity to go by, everything of a session goes to one endpoint."""
    sticky = Profile(scorers=(SessionAffinity(),))
    sent = decided(sticky, [(0.3, 50, None, None, 0, name) for name in "abcabcabc"])

    by_session = {}
    for _, request_id, endpoint, _ in sent:
        by_session.setdefault("abc"[int(request_id[1:]) % 3], set()).add(endpoint)
    assert [len(by_session[name]) for name in "abc"] == [1, 1, 1]


def test_profiles_survive_being_written():
    """A journal's head holds one as plain values."""
    written = msgspec.msgpack.encode(CoreSettings(profile=AS_PLANNED))

    assert msgspec.msgpack.decode(written, type=CoreSettings).profile == AS_PLANNED


def test_only_what_is_read_is_fetched():
    """A fetcher whose column nobody reads never runs; an own one takes a built-in's place."""

    class Never(FETCHERS[0], frozen=True, tag="never"):
        def fetch(self, scene):
            raise AssertionError("nobody reads this")

    assert Assembly(Profile(fetchers=(Never(),), scorers=(Queue(),))).fetchers == []
    used = Assembly(Profile(fetchers=(Never(),), scorers=(PrefixCache(),))).fetchers
    assert used == [Never()]
    assert {kind.provides for kind in FETCHERS} == {PREFIX_MATCH, LATENCY}
    assert list(itertools.chain(used)) == used
