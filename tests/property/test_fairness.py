"""Tenants share by weight, nobody starves, nothing idles for it, and switched off it changes nothing."""

import itertools
import math
from collections import Counter

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler import recording
from scheduler.core import CoreSettings, Scheduler
from scheduler.events import Arrived, Assign
from scheduler.fairness import (
    IDLE_MAX,
    RATED_S,
    SETTLED,
    SHORT,
    Accounts,
    FairnessSettings,
)
from scheduler.order import SPARE_S, Lines
from scheduler.queue import by_rank
from scheduler.slo import Promise
from scheduler.state import Ticket
from scheduler.wire.client import Request
from scheduler.wire.worker import Beat, Reward

FREE = Promise(ttft_s=None, tpot_s=None, deadline_at=None, priority=0, weight=1.0, refuse_at=None)

QUANTUM = 1000
LONGEST = 400
"Tokens of service of the largest request below."

names = st.sampled_from("abc")
weights = st.dictionaries(names, st.sampled_from([0.5, 1.0, 2.0, 4.0]))


def ticket(number: int, tenant: str, rank: float, tokens: int = LONGEST) -> Ticket:
    return Ticket(
        state="waiting",
        request=Request(id=f"r{number}", model="m", tenant=tenant),
        entry="1-0",
        enqueued_at=0.0,
        promise=FREE,
        prompt_tokens=tokens,
        output_tokens=0,
        due_at=math.inf,
        rank=rank,
        max_attempts=3,
    )


def lines_of(weights: dict[str, float], quantum: int = QUANTUM) -> Lines:
    return Lines(Accounts(FairnessSettings(quantum_tokens=quantum, weights=weights)))


def give(lines: Lines, ticket: Ticket) -> None:
    """It is handed over."""
    lines.remove(ticket)
    lines.charge(ticket, ticket.prompt_tokens, 0)


@given(weights=weights, data=st.data(), steps=st.integers(50, 150))
def test_shares_are_by_weight_while_all_wait(weights, data, steps):
    """Whatever ranks and sizes: no two who always wait differ by more than a quantum and a request each."""
    lines, numbers = lines_of(weights), itertools.count()
    had = dict.fromkeys("abc", 0.0)
    urgent = data.draw(names)
    sizes = data.draw(st.fixed_dictionaries({t: st.integers(1, LONGEST) for t in "abc"}))

    def enqueue(tenant):
        rank = -1e9 if tenant == urgent else data.draw(st.sampled_from([0.0, 1.0]))
        lines.add(ticket(next(numbers), tenant, rank, sizes[tenant]))

    for tenant in "abcabc":  # two each, so that nobody's line ever ends
        enqueue(tenant)
    for _ in range(steps):
        chosen = lines.waiting.head(1)[0]
        give(lines, chosen)
        tenant = chosen.request.tenant
        had[tenant] += chosen.prompt_tokens / weights.get(tenant, 1.0)
        enqueue(tenant)

    for one, other in itertools.permutations("abc", 2):
        longest = max(sizes[t] / weights.get(t, 1.0) for t in (one, other))
        assert had[one] - had[other] <= QUANTUM + longest


@given(weights=weights, urgent=st.integers(1, 5), data=st.data())
def test_who_waits_is_passed_by_a_bounded_amount(weights, urgent, data):
    """Others, more urgent for ever, get at most two quanta and a request each before a tenant has its turn."""
    lines, numbers = lines_of(weights), itertools.count()
    before = data.draw(st.lists(names, max_size=20))
    for tenant in before:  # some history
        lines.add(ticket(next(numbers), tenant, 0.0))
        give(lines, lines.waiting.head(1)[0])
    lines.add(ticket(next(numbers), "a", 1e9))
    others = [f"t{i}" for i in range(urgent)]
    passed = dict.fromkeys(others, 0.0)
    for tenant in others:
        lines.add(ticket(next(numbers), tenant, 0.0))

    for _ in range(10_000):
        chosen = lines.waiting.head(1)[0]
        if chosen.request.tenant == "a":
            break
        give(lines, chosen)
        passed[chosen.request.tenant] += chosen.prompt_tokens
        lines.add(ticket(next(numbers), chosen.request.tenant, 0.0))

    lead = lines.by_tenant.accounts.had("a")
    assert chosen.request.tenant == "a"
    assert max(passed.values()) <= lead + 2 * QUANTUM + LONGEST


