"""A new leader that takes over a snapshot predicts, and shares, as the old one did; nonsense is a cold start."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import fairness
from scheduler.core import CoreSettings, Scheduler
from scheduler.events import Arrived, Assign, Recovered
from scheduler.fairness import KEPT_MAX, Accounts, FairnessSettings, Given
from scheduler.learned import Learned
from scheduler.ledger import Ledger
from scheduler.predict import Predictor
from scheduler.view import Snapshot
from scheduler.wire.client import Request
from scheduler.wire.worker import Beat, Reward

HARDWARE = ("a100", "l4", "abacus")
BEATS = [
    Beat(endpoint=f"e{i}", epoch=1, hardware=name, link_gbps=100.0)
    for i, name in enumerate(HARDWARE)
]
LESSONS = st.lists(
    st.tuples(
        st.integers(0, len(HARDWARE) - 1),
        st.floats(1, 30_000),  # tokens
        st.floats(0, 1.0),  # predicted wait
        st.floats(1e-3, 50.0),  # seconds
        st.sampled_from(["whole", "decode"]),
    ),
    max_size=90,
)


def opened() -> Predictor:
    made = Predictor()
    for slot, beat in enumerate(BEATS):
        made.open(slot, beat)
    return made


def taught(lessons) -> Predictor:
    made = opened()
    for slot, tokens, start_s, seconds, leg in lessons:
        if leg == "whole":
            features = made.features(
                slot, tokens=tokens, pairs=tokens**2 / 2, decode_kv=1e4, start_s=start_s
            )
        else:
            features = made.transfer.features(own=tokens * 1e5, ahead=0.0, step_s=0.02, link=1e10)
        reward = Reward(
            id="r",
            endpoint=f"e{slot}",
            epoch=1,
            attempt=1,
            outcome="completed",
            model="m",
            leg=leg,
            prompt_tokens=int(tokens),
            output_tokens=7,
            tpot_s=0.02,
            predicted_s=max(1e-3, tokens / 1e4),
            pulled_at=10.0,
            first_token_at=10.0 + seconds,
            features=features,
        )
        made.learn(reward, slot)
        made.pace.learn(slot, made.pace.row(slot, 4.0, 1e4, 0.0), seconds / 100)
    return made


def said(made: Predictor) -> list[object]:
    """All that a plan asks of it."""
    n = len(HARDWARE)
    ones = np.ones(n)
    rates, load = made.rates(1e4 * ones), made.pace.load(4 * ones, 1e4 * ones, 100.0)
    told = [
        *(rates.overhead_s, rates.token_s, rates.pair_s),
        *(load.joined_s, load.sequence_s, load.token_s, load.alone_s),
        made.transfer.seconds(1e9 * ones, 0 * ones, 0.02 * ones, 1e10 * ones),
        made.transfer.links,
    ]
    return [
        *(one.tolist() for one in told),
        [made.odds(start_s, 0.1) for start_s in (0.0, 0.1, 1.0)],
        [made.features(0, tokens=9, pairs=9, decode_kv=0, start_s=s) for s in (0.0, 0.1, 1.0)],
        made.pace.noise(),
        made.lengths.answer("m"),
        made.guard.distrusted.tolist(),
    ]


@settings(max_examples=30)
@given(lessons=LESSONS, is_open=st.booleans())
def test_restored_it_predicts_as_it_did(lessons, is_open):
    """To the last bit, by way of JSON, whether endpoints are heard before or after."""
    old = taught(lessons)
    learned = msgspec.json.decode(msgspec.json.encode(old.export(())), type=Learned)
    new = opened() if is_open else Predictor()

    assert new.restore(learned)
    if not is_open:
        for slot, beat in enumerate(BEATS):
            new.open(slot, beat)

    assert said(new) == said(old)
    assert new.export(()).prefill == old.export(()).prefill


BROKEN = st.sampled_from(
    ["prefill", "transfer", "pace", "moment", "weights", "endpoints", "windows", "version"]
)


@settings(max_examples=24)
@given(part=BROKEN, nonsense=st.sampled_from([math.nan, math.inf, -1e9]))
def test_nonsense_is_refused_and_changes_nothing(part, nonsense):
    """A snapshot comes from Redis: what is no precision, speed or layout leaves the start cold."""
    plain = msgspec.to_builtins(taught([(0, 100.0, 0.0, 1.0, "whole")] * 3).export(()))
    match part:
        case "prefill" | "transfer" | "pace":
            plain[part]["precision"] = [nonsense, *plain[part]["precision"][1:]]
        case "moment":
            plain["transfer"]["moment"] = plain["transfer"]["moment"][1:]
        case "weights":
            plain["prefill"]["weights"] = [nonsense, *plain["prefill"]["weights"][1:]]
        case "endpoints":
            plain["endpoints"]["e0"]["link"] = (nonsense, 1.0)
        case "windows":
            plain["windows"]["spread:0"] = (nonsense if nonsense != -1e9 else math.nan,)
        case "version":
            plain["version"] = 0
    cold = opened()

    assert not cold.restore(msgspec.convert(plain, Learned))

    assert said(cold) == said(opened())


QUANTUM = 1000
SHARED = CoreSettings(fairness=FairnessSettings(quantum_tokens=QUANTUM, weights={"b": 2.0}))
WORK = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 4000), st.booleans()), min_size=1, max_size=30
)


@settings(max_examples=40)
@given(work=WORK)
def test_a_new_leader_goes_on_with_the_accounts(work):
    """Who has had how much, and how much KV is taken, is the same after a takeover, what workers hold included."""
    old = Scheduler(SHARED, np.random.default_rng(0))
    old.receive(beat := Beat(endpoint="e0", epoch=1, models=("m",), max_num_seqs=64), 0.0)
    requests = {
        f"r{i}": Request(id=f"r{i}", model="m", tenant=tenant, prompt_tokens=tokens)
        for i, (tenant, tokens, _) in enumerate(work)
    }
    for at, request in enumerate(requests.values()):
        old.receive(Arrived(request=request, entry=f"{at}-0", enqueued_at=0.0), 0.0)
    held = {c.job.id: c.job for c in old.decide(1.0) if isinstance(c, Assign)}
    for job, (_, _, is_over) in zip(list(held.values()), work, strict=False):
        if is_over:
            del held[job.id]
            old.receive(_completed(job), 2.0)
    snapshot = msgspec.json.decode(msgspec.json.encode(old.snapshot()), type=Snapshot)

    new = Scheduler(SHARED, np.random.default_rng(1))
    new.restore(snapshot)
    new.receive(beat, 3.0)
    for job in held.values():
        request = requests[job.id]
        recovered = Recovered(
            request=request, entry=job.entry, enqueued_at=0.0, attempt=1, endpoint="e0", epoch=1
        )
        new.receive(recovered, 3.0)

    assert _ledger(new).kv.tolist() == _ledger(old).kv.tolist()
    present = {requests[one].tenant for one in held}
    had, again = (_accounts(core) for core in (old, new))
    for tenant in "abc":
        # Below a newcomer's account is as good as one: whoever comes back begins there.
        was = max(had.had(tenant), had._start if tenant not in present else 0.0)
        assert again.had(tenant) == pytest.approx(was, abs=1e-6)


@given(work=WORK, later=WORK)
def test_a_new_leader_goes_on_with_the_standings(work, later):
    """Whose promises count less for use beyond its share is the same after a takeover, and goes on alike from there."""
    old, new = Accounts(SHARED.fairness), Accounts(SHARED.fairness)
    for tenant, tokens, is_large in work:
        old.charge(tenant, tokens * (100.0 if is_large else 1.0))
        old.settle(tenant, is_kept=is_large)

    new.restore(msgspec.json.decode(msgspec.json.encode(old.export([])), type=Given))

    for tenant, tokens, _ in [("a", 0, False), *later]:
        for accounts in (old, new):
            accounts.charge(tenant, tokens)
        for one in "abc":
            assert new.standing(one) == pytest.approx(old.standing(one), rel=1e-6)


def _accounts(core: Scheduler) -> Accounts:
    return core._memory.book.lines.by_tenant.accounts


def _ledger(core: Scheduler) -> Ledger:
    return core._memory.book.ledger


def _completed(job) -> Reward:
    return Reward(
        id=job.id,
        endpoint="e0",
        epoch=1,
        attempt=1,
        outcome="completed",
        prompt_tokens=job.prompt_tokens,
        output_tokens=256,
    )


def test_accounts_in_a_snapshot_are_bounded():
    """Those who have had most are kept; made-up names cannot swell it, nor numbers that are none."""
    accounts = Accounts(FairnessSettings(quantum_tokens=QUANTUM))
    for number in range(2 * KEPT_MAX):
        accounts.join(f"t{number}")
        accounts.charge(f"t{number}", float(number))

    given_ = accounts.export([])

    assert len(given_.had) == KEPT_MAX
    assert min(given_.had.values()) == KEPT_MAX
    assert (len(given_.recent), min(given_.recent)) == (KEPT_MAX, f"t{KEPT_MAX}")
    assert given_.is_sound()
    assert not Given(had={"a": math.nan}).is_sound()
    assert not Given(recent={"a": -1.0}).is_sound()
    assert not Given(had=dict.fromkeys(map(str, range(KEPT_MAX + 1)), 1.0)).is_sound()
    assert max(given_.had.values()) <= fairness.LEAD_MAX * QUANTUM
