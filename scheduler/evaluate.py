"""Off-policy estimates: what another choice of endpoints would have been worth, from the log of this one.

    IPS     mean of w * r                          unbiased, and ruled by the few large weights
    SNIPS   sum of w * r over sum of w             a little biased, far steadier (Swaminathan and Joachims 2015)
    DR      mean of q(target) + w * (r - q(taken)) right if either the propensities or q are (Dudik et al. 2011)

with w = target's chance / logged chance of what was taken. Intervals are bootstrapped over blocks of neighbours in
time. What no such estimate sees: requests share endpoints, and another policy would have left other queues behind.
It answers for a change of few decisions, or of decisions that hardly load anybody; the lab answers for the rest.
Where the log left nothing to chance it says nothing at all about what was not taken: that is refused, not guessed.
"""

import math
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from scheduler import explore
from scheduler.errors import SettingsError
from scheduler.plan import PlanSettings
from scheduler.state import Bools, Floats
from scheduler.wire.dispatcher import Decision
from scheduler.wire.worker import Reward

BLOCK = 64
"Decisions resampled together: neighbours share queues."

BOOTSTRAPS = 500
ALPHA = 0.05

WEIGHT_MAX = 50.0
"Larger weights are cut: a little bias for a variance that means something. Their share is reported."

SUPPORT_MIN = 0.5
"Of the target's choices, those that the log could have made; with less nothing can be said."

METRICS = ("ttft_s", "on_time")
"`ttft_s`: from the decision to the first token, which is what the choice decides. `on_time`: a share."


class Weighed(msgspec.Struct, frozen=True, kw_only=True):
    """One decision as it was taken: float64[n] over its candidates, best first."""

    seconds: Floats
    "Predicted to the first token."
    start_s: Floats
    "Predicted wait."
    cached: Floats
    "Prompt tokens believed cached."
    pressure: Floats
    "What giving KV away there costs others, 0 to 1."
    others_s: Floats
    "What taking its time costs others."
    chance: Floats
    "With which each could have been taken."
    taken: int
    left_s: float
    "Until it was due; `inf`: nothing promised."
    ttft_s: float
    "Measured from the decision; nan: it never had a first token."
    on_time: float
    "1 or 0."


class Target(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="name"
):
    """A choice of endpoints to be judged: its tag is its name, its fields are its settings."""

    window_s: float = PlanSettings().commit_window_s
    "Only an endpoint that could start within this is taken, as the log's own policy does it."

    def chances(self, one: Weighed) -> Floats:
        """With what chance it takes each candidate."""
        score = self.score(one)
        open_ = one.start_s <= self.window_s
        score = np.where(open_ if open_.any() else np.ones(len(score), dtype=bool), score, np.inf)
        best: Bools = score <= score.min() + 1e-12
        share: Floats = best / best.sum()
        return share

    def score(self, one: Weighed) -> Floats:
        """What it wants least of, for each candidate."""
        raise NotImplementedError


class Plan(Target, frozen=True, tag="plan"):
    """The plan's choice: predicted seconds, its own, others' and a price on KV given away, with its exploration."""

    fill: float = PlanSettings().fill
    externality: float = PlanSettings().externality
    explore: float = PlanSettings().explore
    tie: float = PlanSettings().tie

    def score(self, one: Weighed) -> Floats:
        score = one.seconds + self.fill * one.pressure + self.externality * one.others_s
        score[one.seconds > max(one.left_s, float(one.seconds.min()))] = np.inf
        return score

    def chances(self, one: Weighed) -> Floats:
        score = np.where(one.start_s <= self.window_s, self.score(one), np.inf)
        if not np.isfinite(score).any():
            score = self.score(one)
        if self.explore > 0:
            return explore.chances(score, scale=self.explore)
        near: Bools = score <= score.min() * (1.0 + self.tie)
        share: Floats = near / near.sum()
        return share


class EarliestFinish(Target, frozen=True, tag="earliest-finish"):
    """The smallest predicted time to the first token."""

    def score(self, one: Weighed) -> Floats:
        return one.seconds


class LeastWait(Target, frozen=True, tag="least-wait"):
    """The shortest queue in seconds, whatever is cached and whoever is fast."""

    def score(self, one: Weighed) -> Floats:
        return one.start_s


class Sticky(Target, frozen=True, tag="sticky"):
    """The longest cached prefix, unless waiting for it costs more than this."""

    wait_s: float = 4.0

    def score(self, one: Weighed) -> Floats:
        near = one.seconds <= one.seconds.min() + self.wait_s
        # Among equals in cache the earliest.
        return np.where(near, -one.cached + one.seconds / 3600.0, np.inf)


