"""Off-policy estimates where the truth is known: no queues, so nothing is hidden from them."""

import functools
import math

import msgspec
import numpy as np
import pytest

from scheduler import evaluate, explore
from scheduler.errors import SettingsError
from scheduler.evaluate import Weighed
from scheduler.wire.dispatcher import Decision
from scheduler.wire.worker import Reward

TARGETS = ("earliest-finish", "least-wait", "random", "sticky", "plan:explore=0.3")


@functools.cache
def logged(n, *, seed=0, scale=0.5, noise=0.2, bias=1.0):
    """Decisions of a draw among three, whose real seconds are the predicted ones times a bias and noise."""
    rng = np.random.default_rng(seed)
    rows, truth = [], {name: [] for name in TARGETS}
    for _ in range(n):
        start_s = rng.exponential(0.1, 3)
        seconds = start_s + rng.lognormal(-1.5, 0.5, 3)
        order = np.argsort(seconds)
        start_s, seconds = start_s[order], seconds[order]
        chance = seconds ** (-1 / scale)
        chance /= chance.sum()
        real_s = bias * seconds * np.exp(rng.normal(0, noise, 3))
        taken = int(rng.choice(3, p=chance))
        one = Weighed(
            seconds=seconds,
            start_s=start_s,
            cached=rng.integers(0, 3, 3) * 128.0,
            pressure=rng.random(3),
            others_s=rng.random(3),
            chance=chance,
            taken=taken,
            left_s=0.4,
            ttft_s=float(real_s[taken]),
            on_time=float(real_s[taken] <= 0.4),
        )
        rows.append(one)
        for name in TARGETS:
            p = evaluate.named(name).chances(one)
            truth[name].append((float(p @ real_s), float(p @ (real_s <= 0.4))))
    return rows, {name: np.mean(values, axis=0) for name, values in truth.items()}


class AsLogged(evaluate.Target, frozen=True):
    """Whatever wrote the log."""

    def chances(self, one):
        return one.chance


class TestTargets:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            pytest.param("plan:fill=0:externality=0", [0.5, 0.5, 0, 0], id="equals share"),
            pytest.param("plan:fill=0:externality=0:tie=0", [1, 0, 0, 0], id="the earliest"),
            pytest.param("plan:fill=0", [0, 1, 0, 0], id="seconds of others are worth as many"),
            pytest.param("plan:fill=1", [0, 0, 1, 0], id="KV to spare is worth seconds"),
            pytest.param("plan:fill=1:window_s=0.1", [1, 0, 0, 0], id="of those that start soon"),
            pytest.param("plan:fill=9", [0, 0, 1, 0], id="and none that makes it late"),
            pytest.param("earliest-finish:window_s=9", [1, 0, 0, 0], id="earliest finish"),
        ],
    )
    def test_the_plan_as_a_target_chooses_as_the_plan_does(self, text, expected):
        one = Weighed(
            seconds=np.array([1.0, 1.01, 1.2, 3.0]),
            start_s=np.array([0.0, 0.2, 0.2, 0.2]),
            cached=np.zeros(4),
            pressure=np.array([1.0, 1.0, 0.5, 0.0]),
            others_s=np.array([0.1, 0.0, 0.0, 0.0]),
            chance=np.full(4, 0.25),
            taken=0,
            left_s=2.0,
            ttft_s=1.0,
            on_time=1.0,
        )

        assert evaluate.named(text).chances(one) == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            pytest.param("sticky:window_s=9", 2, id="the longest prefix, of equals the earliest"),
            pytest.param("sticky:window_s=9:wait_s=0.9", 1, id="for which it waits only so long"),
            pytest.param("least-wait:window_s=9", 0, id="the shortest queue"),
        ],
    )
    def test_others_choose_by_what_they_are_called_after(self, text, expected):
        one = Weighed(
            seconds=np.array([4.0, 1.5, 2.5, 3.5]),
            start_s=np.array([0.0, 0.5, 1.0, 2.0]),
            cached=np.array([0.0, 128.0, 256.0, 256.0]),
            pressure=np.zeros(4),
            others_s=np.zeros(4),
            chance=np.full(4, 0.25),
            taken=0,
            left_s=math.inf,
            ttft_s=1.0,
            on_time=1.0,
        )

        assert evaluate.named(text).chances(one).tolist() == [at == expected for at in range(4)]

    def test_its_exploration_counts(self):
        """As it would have drawn, of those that it may draw."""
        [one, *_], _ = logged(400)

        found = evaluate.named("plan:fill=0:externality=0:explore=0.3:window_s=9").chances(one)

        late = one.seconds > max(one.left_s, one.seconds.min())
        assert found == pytest.approx(
            explore.chances(np.where(late, np.inf, one.seconds), scale=0.3)
        )


