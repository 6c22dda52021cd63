"""Every baseline's formula on cases small enough to be worked out by hand, and what none of them can see."""

import gc
import types

import numpy as np
import pytest

from scheduler.errors import SettingsError
from scheduler.events import Arrived
from scheduler.sim import policy
from scheduler.sim.arriving import Row
from scheduler.sim.baselines import affinity, finish, load, lodestar, orders
from scheduler.sim.baselines.desk import Desk
from scheduler.sim.baselines.senses import Asked
from scheduler.sim.engine import Engine
from scheduler.sim.fate import Fate
from scheduler.sim.fleet import Delays
from scheduler.sim.policies.base import Stage
from scheduler.sim.sequence import Sequence
from scheduler.sim.workload import Arrival
from scheduler.sim.world import World
from scheduler.wire.client import Request
from scheduler.wire.worker import Beat, Reward


def rng():
    return np.random.default_rng(0)


def asked(name="r", at=0.0, prompt=1000, ttft=None, blocks=()):
    request = Request(id=name, model="llm", prompt_tokens=prompt, ttft_s=ttft, blocks=blocks)
    return Asked(request, f"{name}-0", at)


def beat(slot, **fields):
    known = {"hardware": "a100", "max_model_len": 100_000, "kv_tokens": 100_000, "models": ("llm",)}
    return Beat(endpoint=f"e{slot}", epoch=1, **known | fields)


def desk(n, **fields):
    made = Desk(lease_s=3.0, prefix_blocks=1000, **fields)
    for slot in range(n):
        made.hear(beat(slot), 0.0)
    return made


class TestLoad:
    def test_round_robin_takes_turns(self):
        router = load.RoundRobin()
        assert [router.choose(asked(), [0, 1, 2], 0.0) for _ in range(4)] == [0, 1, 2, 0]

    def test_random_takes_anybody_alike(self):
        router = load.Random(rng())
        drawn = [router.choose(asked(), [0, 1], 0.0) for _ in range(1000)]
        assert 430 < sum(drawn) < 570

    def test_least_request_counts_its_own_book(self):
        """A request counts from the moment it is sent, not from the next scrape."""
        made = desk(2)
        router = load.LeastRequest(made.account, rng())
        made.send(asked("a"), 0, 0.0)
        assert router.choose(asked("b"), [0, 1], 0.0) == 1

    def test_power_of_two_takes_the_better_of_its_two(self):
        """Of three slots the fullest is never taken: it is always drawn beside a better one."""
        made = desk(3)
        for name in "abc":
            made.send(asked(name), 2, 0.0)
        router = load.PowerOfTwo(made.account, rng())
        assert {router.choose(asked("z"), [0, 1, 2], 0.0) for _ in range(50)} == {0, 1}

    def test_jsq_counts_tokens_not_requests(self):
        made = desk(2)
        made.send(asked("long", prompt=9000), 0, 0.0)
        for name in "abc":
            made.send(asked(name, prompt=100), 1, 0.0)
        router = load.ShortestTokens(made.account, rng())
        assert router.choose(asked("z"), [0, 1], 0.0) == 1