class Random(Target, frozen=True, tag="random"):
    """Any that could start now."""

    def score(self, one: Weighed) -> Floats:
        return np.zeros(len(one.seconds))


TARGETS: dict[str, type[Target]] = {
    str(kind.__struct_config__.tag): kind
    for kind in (Plan, EarliestFinish, LeastWait, Sticky, Random)
}


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """An estimate and where it lies with 95 %."""

    value: float
    low: float
    high: float


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What a target would have been worth. Means over the same decisions."""

    policy: str
    metric: str
    n: int
    "Decisions that could be joined with what they cost."
    support: float
    "Share of the target's choices that the log could have made."
    n_effective: float
    "Kish's effective sample size of the weights."
    weight_max: float
    n_cut: int
    "Weights over `WEIGHT_MAX`, cut to it."
    logged: Interval
    "What the log's own choices brought."
    ips: Interval
    snips: Interval
    dr: Interval


def named(text: str) -> Target:
    """A target from `name` or `name:field=value:field=value`.

    Raises:
        SettingsError: an unknown name or field, or a value of a wrong kind.

    >>> named("sticky:wait_s=2").wait_s
    2.0
    """
    name, *parts = text.split(":")
    kind = TARGETS.get(name)
    if name.endswith(".toml") or any(part.startswith("profile=") for part in parts):
        raise SettingsError(
            f"policy is {text!r}, a profile: the log does not hold what its parts would read; wanted one of: "
            f"{', '.join(TARGETS)}. `headgate simulate --policy plan:profile=FILE` plays a profile in the lab"
        )
    if kind is None:
        raise SettingsError(f"policy is {name!r}, wanted one of: {', '.join(TARGETS)}")
    fields = {}
    for part in parts:
        field, _, value = part.partition("=")
        if field not in kind.__struct_fields__:
            known = ", ".join(kind.__struct_fields__)
            raise SettingsError(f"policy {name!r} has no setting {field!r}, wanted one of: {known}")
        fields[field] = value
    try:
        return msgspec.convert(fields, kind, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(f"policy {text!r}: {error}") from None


def joined(decisions: Iterable[Decision], rewards: Iterable[Reward]) -> tuple[list[Weighed], int]:
    """Decisions with what they cost, in order of time; and how many left nothing to chance."""
    costs = {(reward.id, reward.attempt): reward for reward in rewards}
    found, certain = [], 0
    for decision in decisions:
        reward = costs.get((decision.id, decision.attempt))
        if decision.kind != "assigned" or reward is None or reward.outcome == "returned":
            continue
        one = _weighed(decision, reward)
        if one is None:
            certain += 1
        else:
            found.append(one)
    return found, certain


def estimate(logged: Sequence[Weighed], target: Target, *, label: str, metric: str) -> Estimate:
    """The target's worth by all three estimators.

    Raises:
        SettingsError: too few decisions, or the log could hardly ever have made the target's choices.
    """
    rows = [one for one in logged if metric == "on_time" or math.isfinite(one.ttft_s)]
    if len(rows) < BLOCK:
        raise SettingsError(
            f"{len(rows)} decisions were left to chance and can be joined with a reward, wanted at least {BLOCK}: "
            "set plan.explore above 0 where the log is written, or beside a [profile] a picker that draws"
        )
    wanted = [target.chances(one) for one in rows]
    support = float(np.mean([p[one.chance > 0].sum() for p, one in zip(wanted, rows, strict=True)]))
    if support < SUPPORT_MIN:
        raise SettingsError(
            f"policy {label!r}: the log could have made {support:.0%} of its choices, wanted at least "
            f"{SUPPORT_MIN:.0%}: nothing can be said of the others"
        )
    return _estimated(rows, wanted, label=label, metric=metric, support=support)


def _estimated(
    rows: Sequence[Weighed], wanted: Sequence[Floats], *, label: str, metric: str, support: float
) -> Estimate:
    raw = np.array([p[o.taken] / o.chance[o.taken] for p, o in zip(wanted, rows, strict=True)])
    weight = np.minimum(raw, WEIGHT_MAX)
    value = np.array([one.ttft_s if metric == "ttft_s" else one.on_time for one in rows])
    believed = _believed(rows, value, metric)
    taken = np.array([q[one.taken] for q, one in zip(believed, rows, strict=True)])
    hoped = np.array([float(p @ q) for p, q in zip(wanted, believed, strict=True)])
    terms = np.stack([value, weight * value, weight, hoped + weight * (value - taken)])
    n_effective = float(weight.sum() ** 2 / max(1e-12, (weight**2).sum()))
    means = terms.mean(axis=1)
    drawn = _bootstrapped(terms)
    return Estimate(
        policy=label,
        metric=metric,
        n=len(rows),
        support=support,
        n_effective=n_effective,
        weight_max=float(raw.max()),
        n_cut=int((raw > WEIGHT_MAX).sum()),
        logged=_interval(means[0], drawn[0]),
        ips=_interval(means[1], drawn[1]),
        snips=_interval(means[1] / max(1e-12, means[2]), drawn[1] / np.maximum(drawn[2], 1e-12)),
        dr=_interval(means[3], drawn[3]),
    )


def _believed(rows: Sequence[Weighed], value: Floats, metric: str) -> list[Floats]:
    """What each candidate would have brought: the predictor's own word, corrected by how it did in the other half.

    Crossed halves, so that no decision's reward is part of what it is held against.
    """
    taken_s = np.array([one.seconds[one.taken] for one in rows])
    real_s = np.array([one.ttft_s for one in rows])
    half = np.arange(len(rows)) // BLOCK % 2
    found: list[Floats] = [np.zeros(0)] * len(rows)
    for own in (0, 1):
        other = (half != own) & np.isfinite(real_s)
        if not other.any():
            other = np.isfinite(real_s)
        scale = float(real_s[other].mean() / max(1e-9, taken_s[other].mean()))
        sigma = float(np.std(np.log(np.maximum(real_s[other], 1e-4) / taken_s[other]))) + 0.05
        rest = float(value[other].mean())
        for at in np.flatnonzero(half == own).tolist():
            one = rows[at]
            if metric == "ttft_s":
                found[at] = scale * one.seconds
            elif math.isinf(one.left_s):
                found[at] = np.full(len(one.seconds), rest)
            else:
                odds = np.log(max(one.left_s, 1e-4) / np.maximum(scale * one.seconds, 1e-4)) / sigma
                found[at] = 1.0 / (1.0 + np.exp(-1.702 * np.clip(odds, -20, 20)))
    return found


def _bootstrapped(terms: Floats) -> Floats:
    """Means of each row over resampled blocks: float64[n_rows, BOOTSTRAPS]."""
    n_blocks = -(-terms.shape[1] // BLOCK)
    edges = np.arange(0, terms.shape[1], BLOCK)
    sums = np.add.reduceat(terms, edges, axis=1)
    sizes = np.diff(np.append(edges, terms.shape[1]))
    rng = np.random.default_rng(0)
    picks = rng.multinomial(n_blocks, np.full(n_blocks, 1.0 / n_blocks), size=BOOTSTRAPS)
    means: Floats = (sums @ picks.T) / (picks @ sizes)
    return means


def _interval(value: float, drawn: Floats) -> Interval:
    low, high = np.quantile(drawn, [ALPHA / 2, 1 - ALPHA / 2])
    return Interval(value=float(value), low=float(low), high=float(high))


def _weighed(decision: Decision, reward: Reward) -> Weighed | None:
    """None where the log says nothing of chances, or names what was taken nowhere."""
    names, columns = [], []
    seconds = dict(part.rpartition("=")[::2] for part in decision.candidates)
    for part in decision.weighed:
        name, _, text = part.rpartition("=")
        if name in seconds and text.count(",") == 4:  # a record of another version says nothing
            names.append(name)
            columns.append([float(seconds[name]), *(float(cell) for cell in text.split(","))])
    if decision.endpoint not in names:
        return None
    predicted_s, chance, start_s, cached, pressure, others_s = np.array(columns).T
    taken = names.index(decision.endpoint)
    left_s = math.inf if decision.slack_s is None else decision.slack_s + float(predicted_s[taken])
    ttft_s = math.nan
    if reward.first_token_at is not None and reward.decided_at is not None:
        ttft_s = reward.first_token_at - reward.decided_at
    is_kept = reward.outcome == "completed" and reward.on_time is not False
    return Weighed(
        seconds=predicted_s,
        start_s=start_s,
        cached=cached,
        pressure=pressure,
        others_s=others_s,
        chance=chance,
        taken=taken,
        left_s=left_s,
        ttft_s=ttft_s,
        on_time=float(is_kept),
    )
