"""What every plug-in must keep, built in or from elsewhere. One file that needs nothing but Headgate: take it along.

    import conformance, pytest
    from warmth import Warmth

    @pytest.mark.parametrize("rule", conformance.rules(Warmth), ids=lambda rule: rule.__name__)
    def test_conforms(rule):
        rule(Warmth(half_s=30.0))

A rule is a function of one plug-in that raises AssertionError and says what is wrong. A part that reads columns of a
fetcher of its own is handed to `conformance.with_fetchers(part, Fetcher())` first.
"""

import builtins
import inspect
import itertools
import math
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from unittest import mock

import msgspec
import numpy as np
from msgspec import structs

from scheduler.policies import Policy
from scheduler.profile import profile
from scheduler.profile.casting import Assembly, fetched, read_only
from scheduler.profile.fetchers import BUILT_IN as FETCHERS
from scheduler.profile.fetchers import WORTH
from scheduler.profile.parts import Fetcher, Filter, Part, Picker, Scorer
from scheduler.profile.profile import Profile
from scheduler.profile.scene import Scene
from scheduler.profile.scorers import Queue
from scheduler.wire.worker import Beat

SIZES = (1, 2, 7, 40)
"Slots of the scenes below."

STEPS_A_SLOT, STEPS_BESIDES = 60, 3000
"The most bytecode instructions a part may run: for each slot, and besides. Arrays need hardly any for a slot."

Rule = Callable[[Part], None]


def rules(kind: type) -> tuple[Callable[..., None], ...]:
    """The rules for a kind of plug-in."""
    if issubclass(kind, Policy):
        return POLICY_RULES
    assert issubclass(kind, Part), f"{kind} is no plug-in"
    own = next(found for base, found in OWN_RULES.items() if issubclass(kind, base))
    return (*PART_RULES, *own)


_own_fetchers: dict[str, tuple[Fetcher, ...]] = {}


def with_fetchers(part: Part, *fetchers: Fetcher) -> Part:
    """The same part; the scenes that its rules show have these fetchers' columns as well."""
    _own_fetchers[repr(part)] = fetchers
    return part


# For every part


def is_chosen_by_its_name(part: Part) -> None:
    """Its tag is its name, its fields are its settings, and a setting that it has not is refused."""
    table = msgspec.to_builtins(part)
    place = next(p for p, base in profile.KINDS.items() if isinstance(part, base))
    plug_ins = [kind for kind in (type(part),) if kind not in profile.BUILT_IN]
    value = table if place == "picker" else [table]
    made = profile.decode(_readable(part, {place: value}), (*plug_ins, *_fetcher_kinds(part)))
    assert part in made.parts, f"{part.label} read from {table} is {made.parts}"
    try:
        msgspec.convert({**table, "no_such_setting": 1}, type(part))
    except msgspec.ValidationError:
        return
    raise AssertionError(f"{part.label} takes a setting that it has not")


def is_frozen_and_named(part: Part) -> None:
    """Nothing can be kept in it between two calls."""
    config = type(part).__struct_config__
    assert config.frozen, f"{part.label} can be changed, wanted frozen=True"
    assert not hasattr(part, "__dict__"), f"{part.label} has a __dict__, where state can hide"
    assert config.tag_field == "name", f"{part.label} is named by {config.tag_field!r}"


def says_the_same_again(part: Part) -> None:
    """Pure: the same scene gives the same answer, whatever was asked between."""
    for scene, other in itertools.pairwise(scenes(part)):
        first = _answer(part, scene)
        _answer(part, other)
        assert _answer(part, scene) == first, f"{part.label} remembers what it was asked before"


def writes_nothing(part: Part) -> None:
    """Neither into its scene, however it is reached, nor into itself."""
    for scene in scenes(part):
        before, own = _digest(scene), msgspec.to_builtins(part)
        _answer(part, scene)
        assert _digest(scene) == before, f"{part.label} writes into its scene"
        assert msgspec.to_builtins(part) == own, f"{part.label} changes its own settings"


def asks_nobody(part: Part) -> None:
    """No clock, no file, no socket, no chance but what it is handed: all it may know stands in the scene (I7)."""
    global_draws = random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    for scene in scenes(part):
        with _alone(part):
            _answer(part, scene)
    after = random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    assert after == global_draws, f"{part.label} draws from a generator that it was not handed"