@given(
    weights=weights,
    rows=st.lists(st.tuples(names, st.floats(0, 9), st.integers(0, LONGEST)), max_size=30),
    had=st.dictionaries(names, st.integers(0, 3 * QUANTUM)),
    count=st.integers(0, 40),
)
def test_nobody_who_waits_is_left_out(weights, rows, had, count):
    """Work conservation: the line is all who wait, each once, and each tenant's own order is the policy's."""
    lines = lines_of(weights)
    for number, (tenant, rank, tokens) in enumerate(rows):
        lines.add(ticket(number, tenant, rank, tokens))
    for tenant, service in had.items():
        lines.by_tenant.charge(tenant, service)

    order = lines.waiting.head(len(rows))

    assert sorted(t.id for t in order) == sorted(f"r{i}" for i in range(len(rows)))
    assert lines.waiting.head(count) == order[:count]
    assert lines.waiting.joined(order, []) == order
    for tenant in "abc":
        own = [t for t in order if t.request.tenant == tenant]
        assert own == sorted(own, key=by_rank)


@given(
    weights=weights,
    rows=st.lists(st.tuples(names, st.floats(0, 9), st.integers(1, LONGEST)), max_size=30),
    quantum=st.sampled_from([100, QUANTUM]),
)
def test_the_line_is_the_order_in_which_they_are_given(weights, rows, quantum):
    """Looked at together they stand as one by one: whoever is named counts as having had what it will cost."""
    lines = lines_of(weights, quantum)
    for number, (tenant, rank, tokens) in enumerate(rows):
        one = ticket(number, tenant, rank, tokens)
        one.output_tokens = tokens % 7
        lines.add(one)
    together, one_by_one = lines.waiting.head(len(rows)), []

    while lines.waiting:
        [first] = lines.waiting.head(1)
        lines.remove(first)
        lines.charge(first, first.prompt_tokens, first.output_tokens)
        one_by_one.append(first)

    assert [t.id for t in together] == [t.id for t in one_by_one]


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(0, LONGEST)), max_size=30))
def test_a_tenant_alone_has_the_policys_order(rows):
    """With nobody to share with, the line is what it is without fairness."""
    plain, shared = Lines(), lines_of({})
    for number, (rank, tokens) in enumerate(rows):
        plain.add(ticket(number, "a", rank, tokens))
        shared.add(ticket(number, "a", rank, tokens))

    assert [t.id for t in shared.waiting.head(99)] == [t.id for t in plain.waiting.head(99)]


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "give", "take_back", "set_aside", "drop"]), names),
        max_size=60,
    )
)
def test_seats_follow_whatever_happens(turns):
    """The kept order of tenants, and whose line is the longest, are as if made anew, after any sequence of turns."""
    lines, numbers, given_out = lines_of({"a": 2.0}, quantum=500), itertools.count(), []
    for what, tenant in turns:
        waiting = lines.waiting.head(1)
        if what == "add":
            lines.add(ticket(next(numbers), tenant, float(next(numbers) % 7)))
        elif what == "take_back" and given_out:
            back = given_out.pop()
            lines.charge(back, 0, 0)
            lines.add(back)
        elif waiting and what == "give":
            give(lines, waiting[0])
            given_out.append(waiting[0])
        elif waiting and what == "set_aside":
            lines.set_aside(waiting[0])
        elif waiting and what == "drop":
            lines.remove(waiting[0])
        assert lines.waiting.head(1) == lines.by_tenant.joined(list(lines.waiting), [])[:1]

    line, tenants = list(lines.waiting), lines.by_tenant
    assert [t.id for t in lines.waiting.head(99)] == [t.id for t in tenants.joined(line, [])]
    assert len(tenants) == len(line)
    assert all(tenants.accounts.had(t) >= 0 for t in "abc")
    lengths = Counter(t.request.tenant for t in [*line, *lines.aside])
    longest = max(
        ((n / (2.0 if t == "a" else 1.0), t) for t, n in lengths.items()), default=(0, "")
    )
    last = lines.longest.last("nobody")
    assert (last.request.tenant if last else "") == (longest[1] if longest[0] > 1 else "")


