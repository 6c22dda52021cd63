"""The conformance suite passes for every built-in and for a package from elsewhere, and catches what breaks a rule."""

import pathlib
import time

import conformance
import numpy as np
import pytest
from conformance import rules, with_fetchers
from msgspec import structs
from plugin.warmth import Idle, NewestFirst, Warmth

from scheduler import policies
from scheduler.profile import profile
from scheduler.profile.filters import Label
from scheduler.profile.parts import Fetcher, Filter, Picker, Scorer

MADE = {Label: Label(by="hardware", allow=("h100*", "a*"), deny=("a1?",))}
"What needs a setting."

PLUG_INS = [
    *(MADE.get(kind) or kind() for kind in profile.BUILT_IN),
    *(kind() for kind in policies.BUILT_IN),
    Idle(),
    with_fetchers(Warmth(half_s=5.0), Idle()),
]


@pytest.mark.parametrize(
    ("plug_in", "rule"),
    [
        pytest.param(one, rule, id=f"{one.label}-{rule.__name__}")
        for one in PLUG_INS
        for rule in rules(type(one))
    ],
)
def test_every_plug_in_conforms(plug_in, rule):
    """Built in or brought along, a plug-in keeps every rule of its kind."""
    rule(plug_in)


class Sinks:
    """Where a plug-in must keep nothing."""

    seen: list[object] = []  # noqa: RUF012
    calls = 0


class Remembers(Scorer, frozen=True, tag="remembers"):
    def score(self, scene, candidates):
        Sinks.calls += 1
        return np.full(scene.n_slots, Sinks.calls % 7 / 7)


class Writes(Scorer, frozen=True, tag="writes"):
    def score(self, scene, candidates):
        base = scene.queued
        while base.base is not None:
            base = base.base
        base[:] = -1.0
        return np.ones(scene.n_slots)


class Looks(Filter, frozen=True, tag="looks"):
    def keep(self, scene, candidates):
        return candidates & (time.time() > 0)


class Reads(Fetcher, frozen=True, tag="reads"):
    provides = "reads"

    def fetch(self, scene):
        with open(pathlib.Path(__file__)) as file:  # noqa: PTH123
            return np.full(scene.n_slots, float(bool(file.read(1))))


class Draws(Scorer, frozen=True, tag="draws"):
    def score(self, scene, candidates):
        return np.random.random(scene.n_slots)  # noqa: NPY002


class LooksUp(Scorer, frozen=True, tag="looks-up"):
    def score(self, scene, candidates):
        return np.full(scene.n_slots, len(scene.id) / 100)


class Loops(Filter, frozen=True, tag="loops"):
    def keep(self, scene, candidates):
        pairs = [(a, b) for a in range(scene.n_slots) for b in range(scene.n_slots)]
        return candidates & (len(pairs) > 0)


class TooMuch(Scorer, frozen=True, tag="too-much"):
    def score(self, scene, candidates):
        return scene.queued


class TooFew(Filter, frozen=True, tag="too-few"):
    def keep(self, scene, candidates):
        return np.array([True])


class Anybody(Picker, frozen=True, tag="anybody"):
    def chances(self, scene, scores):
        return np.full(len(scores), 1.0 / len(scores))


class Boasts(Picker, frozen=True, tag="boasts"):
    def chances(self, scene, scores):
        return np.isfinite(scores).astype(float)


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (Remembers(), conformance.says_the_same_again),
        (Writes(), conformance.writes_nothing),
        (Looks(), conformance.asks_nobody),
        (Reads(), conformance.asks_nobody),
        (Draws(), conformance.asks_nobody),
        (LooksUp(), conformance.knows_no_request_by_its_id),
        (Loops(), conformance.is_bounded),
        (TooMuch(), conformance.scores_between_0_and_1),
        (TooFew(), conformance.keeps_true_or_false),
        (Anybody(), conformance.tells_every_chance),
        (Boasts(), conformance.tells_every_chance),
        (NewestFirst(), conformance.starves_nobody),
    ],
    ids=lambda value: getattr(value, "label", None) or value.__name__,
)
def test_what_breaks_a_rule_is_caught(broken, rule):
    """Each rule can fail: somebody who breaks just this is found out."""
    assert rule in rules(type(broken))
    with pytest.raises((AssertionError, ValueError)):
        rule(broken)


def test_a_weight_of_nothing_is_not_asked():
    """I10 has teeth: the scorer without weight that the rule makes raises when it is asked."""
    loud = conformance._off(Warmth())

    with pytest.raises(AssertionError, match="no weight and is asked"):
        structs.replace(loud, weight=1.0).score(None, None)