def knows_no_request_by_its_id(part: Part) -> None:
    """I7: what an id could be looked up for is nothing that a server knows."""
    for scene in scenes(part):
        renamed = structs.replace(scene, id=scene.id + "-renamed")
        assert _answer(part, scene) == _answer(part, renamed), f"{part.label} goes by request ids"


def is_bounded(part: Part) -> None:
    """I8, by counting: its steps grow with the slots, and no faster; arrays do the work."""
    for n_slots in (16, 256):
        [scene] = scenes(part, sizes=(n_slots,), seeds=(1,))
        steps = _steps(lambda scene=scene: _answer(part, scene))
        allowed = STEPS_BESIDES + STEPS_A_SLOT * n_slots
        assert steps <= allowed, f"{part.label} takes {steps} steps at {n_slots} slots, {allowed=}"


def changes_nothing_where_it_is_off(part: Part) -> None:
    """I10: without a weight, unread or unlisted it is not asked, and the choice is as without it."""
    plain = made = Profile(scorers=(Queue(),))
    if isinstance(part, Scorer):
        made = structs.replace(plain, scorers=(Queue(), _off(part)))
    elif isinstance(part, Fetcher):
        made = structs.replace(plain, fetchers=(part,))
    for scene in scenes(part):
        assert _choice(made, scene) == _choice(plain, scene), f"{part.label} is off and counts"


# For each kind


def fetches_a_column(part: Fetcher) -> None:
    """One number a slot, under a name."""
    assert part.provides, f"{part.label} provides no column, wanted its name"
    for scene in scenes(part):
        column = part.fetch(scene)
        assert column.shape == (scene.n_slots,), f"{part.label}: {column.shape} of {scene.n_slots}"
        assert column.dtype == np.float64, f"{part.label}: {column.dtype}, wanted float64"
        assert not np.isnan(column).any(), f"{part.label} says nan"


def keeps_true_or_false(part: Filter) -> None:
    """One answer a slot; what it says of who is no candidate does not matter."""
    for scene in scenes(part):
        for candidates in _candidates(scene):
            kept = part.keep(scene, candidates)
            assert kept.shape == (scene.n_slots,), f"{part.label}: {kept.shape} of {scene.n_slots}"
            assert kept.dtype == np.bool_, f"{part.label}: {kept.dtype}, wanted bool"


def scores_between_0_and_1(part: Scorer) -> None:
    """One number a slot; of the candidates each from 0 to 1."""
    for scene in scenes(part):
        for candidates in _candidates(scene):
            scores = part.score(scene, candidates)
            assert scores.shape == (scene.n_slots,), f"{part.label}: {scores.shape}"
            assert scores.dtype == np.float64, f"{part.label}: {scores.dtype}, wanted float64"
            seen = scores[candidates]
            assert ((seen >= 0) & (seen <= 1)).all(), f"{part.label}: {seen}, wanted 0 to 1"


def tells_every_chance(part: Picker) -> None:
    """One for each slot, together 1, and none for who is no candidate; off-policy estimates divide by them."""
    for scene, scores in _scored(part):
        chances = part.chances(scene, scores)
        assert chances.shape == scores.shape, f"{part.label}: {chances.shape} of {scores.shape}"
        assert chances.dtype == np.float64, f"{part.label}: {chances.dtype}, wanted float64"
        told = f"{part.label} says {chances} of {scores}"
        assert not chances[scores == -np.inf].any(), f"{told}, wanted 0 where the score is -inf"
        assert (chances >= 0).all(), f"{told}, wanted no chance below 0"
        assert math.isclose(chances.sum(), 1.0, abs_tol=1e-9), f"{told}, wanted a sum of 1"


# For policies


def ranks_finitely_and_the_same_each_time(policy: Policy) -> None:
    """I6: a rank is a pure, finite number, with or without a promise."""
    for due_at, priority in itertools.product((5.0, math.inf), (-3, 0, 3)):
        asked = {"enqueued_at": 1.0, "due_at": due_at, "priority": priority, "work_s": 0.1}
        rank = policy.rank(**asked)
        assert math.isfinite(rank), f"{policy.label} ranks {asked} at {rank}"
        assert rank == policy.rank(**asked), f"{policy.label} ranks {asked} twice differently"