def test_what_was_left_unused_is_no_claim_later():
    """A tenant that comes back after a quiet hour shares from now on, and takes nothing for the hour."""
    lines, numbers = lines_of({}), itertools.count()
    for _ in range(100):
        lines.add(ticket(next(numbers), "busy", 0.0))
        give(lines, lines.waiting.head(1)[0])
    for _ in range(40):
        lines.add(ticket(next(numbers), "busy", 0.0))
        lines.add(ticket(next(numbers), "new", 0.0))
    got = []
    for _ in range(40):
        got.append(lines.waiting.head(1)[0])
        give(lines, got[-1])

    assert abs(sum(t.request.tenant == "new" for t in got) - 20) <= 2 * QUANTUM / LONGEST


def test_accounts_are_bounded():
    """However many names are made up, so many accounts are kept and no more."""
    accounts = Accounts(FairnessSettings(quantum_tokens=10))
    for number in range(2 * IDLE_MAX):
        accounts.join(f"t{number}")
        accounts.charge(f"t{number}", 5000.0 if number == 0 else 50.0)

    assert len(accounts) <= IDLE_MAX + 1
    assert accounts.had("t0") == 1000.0, "who has had most is not forgotten for made-up names"


@given(
    weights=weights,
    charges=st.lists(st.tuples(names, st.floats(-500, 5e4)), max_size=60),
    over_worth=st.sampled_from([0.1, 0.5]),
)
def test_a_standing_is_lost_by_use_beyond_the_share_alone(weights, charges, over_worth):
    """Whatever was charged: somebody has a full standing, no one less than `over_worth`, and more use is no more standing."""
    settings = FairnessSettings(quantum_tokens=QUANTUM, weights=weights, over_worth=over_worth)
    accounts = Accounts(settings)
    for tenant, service in charges:
        accounts.charge(tenant, service)
    come_short(accounts)

    standings = {tenant: accounts.standing(tenant) for tenant in "abc"}
    assert all(over_worth <= one <= 1.0 for one in standings.values())
    assert max(standings.values()) > 1 - 1e-6
    for tenant in "abc":
        accounts.charge(tenant, 3 * QUANTUM)
        assert accounts.standing(tenant) <= standings[tenant] + 1e-9
        accounts.charge(tenant, -3 * QUANTUM)


@given(
    kept=st.lists(st.booleans(), max_size=200),
    others=st.lists(st.booleans(), max_size=200),
)
def test_who_is_beyond_its_share_counts_in_full_while_nobody_comes_short(kept, others):
    """As far as promises to those within theirs are missed it counts less; what becomes of its own says nothing."""
    accounts, worst = (
        Accounts(FairnessSettings(quantum_tokens=QUANTUM, over_worth=0.1)) for _ in range(2)
    )
    for one in (accounts, worst):
        for tenant in "aaab":
            one.charge(tenant, 10 * QUANTUM)
    come_short(worst)
    before, missed = 1.0, 0.0

    for is_kept in others:
        accounts.settle("a", is_kept=is_kept)
    assert accounts.standing("a") == before

    for is_kept in kept:
        accounts.settle("b", is_kept=is_kept)
        missed += ((not is_kept) - missed) / SETTLED
        standing = accounts.standing("a")
        assert standing >= before if is_kept else standing <= before
        before = standing
    assert (before == 1.0) == (missed == 0.0)
    assert (before == worst.standing("a")) == (missed >= SHORT)


def test_a_promise_is_settled_once():
    """Who is set aside comes short at once, whatever becomes of it; who makes it is said when that is known."""
    lines = lines_of({})
    late, kept = (ticket(number, "a", 0.0) for number in range(2))
    for one in (late, kept):
        lines.add(one)
    told = []
    lines.by_tenant.accounts.settle = lambda tenant, *, is_kept: told.append((tenant, is_kept))

    lines.set_aside(late)
    lines.take_up(late)
    lines.settle(late, is_kept=True)
    lines.settle(kept, is_kept=True)

    assert told == [("a", False), ("a", True)]