class TestAffinity:
    @pytest.mark.parametrize(
        ("requests", "matched", "expected"),
        [
            pytest.param([3, 1, 3], [60, 0, 30], 0, id="best match within mean + sigma"),
            pytest.param([8, 2, 2], [60, 0, 30], 2, id="best match is too loaded, next one"),
            pytest.param([8, 1, 2], [60, 0, 0], 1, id="no match is left: least requests"),
            pytest.param([12, 1, 3], [60, 0, 30], 1, id="spread over 8: least requests only"),
        ],
    )
    def test_aibrix(self, requests, matched, expected):
        slots = [0, 1, 2]
        chosen = affinity.aibrix(requests, matched, slots, imbalance=8, sigmas=1.0, rng=rng())
        assert chosen == expected

    @pytest.mark.parametrize(
        ("requests", "share", "expected"),
        [
            pytest.param([60, 0], [0.31, 0.0], 0, id="match over 0.3 while in balance"),
            pytest.param([60, 0], [0.30, 0.0], 1, id="match not over 0.3: shortest"),
            pytest.param([66, 1], [1.0, 0.0], 1, id="65 apart and over 1.5 times: shortest"),
            pytest.param([200, 135], [0.0, 1.0], 1, id="65 apart, under 1.5 times: match"),
        ],
    )
    def test_sglang(self, requests, share, expected):
        chosen = affinity.sglang(
            requests, share, [0, 1], threshold=0.3, absolute=64, relative=1.5, rng=rng()
        )
        assert chosen == expected

    def test_llmd_weighted_reads_scrapes(self):
        """Queue 4 of 0..4, KV half full, 64 of 100 tokens cached: 2*0 + 2*0.5 + 3*0.64 against 2*1 + 2*0.9."""
        scores = affinity.weighted([4, 0], [0.5, 0.1], [0.64, 0.0], [0, 1], (2.0, 2.0, 3.0))
        assert scores == pytest.approx([2.92, 3.8])
        made = desk(2)
        made.hear(beat(0, queued=4, kv_usage=0.5), 0.1)
        made.hear(beat(1, queued=0, kv_usage=0.1), 0.1)
        router = affinity.LlmdWeighted(
            made.scrapes, made.prefixes, weights=(2.0, 2.0, 3.0), rng=rng()
        )
        assert router.choose(asked(), [0, 1], 0.1) == 1

    def test_llmd_sticky_leaves_when_the_lead_is_too_long(self):
        """A100 prefills 16,000 tokens/s: a lead of 64,001 tokens is over 4 s."""
        lead = [64_000.0, 64_000.0]
        fields = {"prompt_tokens": 1000, "affinity": 0.8, "lead_tokens": lead}
        assert affinity.sticky([64_000, 0], [800, 0], [0, 1], **fields) == 0
        assert affinity.sticky([64_001, 0], [800, 0], [0, 1], **fields) == 1
        assert affinity.sticky([10, 0], [799, 0], [0, 1], **fields) == 0, "no affinity: 211 < 1000"