def starves_nobody(policy: Policy) -> None:
    """Whoever waits is passed in the end: late enough newcomers rank behind, whatever their priority."""
    old = policy.rank(enqueued_at=0.0, due_at=math.inf, priority=-3, work_s=0.1)
    new = policy.rank(enqueued_at=1e4, due_at=1e4 + 0.1, priority=3, work_s=0.1)
    assert new > old, f"{policy.label}: one who came 10,000 s later still goes first"


def asks_for_sane_terms(policy: Policy) -> None:
    """Odds and shares are parts of one."""
    terms = policy.terms
    assert 0 <= terms.odds_min <= 1, f"{policy.label}: odds_min is {terms.odds_min}"
    assert 0 <= terms.aside_share <= 1, f"{policy.label}: aside_share is {terms.aside_share}"


PART_RULES: tuple[Rule, ...] = (
    is_chosen_by_its_name,
    is_frozen_and_named,
    says_the_same_again,
    writes_nothing,
    asks_nobody,
    knows_no_request_by_its_id,
    is_bounded,
    changes_nothing_where_it_is_off,
)
OWN_RULES: dict[type[Part], tuple[Callable[..., None], ...]] = {
    Fetcher: (fetches_a_column,),
    Filter: (keeps_true_or_false,),
    Scorer: (scores_between_0_and_1,),
    Picker: (tells_every_chance,),
}
POLICY_RULES = (ranks_finitely_and_the_same_each_time, starves_nobody, asks_for_sane_terms)


# Scenes


def scenes(
    part: Part, sizes: tuple[int, ...] = SIZES, seeds: tuple[int, ...] = (0, 1, 2)
) -> list[Scene]:
    """Fleets of all sizes, idle and full, with empty slots and slots where the request may not go."""
    found = []
    for n_slots, seed in itertools.product(sizes, seeds):
        rng = np.random.default_rng([n_slots, seed])
        columns = {WORTH: read_only(rng.uniform(-1.0, 1.0, n_slots))}
        makers = [kind() for kind in FETCHERS] + list(_own_fetchers.get(repr(part), ()))
        found.append(fetched(makers, _scene(rng, n_slots, is_idle=seed == 0), columns))
    return found


def _scene(rng: np.random.Generator, n_slots: int, *, is_idle: bool) -> Scene:
    def numbers(top: float) -> np.ndarray:
        return read_only(np.zeros(n_slots) if is_idle else rng.uniform(0.0, top, n_slots).round(3))

    def moments() -> np.ndarray:
        return read_only(np.where(rng.random(n_slots) < 0.5, -np.inf, 1000.0 - numbers(60.0)))

    eligible = rng.random(n_slots) < 0.8
    eligible[0] = True
    hardware = ("a100", "h100", "")
    beats = tuple(
        Beat(endpoint=f"e{slot}", epoch=1, models=("m",), hardware=hardware[slot % 3])
        if slot == 0 or rng.random() < 0.9
        else None
        for slot in range(n_slots)
    )
    eligible &= np.array([beat is not None for beat in beats])
    first_token_s = np.where(eligible, numbers(8.0) + 0.01, np.inf)
    return Scene(
        id=f"r{n_slots}",
        model="m",
        tenant="t",
        session="" if is_idle else "s",
        priority=0,
        weight=1.0,
        prompt_tokens=1000.0,
        output_tokens=200.0,
        left_s=math.inf if is_idle else 2.0,
        tpot_s=None if is_idle else 0.05,
        pressed=1.0 if is_idle else 0.5,
        beats=beats,
        eligible=read_only(eligible),
        work_s=numbers(1.0),
        first_token_s=read_only(first_token_s),
        cached_tokens=numbers(999.0),
        busy_s=numbers(7.0),
        queued=read_only(numbers(9.0).round()),
        unbegun=numbers(4.0),
        queued_tokens=numbers(20_000.0),
        running=read_only(numbers(90.0).round()),
        kv_used=numbers(1.0),
        session_slot=-1 if is_idle else 0,
        given_at=moments(),
        cold_at=moments(),
        model_at=moments(),
        now=1000.0,
        data=MappingProxyType({}),
    )