@given(
    weights=weights,
    dues=st.lists(st.floats(0, 600), min_size=1, max_size=20),
    rate=st.floats(1, 1000),
)
def test_who_can_wait_needs_its_turn_when_its_line_just_fits_before_it_is_due(weights, dues, rate):
    """All that its tenant waited for when it came, at its share of what the pool serves, and some seconds to spare."""
    lines = lines_of(weights)
    lines.pass_time(0.0)
    lines.by_tenant.charge("c", rate * RATED_S)
    lines.add(ticket(0, "b", 0.0))
    own, other = (weights.get(tenant, 1.0) for tenant in "ab")
    share = own / (own + other)

    line = 0
    for number, due_at in enumerate(dues, 1):
        one = ticket(number, "a", 0.0)
        one.due_at = due_at
        lines.add(one)
        line += one.prompt_tokens
        assert one.turn_at == pytest.approx(due_at - SPARE_S - line / (rate * share))


def test_who_can_wait_lets_others_pass_and_then_has_its_turn():
    """Though its tenant has had less: their promises are near. Who was promised no moment has no time to spare."""
    for due_at in (100.0, math.inf):
        lines = lines_of({})
        lines.pass_time(0.0)
        lines.by_tenant.charge("chat", 100 * QUANTUM)
        patient, urgent = ticket(0, "batch", 100.0), ticket(1, "chat", 1.0)
        patient.due_at, urgent.due_at = due_at, 1.0
        for one in (patient, urgent):
            lines.add(one)
        has_its_turn = [patient, urgent]

        first = has_its_turn if due_at == math.inf else has_its_turn[::-1]
        assert lines.waiting.head(2) == first == lines.waiting.joined([urgent], [patient])
        lines.pass_time(max(0.0, patient.turn_at))
        assert lines.waiting.head(2) == has_its_turn


def come_short(accounts):
    """Promises to one who has hardly had anything are missed."""
    for _ in range(10 * SETTLED):
        accounts.settle("nobody", is_kept=False)


def test_a_standing_recovers_and_can_be_switched_off():
    """Twice the share is seen, and forgotten once others had their turn; 1 counts all alike (I10)."""
    strict, off = (
        Accounts(FairnessSettings(quantum_tokens=QUANTUM, over_worth=over_worth))
        for over_worth in (0.1, 1.0)
    )
    for accounts in (strict, off):
        for tenant in "aaab":
            accounts.charge(tenant, 10 * QUANTUM)
        come_short(accounts)
    assert strict.standing("a") < 0.5 < 1.0 == strict.standing("b")
    assert off.standing("a") == 1.0

    for _ in range(100):
        for tenant in "aab":
            strict.charge(tenant, QUANTUM * (1 + (tenant == "b")))

    assert strict.standing("a") > 0.9


def test_the_answer_that_was_not_given_is_not_charged():
    """What the engine reports replaces what was predicted."""
    lines = lines_of({})
    one = ticket(0, "a", 0.0)
    lines.add(one)
    lines.remove(one)
    lines.charge(one, 400, 1000)
    lines.charge(one, 100, 3)

    assert lines.by_tenant.accounts.had("a") == 106


def test_a_tenant_is_charged_for_what_was_computed():
    """What its worker found cached, and whatever was predicted, is nobody's service."""
    core = Scheduler(
        CoreSettings(fairness=FairnessSettings(quantum_tokens=QUANTUM)), np.random.default_rng(0)
    )
    core.receive(Beat(endpoint="e", epoch=1, models=("m",)), 0.0)
    request = Request(id="r", model="m", tenant="a", prompt_tokens=900)
    core.receive(Arrived(request=request, entry="1-0", enqueued_at=0.0), 0.0)
    [command] = [c for c in core.decide(0.0) if isinstance(c, Assign)]

    served = msgspec.structs.replace(_served(command), prompt_tokens=800, cached_tokens=300)
    core.receive(served, 1.0)

    assert core._memory.book.lines.by_tenant.accounts.had("a") == 500 + 2.0 * 9