class TestFinish:
    def test_lmetric(self):
        """(queued + own) * (batch + 1): 1500 * 3 against 3000 * 1."""
        assert finish.lmetric([1000, 2000], [2, 0], [500, 1000]) == [4500, 3000]

    def test_dynamo(self):
        """Weight 2: 2 * (160 + 80) / 16 + (320 + 160) / 16."""
        cost = finish.dynamo([160], [320], [80], prompt_tokens=160, overlap_weight=2.0)
        assert cost == [60.0]

    def test_mooncake_refuses_what_would_be_late(self):
        """32,000 tokens before it on an A100 are 2 s: a promise of 1 s is refused, one of 9 s is not."""
        made = desk(1)
        made.send(asked("a", prompt=32_000), 0, 0.0)
        router = finish.Mooncake(made)
        assert router.choose(asked("b", ttft=1.0), [0], 0.0) is None
        assert router.choose(asked("b", ttft=9.0), [0], 0.0) == 0

    def test_earliest_finish_weighs_queue_against_cache(self):
        """8,000 cached tokens are worth a queue of 4,000, and not one of 16,000."""
        blocks = tuple(f"{at:x}" for at in range(70))
        made = desk(2)
        router = finish.EarliestFinish(made.costs, made.prefixes)
        made.send(asked("first", prompt=8960, blocks=blocks), 0, 0.0)
        made.hear(beat(0, first_tokens=("first:1:500",)), 0.5)
        assert router.choose(asked("again", prompt=8960, blocks=blocks), [0, 1], 0.5) == 0
        made.send(asked("short", prompt=4000), 0, 0.5)
        assert router.choose(asked("again", prompt=8960, blocks=blocks), [0, 1], 0.5) == 0
        made.send(asked("long", prompt=16_000), 0, 0.5)
        assert router.choose(asked("again", prompt=8960, blocks=blocks), [0, 1], 0.5) == 1

    def test_llmd_predicted_stays_behind_its_gate(self):
        """Where one holds 80 % of the prompt, the others are not asked, however short their queues."""
        blocks = tuple(f"{at:x}" for at in range(70))
        made = desk(2)
        made.send(asked("first", prompt=8960, blocks=blocks), 0, 0.0)
        made.send(asked("long", prompt=30_000), 0, 0.0)
        router = finish.LlmdPredicted(made.costs, made.prefixes, gate=0.8)
        assert router.choose(asked("again", prompt=8960, blocks=blocks), [0, 1], 0.0) == 0
        assert router.choose(asked("other", prompt=8960), [0, 1], 0.0) == 1

    def test_oracle_follows_the_truth(self):
        truth = {"e0": 2.0, "e1": 1.0}
        router = finish.Oracle(["e0", "e1"], lambda _, endpoint: truth[endpoint])
        assert router.choose(asked(), [0, 1], 0.0) == 1

    def test_lodestar_learns_which_endpoint_is_slow(self):
        """After a round in which slot 0 took ten times as long, slot 1 is chosen."""
        made = desk(2)
        router = lodestar.Lodestar(
            made.account, made.scrapes, made.prefixes, round_s=10.0, least_answers=50, rng=rng()
        )
        for at in range(200):
            one = asked(str(at), prompt=1000 + at)
            slot = router.choose(one, [0, 1], 0.0)
            seconds = (1.0, 0.1)[slot]
            reward = Reward(
                id=one.id, endpoint="", epoch=1, attempt=1, outcome="completed", ttft_s=seconds
            )
            router.learn(reward, 11.0 if at == 199 else 0.0)
        chosen = [router.choose(asked(f"z{at}"), [0, 1], 12.0) for at in range(20)]
        assert chosen == [1] * 20

    def test_lodestar_is_not_thrown_by_what_it_has_never_seen(self):
        """Whoever learned while nobody waited anywhere still prefers the fast endpoint when somebody does."""
        for seed in range(10):
            made = desk(2)
            router = lodestar.Lodestar(
                made.account, made.scrapes, made.prefixes, round_s=10.0, least_answers=50,
                rng=np.random.default_rng(seed),
            )  # fmt: skip
            for at in range(200):
                one = asked(str(at), prompt=1000 + at)
                seconds = (1.0, 0.1)[router.choose(one, [0, 1], 0.0)]
                reward = Reward(
                    id=one.id, endpoint="", epoch=1, attempt=1, outcome="completed", ttft_s=seconds
                )
                router.learn(reward, 11.0 if at == 199 else 0.0)
            for slot in (0, 1):
                made.hear(beat(slot, queued=8, running=16), 12.0)

            assert router.choose(asked("z"), [0, 1], 12.0) == 1


def served(order, waiting, now=0.0):
    for one in waiting:
        order.add(one)
    found = []
    while (one := order.pop(now)) is not None:
        found.append(one.id)
    return found


def service_s(one):
    return one.prompt_tokens / 1000


# name, arrival, seconds of work, due
LINE = [
    asked("long", at=0.0, prompt=5000, ttft=6.0),
    asked("soon", at=1.0, prompt=2000, ttft=2.0),  # due at 3
    asked("tiny", at=2.0, prompt=500, ttft=9.0),  # due at 11
    asked("lost", at=-4.0, prompt=3000, ttft=5.0),  # due at 1, needs 3
]