class TestEstimate:
    @pytest.mark.parametrize("metric", evaluate.METRICS)
    @pytest.mark.parametrize("name", TARGETS)
    def test_all_three_find_the_truth(self, name, metric):
        """Each within a few of its own half-widths of what the target would really have brought."""
        rows, truth = logged(6000)

        found = evaluate.estimate(rows, evaluate.named(name), label=name, metric=metric)

        real = truth[name][evaluate.METRICS.index(metric)]
        assert found.support == pytest.approx(1.0)
        for one in (found.ips, found.snips, found.dr):
            half = (one.high - one.low) / 2
            assert one.low <= one.value <= one.high
            assert abs(one.value - real) <= 2.5 * half + 0.01 * real

    @pytest.mark.parametrize("metric", evaluate.METRICS)
    def test_a_policy_is_worth_what_its_own_log_says(self, metric):
        """Chosen with the log's chances every weight is 1, and nothing is left to estimate."""
        rows, _ = logged(400)

        found = evaluate.estimate(rows, AsLogged(), label="", metric=metric)

        assert (found.weight_max, found.n_cut) == (1.0, 0)
        assert found.n_effective == pytest.approx(len(rows))
        assert found.logged == found.ips == found.snips

    def test_who_had_no_first_token_was_late_and_not_quick(self):
        """It counts as a promise broken, and no seconds are made up for it."""
        rows, _ = logged(400)
        failed = [
            msgspec.structs.replace(one, ttft_s=math.nan, on_time=0.0) if at % 4 == 0 else one
            for at, one in enumerate(rows)
        ]
        for metric, n in (("ttft_s", 300), ("on_time", 400)):
            found = evaluate.estimate(failed, AsLogged(), label="", metric=metric)

            assert found.n == n
            assert math.isfinite(found.dr.low + found.dr.high)

    def test_doubly_robust_is_the_steadiest(self):
        """Where predictions are good its interval is the narrowest."""
        rows, _ = logged(3000)

        found = evaluate.estimate(
            rows, evaluate.named("earliest-finish"), label="", metric="ttft_s"
        )

        assert found.dr.high - found.dr.low < found.ips.high - found.ips.low

    def test_wrong_predictions_bias_nothing_while_chances_are_right(self):
        """Predictions twice too small: doubly robust still finds the truth."""
        rows, truth = logged(6000, bias=2.0, noise=0.5)

        found = evaluate.estimate(rows, evaluate.named("random"), label="", metric="ttft_s")

        assert found.dr.value == pytest.approx(truth["random"][0], rel=0.05)

    def test_what_the_log_could_never_have_done_is_refused(self):
        """Choices outside the log's support are named as a share, not guessed."""
        rows, _ = logged(300)
        certain = [
            Weighed(
                **{
                    **{f: getattr(one, f) for f in one.__struct_fields__},
                    "chance": np.array([0.0, 0.0, 1.0]),
                    "taken": 2,
                }
            )
            for one in rows
        ]

        with pytest.raises(SettingsError, match="could have made 0% of its choices"):
            evaluate.estimate(
                certain, evaluate.named("earliest-finish"), label="mine", metric="ttft_s"
            )

    def test_a_log_without_chance_is_refused(self):
        """Decisions that say nothing of chances join with nothing; the setting that helps is named."""
        decision = Decision(id="a", kind="assigned", attempt=1, endpoint="e0", candidates=("e0=1",))
        reward = Reward(id="a", endpoint="e0", epoch=1, attempt=1, outcome="completed")

        rows, certain = evaluate.joined([decision], [reward])

        assert (rows, certain) == ([], 1)
        with pytest.raises(SettingsError, match=r"plan\.explore"):
            evaluate.estimate(rows, evaluate.named("random"), label="", metric="ttft_s")