def shared(max_num_seqs: int = 30) -> Scheduler:
    """A core with one endpoint, where tenants share."""
    settings = CoreSettings(fairness=FairnessSettings(quantum_tokens=QUANTUM))
    core = Scheduler(settings, np.random.default_rng(0))
    core.receive(Beat(endpoint="e", epoch=1, models=("m",), max_num_seqs=max_num_seqs), 0.0)
    return core


def asks(core: Scheduler, name: str, tenant: str, now: float, **promise: float) -> None:
    request = Request(id=name, model="m", tenant=tenant, prompt_tokens=900, **promise)
    core.receive(Arrived(request=request, entry=f"{now * 1000:.0f}-0", enqueued_at=now), now)


def handed_over(core: Scheduler, now: float) -> list[Assign]:
    return [one for one in core.decide(now) if isinstance(one, Assign)]


def test_workers_say_whose_promises_were_kept():
    """What an endpoint posts settles a promise; one that was never made says nothing."""
    for on_time, missed in ((False, 1 / SETTLED), (True, 0.0), (None, 0.0)):
        core = shared()
        asks(core, "r", "a", 0.0, ttft_s=1.0)
        [command] = handed_over(core, 0.0)
        core.receive(msgspec.structs.replace(_served(command), on_time=on_time), 1.0)

        assert core.snapshot().given.missed == missed


def test_who_runs_out_of_time_in_line_has_come_short():
    """Though nobody set it aside."""
    core = Scheduler(
        CoreSettings(fairness=FairnessSettings(quantum_tokens=QUANTUM)), np.random.default_rng(0)
    )
    asks(core, "r", "a", 0.0, deadline_s=1.0)
    core.decide(2.0)

    assert core.snapshot().given.missed == 1 / SETTLED


def test_a_turn_comes_with_time():
    """One seat: who can wait lets others pass, and goes first once it cannot, having had less."""
    for later_s, first in ((0.0, "urgent"), (95.0, "patient")):
        core = shared(max_num_seqs=1)
        asks(core, "long", "chat", 0.0)
        [running] = handed_over(core, 0.0)
        asks(core, "patient", "batch", 1.0, ttft_s=100.0)
        core.decide(1.0)
        now = 1.0 + later_s
        asks(core, "urgent", "chat", now, ttft_s=50.0)
        core.receive(Beat(endpoint="e", epoch=1, models=("m",), max_num_seqs=1), now)
        served = msgspec.structs.replace(_served(running), prompt_tokens=100 * QUANTUM)
        core.receive(served, now)

        assert [one.job.id for one in handed_over(core, now)] == [first]


def commands(settings: CoreSettings, tenants: tuple[str, ...]) -> bytes:
    """What a core says to two hundred requests on two endpoints, as bytes."""
    core = Scheduler(settings, np.random.default_rng(0))
    for name in ("e0", "e1"):
        beat = Beat(endpoint=name, epoch=1, models=("m",), hardware="a100", max_num_seqs=30)
        core.receive(beat, 0.0)
    log = []
    for number in range(200):
        request = Request(
            id=f"r{number}",
            model="m",
            prompt_tokens=100 + 37 * number % 4000,
            ttft_s=1.0 if number % 3 else None,
            tenant=tenants[number * len(tenants) // 200],
        )
        core.receive(Arrived(request=request, entry=f"{number}-0", enqueued_at=0.0), 0.0)
    for step in range(30):
        sent = core.decide(0.1 * step)
        log.append(recording.plain(sent))
        for command in sent:
            if isinstance(command, Assign):
                core.receive(_served(command), 0.1 * step)
    return recording.encode(log)


def _served(command: Assign) -> Reward:
    job = command.job
    return Reward(
        id=job.id,
        endpoint=command.endpoint,
        epoch=job.epoch,
        attempt=job.attempt,
        outcome="completed",
        prompt_tokens=job.prompt_tokens,
        output_tokens=9,
    )


def test_i10_off_or_alone_it_changes_nothing():
    """I10: without a quantum tenants are only names, and with one tenant the quantum says nothing."""
    off, on = CoreSettings(), CoreSettings(fairness=FairnessSettings(quantum_tokens=5000))

    assert commands(on, ("a",)) == commands(off, ("a",))
    assert commands(on, ("b", "b", "b", "a")) != commands(off, ("b", "b", "b", "a"))
