"""Clients of a recording that gave up give up again, under whatever policy, and nobody counts them as anything else."""

from collections import Counter

import pytest
from msgspec import structs
from taped import asked_again, recorded_run, stage_of, talk, told_by
from typer.testing import CliRunner

from dispatcher.cli.root import root
from scheduler.events import Recovered
from scheduler.recording import Line
from scheduler.sim import arriving, policy, recorded, story, workload
from scheduler.sim.fleet import Chance, EndpointSpec, Fault, Fleet
from scheduler.sim.lab import Bounds
from scheduler.wire.client import Control, Request

SMOOTH = Chance(stall_probability=0.0)
A100S = Fleet(name="three", endpoints=(EndpointSpec(profile="a100", count=3),), chance=SMOOTH)
PARTED = Fleet(
    name="parted",
    endpoints=(
        EndpointSpec(profile="a100", count=2, role="prefill", link_gbps=40.0),
        EndpointSpec(profile="a100", count=2, role="decode", link_gbps=40.0),
    ),
    chance=SMOOTH,
)
LONG = 2000
"Tokens of an answer that nobody waits for: 20 s at the least."


def impatient(*, every=4, cancel_s=2.0, **more):
    """A talk of 10 s in whose first half one in so many asks for a long answer and gives up in the midst of it."""
    return tuple(
        structs.replace(
            row, arrival=structs.replace(row.arrival, output_tokens=LONG), cancel_s=cancel_s
        )
        if at % every == 0 and row.arrival.at_s < 5.0
        else row
        for at, row in enumerate(talk(span_s=10.0, **more))
    )


def left(run):
    """The rows whose clients got what they asked for: no answer."""
    return {fate.row for fate in run.fates if fate.end == "cancelled"}


def report_of(data, chosen="recorded"):
    """What the lab says of this policy on a recording."""
    lab = stage_of(data)
    rate_rps = workload.rate(lab.work.arrivals)
    return lab.run(policy.named(chosen), label=chosen, seed=0, rate_rps=rate_rps)[0]


@pytest.fixture(scope="module")
def whole():
    """Three endpoints, from which every fourth request is taken away."""
    return recorded_run(where=A100S, rows=impatient())


@pytest.fixture(scope="module")
def parted():
    """The same where prefill is parted from decode; some leave while their prompts are computed."""
    rows = impatient()
    rows = tuple(
        structs.replace(row, cancel_s=0.03) if at % 8 == 0 else row for at, row in enumerate(rows)
    )
    return recorded_run(where=PARTED, rows=rows)


class TestRecorded:
    """What was recorded is what the run did."""

    def test_the_lab_cancels_as_a_live_pool_does(self, whole):
        """Every client that left is told so, its engine computes no more for it, and the others are served."""
        run, data = whole
        told = told_by(data)

        assert left(run) == {
            at for at in range(0, len(run.fates), 4) if run.fates[at].enqueued_at < 5.0
        }
        assert Counter(fate.end for fate in run.fates) == {
            "cancelled": len(left(run)),
            "completed": len(run.fates) - len(left(run)),
        }
        assert set(told.cancelled) == set(told.broken_off) == {str(at) for at in left(run)}
        assert all(endpoint.engine.kv.used == 0 for endpoint in run.endpoints.values())

    def test_who_waits_is_ended_where_it_waits(self):
        """With every seat taken a request that gives up in line was never anybody's."""
        one = Fleet(
            name="one",
            endpoints=(
                EndpointSpec(
                    profile="a100",
                    engine=structs.replace(EndpointSpec(profile="a100").engine, max_num_seqs=1),
                ),
            ),
            chance=SMOOTH,
        )
        run, data = recorded_run(where=one, rows=impatient(cancel_s=0.5, every=3))

        never = {fate.row for fate in run.fates if fate.end == "cancelled" and not fate.attempts}
        assert never
        for chosen in ("recorded", "fcfs", "moore-hodgson"):
            now = asked_again(data, chosen)
            assert never <= left(now)
            assert {fate.end for fate in now.fates} == {"cancelled", "completed"}
            assert all(endpoint.engine.kv.used == 0 for endpoint in now.endpoints.values())

    def test_a_word_that_came_while_all_stood_still_is_read_afterwards(self):
        """A frozen worker reads its stream when it thaws: the answer goes no further."""
        still = structs.replace(
            A100S,
            endpoints=(EndpointSpec(profile="a100"),),
            faults=(
                Fault(at_s=1.0, endpoint="a100-0", kind="freeze"),
                Fault(at_s=3.0, endpoint="a100-0", kind="thaw"),
            ),
        )
        rows = impatient()[:1]
        rows = (structs.replace(rows[0], arrival=structs.replace(rows[0].arrival, at_s=0.0)),)
        run, _ = recorded_run(where=still, rows=rows)

        assert [fate.end for fate in run.fates] == ["cancelled"]
        assert run.fates[0].wasted_tokens < LONG

    def test_who_was_cancelled_before_a_takeover_stays_so(self):
        """An earlier leader heard the word: since when is not known, so since this one was told."""
        request = Request(id="r", model="m")
        lines = [
            Line(
                now=5.0,
                recovered=Recovered(
                    request=request, entry="1-0", enqueued_at=4.0, attempt=1, cancelled=True
                ),
            )
        ]

        assert story.read(lines).cancelled == {"r": 5.0}