class TestOrders:
    def test_fcfs(self):
        order = orders.Ranked(lambda one: one.enqueued_at)
        assert served(order, LINE) == ["lost", "long", "soon", "tiny"]

    def test_sjf(self):
        assert served(orders.Ranked(service_s), LINE) == ["tiny", "soon", "lost", "long"]

    def test_edf_serves_the_hopeless_too(self):
        order = orders.Ranked(lambda one: one.due_at)
        assert served(order, LINE) == ["lost", "soon", "long", "tiny"]

    def test_edf_drop_refuses_the_hopeless(self):
        order = orders.Dropping(service_s)
        assert served(order, LINE) == ["soon", "long", "tiny"]
        assert [one.id for one in order.dropped()] == ["lost"]
        assert order.dropped() == []

    def test_least_slack(self):
        """Slack: long 1, soon 1 (the older first), tiny 10.5; lost, at -2, waits behind."""
        order = orders.Relegating(lambda one: one.due_at - service_s(one), service_s)
        assert served(order, LINE) == ["long", "soon", "tiny", "lost"]

    def test_moore_hodgson_gives_up_the_longest(self):
        """soon (2 s by 3), long (5 s by 6) and tiny (0.5 s by 11): soon and long cannot both be; long goes."""
        order = orders.MooreHodgson(service_s, service_s, lambda: 1.0)
        for one in LINE:
            order.add(one)
        assert order.pop(0.0).id == "soon"
        assert order.pop(2.0).id == "tiny"
        assert order.pop(2.5).id == "lost", "nobody can make it: the shortest"

    def test_niyama(self):
        """Due + 0.5 * work: soon 4, long 8.5, tiny 11.25; lost is relegated to the end."""
        order = orders.Relegating(lambda one: one.due_at + 0.5 * service_s(one), service_s)
        assert served(order, LINE) == ["soon", "long", "tiny", "lost"]

    def test_kairos_takes_the_highest_urgency_below_one(self):
        """Urgency: long 5/6, soon 2/3, tiny 0.5/11; lost is beyond 1 and waits."""
        assert served(orders.UrgencyFirst(service_s), LINE) == ["long", "soon", "tiny", "lost"]


class TestNames:
    def test_the_promised_names_exist(self):
        """The names of the documentation, each with a sentence that says whose it is."""
        promised = (
            "plan,fcfs,sjf,edf,edf-drop,least-slack,moore-hodgson,niyama,kairos,round-robin,random,"
            "least-request,power-of-two,jsq-tokens,aibrix-prefix-load,sglang-cache-aware,"
            "llm-d-weighted,llm-d-sticky,llm-d-predicted,lmetric,dynamo,mooncake,lodestar,"
            "earliest-finish,oracle"
        )
        assert set(promised.split(",")) <= set(policy.BY_NAME)
        assert all(kind.__doc__ for kind in policy.ALL)

    def test_a_setting_can_be_changed(self):
        assert policy.named("aibrix-prefix-load:imbalance=4:sigmas=2").sigmas == 2.0

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("plam", "policy is 'plam', wanted one of: plan, "),
            ("dynamo:weight=2", "'dynamo' has no setting 'weight', wanted one of: overlap_weight"),
            ("dynamo:overlap_weight=x", "dynamo:overlap_weight=x"),
        ],
    )
    def test_a_wrong_one_says_what_exists(self, text, message):
        with pytest.raises(SettingsError, match=message):
            policy.named(text)


def reachable(root, limit=200_000):
    """Every object that can be reached from this one, modules and classes left out."""
    seen, stack = {id(root)}, [root]
    while stack:
        one = stack.pop()
        yield one
        for other in gc.get_referents(one):
            if id(other) in seen or isinstance(other, (type, types.ModuleType)):
                continue
            # A function's globals are the program, not what it was given.
            if isinstance(one, types.FunctionType) and isinstance(other, dict):
                continue
            seen.add(id(other))
            stack.append(other)
        assert len(seen) < limit


class TestKnowledge:
    @pytest.mark.parametrize("name", [n for n in policy.BY_NAME if n != "oracle"])
    def test_i7_no_policy_can_reach_the_truth(self, name):
        """I7: from what a policy holds, no reference leads to a true length, an engine or the lab's record."""
        stage = Stage(rng=rng(), delays=Delays())
        dispatch = policy.named(name).dispatch(stage)
        for slot in range(2):
            dispatch.receive(beat(slot), 0.0)
        for at in range(4):
            request = asked(str(at), ttft=5.0).request
            dispatch.receive(Arrived(request=request, entry=f"{at}-0", enqueued_at=0.0), 0.0)
        dispatch.decide(0.0)

        hidden = (Arrival, Engine, Fate, Row, Sequence, World)
        assert not [one for one in reachable(dispatch) if isinstance(one, hidden)]
        assert "output_tokens" not in Request.__struct_fields__