class TestJoined:
    def test_a_decision_meets_its_own_attempt(self):
        """By request and attempt; what was handed back is no outcome of a choice."""
        decision = Decision(
            id="a",
            kind="assigned",
            attempt=2,
            endpoint="e1",
            slack_s=0.7,
            candidates=("e0=0.2", "e1=0.3"),
            weighed=("e0=0.75,0,128,0.5,0.1", "e1=0.25,0.1,0,0.25,0"),
        )
        rewards = [
            Reward(id="a", endpoint="e0", epoch=1, attempt=1, outcome="returned"),
            Reward(
                id="a",
                endpoint="e1",
                epoch=1,
                attempt=2,
                outcome="completed",
                decided_at=10.0,
                first_token_at=10.5,
                on_time=True,
            ),
        ]

        [one], certain = evaluate.joined([decision], rewards)

        assert certain == 0
        assert (one.taken, one.chance.tolist()) == (1, [0.75, 0.25])
        assert (one.left_s, one.ttft_s, one.on_time) == (1.0, 0.5, 1.0)

    @pytest.mark.parametrize("weighed", [(), ("e0=1,0,0,0,0",)])
    def test_a_choice_whose_chance_nobody_named_estimates_nothing(self, weighed):
        """Where it says nothing of chances, or of others' alone."""
        decision = Decision(
            id="a",
            kind="assigned",
            attempt=1,
            endpoint="e1",
            candidates=("e0=0.2", "e1=0.3"),
            weighed=weighed,
        )
        reward = Reward(id="a", endpoint="e1", epoch=1, attempt=1, outcome="completed")

        assert evaluate.joined([decision], [reward]) == ([], 1)

    @pytest.mark.parametrize(
        ("said", "ttft_s", "on_time"),
        [
            pytest.param({"outcome": "failed"}, math.nan, 0.0, id="failed"),
            pytest.param({"decided_at": None}, math.nan, 1.0, id="no word when it was decided"),
            pytest.param({"on_time": False}, 0.5, 0.0, id="late"),
            pytest.param({"on_time": None}, 0.5, 1.0, id="nothing was promised"),
        ],
    )
    def test_what_came_of_it_is_the_rewards_word(self, said, ttft_s, on_time):
        """No first token is no time, and only an end that kept its promise counts as one."""
        decision = Decision(
            id="a",
            kind="assigned",
            attempt=1,
            endpoint="e0",
            candidates=("e0=0.2",),
            weighed=("e0=1,0,0,0,0",),
        )
        times = {} if said.get("outcome") else {"decided_at": 10.0, "first_token_at": 10.5}
        reward = Reward(
            id="a",
            endpoint="e0",
            epoch=1,
            attempt=1,
            **{"outcome": "completed", "on_time": True, **times, **said},
        )

        [one], _ = evaluate.joined([decision], [reward])

        assert (one.left_s, one.on_time) == (math.inf, on_time)
        assert one.ttft_s == pytest.approx(ttft_s, nan_ok=True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("best", "policy is 'best', wanted one of: plan, earliest-finish"),
        (
            "plan:fil=1",
            "no setting 'fil', wanted one of: fill, externality, explore, tie, window_s",
        ),
        ("plan:fill=much", "float"),
        pytest.param("mine.toml", "a profile: the log does not hold", id="a profile's file"),
        pytest.param("plan:profile=mine.toml", "plays a profile in the lab", id="as in the lab"),
    ],
)
def test_an_unknown_target_says_what_there_is(text, reason):
    """Names and settings that exist are in the message."""
    with pytest.raises(SettingsError, match=reason):
        evaluate.named(text)