def _candidates(scene: Scene) -> Iterator[np.ndarray]:
    """All who are eligible, and each alone of the first three."""
    yield read_only(scene.eligible)
    for slot in scene.eligible.nonzero()[0][:3]:
        alone = np.zeros(scene.n_slots, dtype=bool)
        alone[slot] = True
        yield read_only(alone)


def _scored(part: Part) -> Iterator[tuple[Scene, np.ndarray]]:
    for number, scene in enumerate(scenes(part)):
        rng = np.random.default_rng(number)
        for scores in (rng.random(scene.n_slots), np.ones(scene.n_slots), np.zeros(scene.n_slots)):
            for candidates in _candidates(scene):
                yield scene, read_only(np.where(candidates, scores, -np.inf))


# Asking


def _answer(part: Part, scene: Scene) -> bytes:
    """What the part says, as bytes."""
    if isinstance(part, Fetcher):
        return part.fetch(scene).tobytes()
    if isinstance(part, Filter):
        return part.keep(scene, scene.eligible).tobytes()
    if isinstance(part, Scorer):
        return part.score(scene, scene.eligible).tobytes()
    assert isinstance(part, Picker), f"{part} is no part of a profile"
    scores = read_only(np.where(scene.eligible, 0.5, -np.inf))
    return part.chances(scene, scores).tobytes()


def _choice(made: Profile, scene: Scene) -> list[float]:
    assembly = Assembly(made)
    chances: list[float] = assembly.chances(scene, assembly.scores(scene, scene.eligible)).tolist()
    return chances


def _off(part: Part) -> Part:
    """A scorer without weight that would spoil the choice if it were asked."""

    class Loud(type(part), frozen=True, tag=f"{part.label}-off"):  # type: ignore[misc]
        def score(self, scene: Scene, candidates: np.ndarray) -> np.ndarray:
            raise AssertionError(f"{self.label} has no weight and is asked")

    fields = {name: getattr(part, name) for name in type(part).__struct_fields__}
    return Loud(**{**fields, "weight": 0.0})


def _digest(scene: Scene) -> tuple[object, ...]:
    arrays = [*(getattr(scene, name) for name in scene.__struct_fields__), *scene.data.values()]
    return tuple(a.tobytes() if isinstance(a, np.ndarray) else repr(a) for a in arrays)


def _readable(part: Part, table: dict[str, object]) -> dict[str, object]:
    """The table with the fetchers whose columns the part reads."""
    own = [msgspec.to_builtins(one) for one in _own_fetchers.get(repr(part), ())]
    return {"fetchers": own, **table} if own else table


def _fetcher_kinds(part: Part) -> list[type[Part]]:
    return [type(one) for one in _own_fetchers.get(repr(part), ())]


@contextmanager
def _alone(part: Part) -> Iterator[None]:
    """While the part runs, whoever asks the world is refused."""

    def refused(what: str) -> Callable[..., None]:
        def refuse(*_: object, **__: object) -> None:
            raise AssertionError(f"{part.label} asks for {what}")

        return refuse

    clocks = ("time", "monotonic", "perf_counter", "time_ns", "monotonic_ns", "perf_counter_ns")
    with ExitStack() as stack:
        for clock in clocks:
            stack.enter_context(mock.patch.object(time, clock, refused("the time")))
        stack.enter_context(mock.patch.object(builtins, "open", refused("a file")))
        stack.enter_context(mock.patch.object(socket, "socket", refused("a socket")))
        yield


def _steps(call: Callable[[], object]) -> int:
    """Bytecode instructions run in this call, whoever's."""
    steps = 0

    def count(frame: object, event: str, _: object) -> object:
        nonlocal steps
        frame.f_trace_opcodes = True  # type: ignore[attr-defined]
        steps += event == "opcode"
        return count

    assert inspect.isfunction(call), "wanted something to call"
    before = sys.gettrace()
    sys.settrace(count)  # type: ignore[arg-type]
    try:
        call()
    finally:
        sys.settrace(before)
    return steps