class TestAgain:
    """Asked again, the same clients leave after the same time."""

    @pytest.mark.parametrize(
        "chosen", ["recorded", "plan", "round-robin", "dynamo", "fcfs", "moore-hodgson", "kairos"]
    )
    def test_the_same_give_up_under_any_policy(self, whole, chosen):
        """Each as long after its enqueue as it was, and nobody else; no engine keeps anything of them."""
        run, data = whole

        now = asked_again(data, chosen)

        assert left(now) == left(run)
        assert {fate.end for fate in now.fates} == {"cancelled", "completed"}
        assert all(endpoint.engine.kv.used == 0 for endpoint in now.endpoints.values())

    @pytest.mark.parametrize("chosen", ["recorded", "niyama", "mooncake"])
    def test_the_same_give_up_where_prefill_is_parted(self, parted, chosen):
        """Whichever leg they are in."""
        run, data = parted

        now = asked_again(data, chosen)

        assert left(now) == left(run)
        assert {fate.end for fate in now.fates} == {"cancelled", "completed"}

    @pytest.mark.parametrize("chosen", ["recorded", "fcfs"])
    def test_who_has_its_answer_by_then_keeps_it(self, chosen):
        """On machines three times as fast an answer is through before its client would have left."""
        slow = structs.replace(A100S, endpoints=(EndpointSpec(profile="a100"),))
        rows = arriving.rows([row.arrival for row in talk(rate_rps=0.2, span_s=20.0)])
        rows = tuple(
            structs.replace(
                row, arrival=structs.replace(row.arrival, output_tokens=200), cancel_s=1.0
            )
            for row in rows
        )
        run, data = recorded_run(where=slow, rows=rows)
        assert {fate.end for fate in run.fates} == {"cancelled"}
        lab = stage_of(data)
        arrivals = tuple(structs.replace(one, output_tokens=20) for one in lab.work.arrivals)
        lab = structs.replace(lab, work=structs.replace(lab.work, arrivals=arrivals))

        rate_rps = workload.rate(arrivals)
        now = lab.run(policy.named(chosen), label=chosen, seed=0, rate_rps=rate_rps)[1]

        assert {fate.end for fate in now.fates} == {"completed"}

    @pytest.mark.parametrize("chosen", ["recorded", "fcfs", "round-robin"])
    def test_whose_endpoint_dies_is_not_served_again(self, chosen):
        """It gave up while its endpoint lay dead, before anybody knew."""
        dying = structs.replace(
            A100S,
            endpoints=(EndpointSpec(profile="a100", count=2),),
            faults=(Fault(at_s=1.5, endpoint="a100-0", kind="die"),),
        )
        _, data = recorded_run(where=dying, rows=impatient(cancel_s=3.0, rate_rps=4.0))

        now = asked_again(data, chosen)

        assert {fate.end for fate in now.fates} == {"cancelled", "completed"}
        assert all(fate.first_token_at is None or fate.attempts for fate in now.fates)

    def test_a_broken_answer_is_longer_than_what_was_said(self, whole):
        """Nobody knows by how much: the usual length again."""
        _, data = whole
        told = told_by(data)
        work = stage_of(data).work
        said = {one: reward.output_tokens for one, reward in told.broken_off.items()}

        lengths = {
            row: arrival.output_tokens
            for row, (arrival, cancel_s) in enumerate(
                zip(work.arrivals, work.cancels_s, strict=True)
            )
            if cancel_s is not None
        }

        assert lengths.keys() == {int(one) for one in said}
        assert all(lengths[int(one)] > tokens > 0 for one, tokens in said.items())


class TestCounted:
    """As cancelled, and in no share."""

    def test_shares_are_of_the_others(self, whole):
        """Recording and report alike: who left is neither on time nor late, neither failed nor unfinished."""
        run, data = whole
        found, was = report_of(data), recorded.served(told_by(data))
        n_left = len(left(run))

        assert found.n == was.n == len(run.fates)
        assert found.n_cancelled == was.n_cancelled == n_left
        assert found.n_failed == found.n_unfinished == 0
        assert found.n_completed == found.n - n_left
        assert was.n_completed >= found.n_completed - 1, "the last end of all is not told any more"
        kept = [fate.is_on_time for fate in run.fates if fate.end != "cancelled"]
        assert was.on_time == pytest.approx(sum(kept) / len(kept), abs=0.02)
        assert found.on_time == pytest.approx(was.on_time, abs=0.1)
        assert found.wasted_tokens > 0

    def test_who_asked_too_late_has_its_answer(self):
        """A word to cancel what is complete already takes nothing away, and nobody is said to have given up."""
        told = [(4.0, Control(action="cancel", id="3"))]
        run, data = recorded_run(where=A100S, rows=talk(span_s=5.0), told=told)
        heard = told_by(data)

        assert run.fates[3].finished_at < 4.0
        assert recorded.served(heard).n_cancelled == report_of(data).n_cancelled == 0
        assert "were cancelled" not in "".join(recorded.cautions(heard, ()))

    def test_no_bound_is_told_of_what_was_taken_away(self, whole):
        """Bounds are of all arrivals: shares without those who left could be above them."""
        lab = stage_of(whole[1])

        assert lab.bounds(0, 10.0) == Bounds(None, None)

    def test_the_command_says_how_many(self, whole, tmp_path):
        """Of each policy, and of what was."""
        file = tmp_path / "run.jsonl"
        file.write_bytes(whole[1])
        n_left = len(left(whole[0]))

        shown = CliRunner().invoke(
            root(["replay"]), ["replay", str(file), "--policy", "plan,fcfs", "--jobs", "1"]
        )

        assert shown.exit_code == 0, shown.output
        text = " ".join(shown.output.split())
        assert f"plan: {n_left} of {len(whole[0].fates)} cancelled" in text
        assert f"fcfs: {n_left} of {len(whole[0].fates)} cancelled" in text
        assert f"completed, {n_left} cancelled" in text
        assert f"{n_left} requests were cancelled; here they are as long after" in text
