"""A recording as a stage of the lab: who asks it gets the same arrivals, fleet and fates back, whatever the pool was."""

from collections import Counter

import msgspec
import numpy as np
import pytest
from msgspec import structs
from taped import (
    FLEET,
    arrivals,
    asked_again,
    recorded_run,
    stage_of,
    talk,
    told_by,
)
from typer.testing import CliRunner

from dispatcher.cli.root import root
from scheduler import slo
from scheduler.core import CoreSettings
from scheduler.errors import SettingsError
from scheduler.events import Arrived, Refused
from scheduler.fairness import FairnessSettings
from scheduler.plan import PlanSettings
from scheduler.policies import Edf
from scheduler.recording import Line
from scheduler.sim import (
    alike,
    arriving,
    asked,
    fleet,
    lives,
    policy,
    recorded,
    refit,
    story,
)
from scheduler.sim.fleet import CERTAIN, Chance, EndpointSpec, Fault, FaultKind, Fleet
from scheduler.sim.refit import Factors
from scheduler.sim.story import Story
from scheduler.slo import Objective
from scheduler.wire.client import Control, Request
from scheduler.wire.worker import Beat, Reward

AGREED = 0.15
"Of the mean time to first token, as docs/EVALUATION.md says."

HIT_AGREED = 0.05
"Of the share of prompts found in caches."

SMOOTH = Chance(stall_probability=0.0)
"Stalls are no part of the fit."

A100S = Fleet(name="three", endpoints=(EndpointSpec(profile="a100", count=3),), chance=SMOOTH)
PARTED = Fleet(
    name="parted",
    endpoints=(
        EndpointSpec(profile="a100", count=2, role="prefill", link_gbps=40.0),
        EndpointSpec(profile="a100", role="decode", link_gbps=40.0),
        EndpointSpec(profile="l40s", link_gbps=20.0),
    ),
    chance=SMOOTH,
)


def said(rows, change):
    """The same rows, what their clients write changed."""
    return tuple(structs.replace(row, request=change(row.request)) for row in rows)


def ttft_s(run):
    return float(np.mean([fate.ttft_s for fate in run.fates if fate.ttft_s is not None]))


def hit(run):
    done = [fate for fate in run.fates if fate.end == "completed"]
    return sum(f.cached_tokens for f in done) / sum(f.arrival.prompt_tokens for f in done)


def assert_agrees(was, now):
    """All ended alike, and time and caches are within what is documented."""
    assert Counter(fate.end for fate in now.fates) == Counter(fate.end for fate in was.fates)
    assert ttft_s(now) == pytest.approx(ttft_s(was), rel=AGREED)
    assert hit(now) == pytest.approx(hit(was), abs=HIT_AGREED)


def served_by(run):
    """Who completed requests of which model."""
    rows = run._rows
    return {(fate.endpoint, rows[fate.row].request.model) for fate in run.fates if fate.endpoint}


@pytest.fixture(scope="module")
def plain():
    """A run of three endpoints that serve all there is."""
    return recorded_run(where=A100S, rows=talk())


@pytest.fixture(scope="module")
def parted():
    """A run of two pools and one endpoint beside them."""
    return recorded_run(where=PARTED, rows=talk())


@pytest.fixture(scope="module")
def various():
    """A run of three endpoints, of which each serves other models; one is asked for that nobody serves."""
    served = ("base", "lora"), ("base",), ("other",)
    made = tuple(
        structs.replace(one, models=models)
        for one, models in zip(fleet.machines(A100S, 0), served, strict=True)
    )
    models = ("base", "lora", "other", "base", "nobody's")
    rows = said(talk(), lambda one: structs.replace(one, model=models[int(one.session) % 5]))
    return recorded_run(where=A100S, made=made, rows=rows)


class TestParted:
    """Fleets that part prefill from decode."""

    def test_its_own_policy_agrees(self, parted):
        """Prompts are computed here and decoded there again, as fast as they were."""
        was, data = parted

        now = asked_again(data)

        assert_agrees(was, now)
        assert {fate.endpoint for fate in now.fates} == {"a100-decode-0", "l40s-0"}

    def test_roles_and_links_are_as_declared(self, parted):
        """Each endpoint has its part, its link, and the size of what a hand-over moves."""
        made = {one.name: one for one in stage_of(parted[1]).machines}

        assert {name: (one.role, one.link_gbps) for name, one in made.items()} == {
            "a100-prefill-0": ("prefill", 40.0),
            "a100-prefill-1": ("prefill", 40.0),
            "a100-decode-0": ("decode", 40.0),
            "l40s-0": ("both", 20.0),
        }
        real = {one.name: one.nominal.kv_bytes_per_token for one in fleet.machines(PARTED, 0)}
        assert {name: one.nominal.kv_bytes_per_token for name, one in made.items()} == real

    def test_each_leg_says_its_half(self):
        """Twice as slow to prefill on the one, half as slow again to decode on the other: found within 15 %."""
        where = structs.replace(PARTED, endpoints=PARTED.endpoints[:2], chance=CERTAIN)
        made = tuple(refit.slowed(one, Factors(2.0, 1.5)) for one in fleet.machines(where, 0))

        _, data = recorded_run(where=where, made=made, rows=talk(rate_rps=6.0, span_s=60.0))

        for one in stage_of(data).machines:
            found, sheet = one.actual.coef, one.nominal.coef
            # Who only decodes is thought to prefill as others of its hardware do.
            assert found.g / sheet.g == pytest.approx(2.0, rel=0.15), one.name
            if one.role == "decode":
                assert found.ad / sheet.ad == pytest.approx(1.5, rel=0.15), one.name

    def test_others_part_it_their_own_way(self, parted):
        """A peer's rule for two legs is asked about the same arrivals."""
        where = structs.replace(PARTED, endpoints=PARTED.endpoints[:2])
        _, data = recorded_run(where=where, rows=talk(span_s=10.0))

        now = asked_again(data, "llm-d-weighted")

        assert {fate.end for fate in now.fates} == {"completed"}
        assert {fate.endpoint for fate in now.fates} == {"a100-decode-0"}

    def test_who_cannot_part_is_refused_by_name(self, parted):
        """A policy without a second leg, as in `simulate`."""
        with pytest.raises(SettingsError, match="'random' does not part prefill from decode"):
            asked_again(parted[1], "random")

    def test_who_parts_all_is_refused_where_not_all_is_parted(self):
        """Peers have no rule for an endpoint beside their two pools; ours has, and is asked."""
        made = fleet.machines(PARTED, 0)
        alone = tuple(
            structs.replace(one, link_gbps=0.0) if one.role == "both" else one for one in made
        )
        was, data = recorded_run(where=PARTED, made=alone, rows=talk(span_s=10.0))

        with pytest.raises(
            SettingsError, match=r"'dynamo' parts every request.* prefills for l40s-0"
        ):
            asked_again(data, "dynamo")
        assert_agrees(was, asked_again(data))


class TestModels:
    """Pools whose endpoints serve different models, or adapters beside one."""

    @pytest.mark.parametrize(
        "policy", ["plan", "round-robin", "aibrix-prefix-load", "edf", "oracle"]
    )
    def test_each_is_served_where_its_model_is(self, various, policy):
        """By ours and by peers; what nobody serves ends as it did."""
        now = asked_again(various[1], policy)

        assert served_by(now) <= {
            *(("a100-0", "base"), ("a100-0", "lora")),
            *(("a100-1", "base"), ("a100-2", "other")),
        }
        strange = [fate for fate in now.fates if now._rows[fate.row].request.model == "nobody's"]
        assert strange
        assert {fate.end for fate in strange} <= {"failed", "rejected"}
        assert {fate.end for fate in now.fates if fate not in strange} == {"completed"}

    def test_its_own_policy_agrees(self, various):
        assert_agrees(various[0], asked_again(various[1]))

    def test_models_that_came_and_went_are_served_all_along(self):
        """An adapter that was loaded later: its requests are served, and it is said so."""
        told = Story(
            beats={
                "e0": [
                    (at, Beat(endpoint="e0", epoch=1, models=m))
                    for at, m in ((0.0, ("a", "b")), (9.0, ("a",)))
                ]
            },
            models={"e0": {"a": None, "b": None}},
        )

        made = recorded.machines(told)

        assert made[0].models == ("a", "b")
        assert "e0 did not serve the same models at all times" in "".join(
            recorded.cautions(told, made)
        )


class TestLives:
    """Endpoints that come, go, and are told to take nothing new."""

    def test_a_death_and_a_return_are_seen(self):
        """An endpoint that fell silent and came back with a new epoch dies and joins in the lab."""
        _, data = recorded_run(span_s=25.0)

        found = lives.faults(told_by(data), 0.0, lease_s=3.0)

        assert [(f.endpoint, f.kind) for f in found] == [("l40s-0", "die"), ("l40s-0", "join")]
        assert 7.5 < found[0].at_s < 9.5
        assert 13.5 < found[1].at_s < 15.5

    def test_who_is_drained_is_given_nothing_new_again(self):
        """By a person's word: what is there ends, and work comes again after `resume`; its own policy agrees."""
        words = [(8.0, "drain"), (20.0, "resume")]
        told = [(at, Control(action=action, endpoint="a100-0")) for at, action in words]
        was, data = recorded_run(where=A100S, rows=talk(), told=told)

        now = asked_again(data)

        for run in (was, now):
            came = [f.enqueued_at for f in run.fates if f.endpoint == "a100-0"]
            assert not [at for at in came if 8.5 < at < 19.0]
            assert [at for at in came if at > 20.5]
        assert_agrees(was, now)

    @pytest.mark.parametrize("policy", ["plan", "round-robin", "edf"])
    def test_who_says_that_it_drains_is_believed(self, policy):
        """By its own word, from whoever asks."""
        where = structs.replace(A100S, faults=(Fault(at_s=8.0, endpoint="a100-0", kind="drain"),))
        _, data = recorded_run(where=where, rows=talk(span_s=15.0))

        now = asked_again(data, policy)

        came = [f.enqueued_at for f in now.fates if f.endpoint == "a100-0"]
        assert came
        assert max(came) < 8.5

    def test_who_came_later_comes_later(self):
        """An endpoint that joined under load; its own policy agrees."""
        where = structs.replace(A100S, faults=(Fault(at_s=12.0, endpoint="a100-2", kind="join"),))
        was, data = recorded_run(where=where, rows=talk())

        now = asked_again(data)

        assert min(f.enqueued_at for f in now.fates if f.endpoint == "a100-2") > 10.0
        assert_agrees(was, now)

    def test_who_is_drained_before_it_comes_is_not_there_before(self):
        """A drain is no sign of life."""
        moves: tuple[tuple[float, FaultKind], ...] = ((1.0, "drain"), (8.0, "join"))
        faults = tuple(Fault(at_s=at, endpoint="a100-2", kind=kind) for at, kind in moves)
        _, data = recorded_run(where=structs.replace(A100S, faults=faults), rows=talk(span_s=12.0))

        found = lives.faults(told_by(data), 0.0, lease_s=3.0)

        assert [(round(fault.at_s), fault.kind) for fault in found] == [(8, "join"), (8, "drain")]

    @pytest.mark.parametrize(
        ("reason", "back_at", "kinds"),
        [
            pytest.param("no answer", 22.0, ["drain", "die", "resume", "join"], id="long"),
            pytest.param("no answer", 12.0, ["drain", "resume"], id="shorter than the lease"),
            pytest.param("paused", 22.0, ["drain", "resume"], id="paused"),
        ],
    )
    def test_who_is_away_has_lost_its_work_only_after_a_lease(self, reason, back_at, kinds):
        """Shorter, or by a person's wish, it takes nothing new and keeps what it has."""

        def beat(at):
            is_away = 10.0 <= at < back_at
            return Beat(endpoint="e0", epoch=1, state="away" if is_away else "ready", reason=reason)

        told = story.read(Line(now=at, beat=beat(at)) for at in np.arange(1.0, 30.0).tolist())

        found = lives.faults(told, 1.0, lease_s=3.0)

        assert sorted(fault.kind for fault in found) == sorted(kinds)

    def test_a_drain_outlives_a_restart_and_an_earlier_reign(self):
        """Only a person resumes what a person drained; of earlier days only how they left it counts."""
        lines = [
            Line(now=at, beat=Beat(endpoint="e0", epoch=1 + (at > 20))) for at in (1.0, 2.0, 30.0)
        ]
        lines[1:1] = [
            Line(now=1.5, control=Control(action=action, endpoint="e0"))
            for action in ("drain", "resume", "drain")
        ]

        found = lives.faults(story.read(lines), 10.0, lease_s=3.0)

        assert [(fault.at_s, fault.kind) for fault in found] == [(0.0, "drain"), (20.0, "join")]


class TestCopy:
    """Copies of streams, whose beats are cut long before requests and rewards."""

    @staticmethod
    def cut(data, since, without=()):
        """The same, its beats before a moment lost, and all of some endpoints."""
        head, *lines = data.splitlines(keepends=True)
        kept = []
        for line in lines:
            plain = msgspec.json.decode(line)
            beat = plain.get("beat")
            if beat is None or (plain["now"] >= since and beat["endpoint"] not in without):
                kept.append(line)
        return b"".join([head, *kept])

    def test_who_answered_was_there(self, plain):
        """Endpoints whose first beat is lost did not come with the first that is kept; its own policy agrees."""
        was, data = plain
        data = self.cut(data, 25.0)

        assert stage_of(data, is_copy=True).fleet.faults == ()
        assert_agrees(was, asked_again(data, is_copy=True))

    def test_who_left_before_is_known_from_its_answers(self, plain):
        """Of whom no beat is left: it was there, as another of its hardware is, until it answered no more."""
        _, data = plain
        data = self.cut(data, 10.0, without=["a100-1"])

        lab = stage_of(data, is_copy=True)

        assert {one.name: one.settings.max_num_seqs for one in lab.machines}["a100-1"] == 256
        assert not [f for f in lab.fleet.faults if f.endpoint != "a100-1" or f.kind == "join"]


class TestPrompts:
    """What prompts share, and what is known of them before an engine counts."""

    def test_prefixes_are_shared_again(self, plain):
        """Who began alike does, by the hashes that clients sent."""
        was, data = plain

        assert hit(was) > 0.3
        assert_agrees(was, asked_again(data))

    def test_sessions_without_hashes_begin_as_much_alike_as_engines_found(self):
        """Of a client that names sessions only, what caches held says how much its turns share."""
        rows = said(talk(), lambda one: structs.replace(one, blocks=()))
        was, data = recorded_run(where=A100S, rows=rows)

        assert hit(was) > 0.3
        assert_agrees(was, asked_again(data))

    def test_a_guess_stays_a_guess_and_the_engine_counts(self):
        """Pictures, and text of which four bytes are no token: the dispatcher is told what it was told, blocks are as long as they were."""

        def guessed(one):
            return structs.replace(one, prompt_tokens=2 * one.prompt_tokens, prompt_estimated=True)

        rows = said(talk(), guessed)
        _, data = recorded_run(where=A100S, rows=rows)

        work = stage_of(data).work

        assert [one.prompt_tokens for one in work.asked] == [
            row.request.prompt_tokens for row in rows
        ]
        true = [row.arrival.prompt_tokens for row in rows]
        assert [row.prompt_tokens for row in work.arrivals][: len(true) - 5] == true[:-5]
        assert {row.block_tokens for row in work.arrivals} == {64}

    def test_a_body_of_which_nobody_said_the_length_counts_by_its_bytes(self):
        """As the core counts it, and the body itself is not kept."""
        bare = Arrived(request=Request(id="r", model="m"), entry="1-0", enqueued_at=1.0)
        told = story.read([Line(now=1.0, arrived=bare, body_bytes=4000)])

        [one] = asked.work(told, {}, 1.0).asked

        assert (one.prompt_tokens, one.prompt_estimated, one.body) == (1000, True, b"")

    def test_what_shares_by_nobodys_word_is_counted(self):
        """Neither hashes nor sessions: such prompts are computed whole, and it is said how many found something."""
        bare = Arrived(request=Request(id="r", model="m"), entry="1-0", enqueued_at=1.0)
        done = {
            "r": Reward(
                id="r", endpoint="e0", epoch=1, attempt=1, outcome="completed", cached_tokens=64
            )
        }
        told = Story(
            requests={"r": bare},
            rewards=done,
        )

        assert alike.n_cold(told) == 1
        assert "1 requests found a prefix" in "".join(recorded.cautions(told, ()))


class TestPromises:
    """Tenants, priorities, objectives and lengths foretold."""

    def test_all_that_was_asked_is_asked_again(self):
        """Explicit or by name: promises, priority, weight, the longest wait and the expected answer."""
        chat = Objective(ttft_ms=500.0, priority=3, weight=2.0, max_queue_ms=900.0)
        requests = (
            Request(id="a", model="m", prompt_tokens=5, objective="chat", tenant="gold"),
            Request(id="b", model="m", prompt_tokens=5, objective="chat", priority=0, ttft_s=2.0),
            Request(id="c", model="m", prompt_tokens=5, deadline_at=11.0, expected_tokens=77),
        )
        told = story.read(
            Line(now=5.0 + at, arrived=Arrived(request=one, entry=f"{at}-0", enqueued_at=5.0 + at))
            for at, one in enumerate(requests)
        )

        work = asked.work(told, {"chat": chat}, 5.0)
        rows = arriving.rows(work.arrivals, work.weights, work.objectives, work.asked)
        kept = [
            (row.request, slo.promise(row.request, row.arrival.at_s, work.known)) for row in rows
        ]

        assert [(p.ttft_s, p.priority, p.weight, p.refuse_at) for _, p in kept] == [
            (0.5, 3, 2.0, pytest.approx(0.9)),
            (2.0, 0, 2.0, pytest.approx(1.9)),
            (None, 0, 1.0, None),
        ]
        assert kept[2][1].deadline_at == 6.0  # the first came at 5
        assert [(one.tenant, one.expected_tokens) for one, _ in kept] == [
            ("gold", None),
            ("", None),
            ("", 77),
        ]

    def test_tenants_have_their_shares(self):
        """As the recorded settings gave them."""
        settings = CoreSettings(fairness=FairnessSettings(weights={"gold": 3.0}))
        _, data = recorded_run(core_settings=settings, where=A100S, rows=talk(span_s=5.0))

        assert stage_of(data).work.tenants == {"gold": 3.0}

    def test_the_longest_context_is_the_engines(self):
        """A prompt that one endpoint's context is too short for goes to the other."""
        made = tuple(
            structs.replace(one, context_tokens=4096 if one.name != "a100-2" else 0)
            for one in fleet.machines(A100S, 0)
        )
        rows = list(talk(span_s=10.0))
        long = structs.replace(rows[5].arrival, prompt_tokens=9000)
        rows[5] = arriving.rows([long])[0]
        rows[5] = structs.replace(rows[5], request=structs.replace(rows[5].request, id="5"))
        _, data = recorded_run(where=A100S, made=made, rows=tuple(rows))

        for chosen in ("plan", "round-robin"):
            assert asked_again(data, chosen).fates[5].endpoint == "a100-2"

    def test_a_repetition_that_was_refused_is_not_served(self):
        """Of a request that had ended before: nobody served it in this time."""
        bare = Arrived(request=Request(id="r", model="m"), entry="1-0", enqueued_at=1.0)
        lines = [Line(now=1.0, arrived=bare), Line(now=1.1, refused=Refused(id="r", entry="1-0"))]

        assert story.read(lines).requests == {}


class TestOwn:
    """The policy `recorded`: the core as it was set."""

    def test_it_decides_by_the_recorded_settings(self):
        """Another order, plan and quantum than those that ship: as with them, and not as without."""
        chosen = CoreSettings(
            policy=Edf(),
            plan=PlanSettings(fill=0.5),
            fairness=FairnessSettings(quantum_tokens=512, weights={"a": 3.0}),
        )
        rows = talk(rate_rps=40.0, span_s=10.0)
        tenants = tuple(
            structs.replace(
                row,
                arrival=structs.replace(row.arrival, tenant="ab"[at % 2]),
                request=structs.replace(row.request, tenant="ab"[at % 2]),
            )
            for at, row in enumerate(rows)
        )
        _, data = recorded_run(core_settings=chosen, where=A100S, rows=tenants)

        def firsts(policy):
            return [fate.first_token_at for fate in asked_again(data, policy).fates]

        own = firsts("recorded")
        assert own == firsts("core-edf:fill=0.5:quantum_tokens=512")
        assert own != firsts("core-edf:fill=0.5")

    def test_without_a_recording_there_is_none(self):
        """In `simulate` it says so."""
        lab = structs.replace(
            stage_of(recorded_run(where=A100S, rows=talk(span_s=2.0))[1]), core=None
        )

        with pytest.raises(SettingsError, match="'recorded' is the core as it was recorded"):
            lab.run(policy.named("recorded"), label="", seed=0, rate_rps=1.0)


class TestFit:
    def test_the_arrivals_are_those_of_the_run(self):
        """Moments, lengths and promises come back; who never finished has the usual length."""
        run, data = recorded_run(rate_rps=4.0)
        told = told_by(data)

        work = stage_of(data).work

        real = [fate.arrival for fate in run.fates]
        first_s = real[0].at_s
        assert [a.at_s for a in work.arrivals] == pytest.approx([a.at_s - first_s for a in real])
        done = [at for at, _ in enumerate(real) if str(at) in told.rewards]
        assert len(done) > len(real) / 2
        for at in done:
            mine, theirs = work.arrivals[at], real[at]
            assert (mine.prompt_tokens, mine.output_tokens) == (
                theirs.prompt_tokens,
                theirs.output_tokens,
            )
            assert (mine.ttft_s, mine.priority) == (theirs.ttft_s, theirs.priority)

    def test_endpoints_are_as_slow_as_measured(self):
        """A fleet twice as slow as its profiles, and noisy, is found so within 15 %."""
        where = structs.replace(FLEET, faults=(), chance=CERTAIN)
        slow = tuple(refit.slowed(m, Factors(2.0, 1.5)) for m in fleet.machines(where, 0))
        assert slow
        rows = arriving.rows(arrivals(0, rate_rps=6.0, span_s=60.0))
        _, data = recorded_run(where=where, made=slow, rows=rows)

        made = stage_of(data).machines

        for mine, real in zip(made, sorted(slow, key=lambda m: m.name), strict=True):
            prefill = mine.actual.coef.g / real.nominal.coef.g
            decode = mine.actual.coef.ad / real.nominal.coef.ad
            assert prefill == pytest.approx(2.0, rel=0.15), mine.name
            assert decode == pytest.approx(1.5, rel=0.15), mine.name


class TestRefused:
    """What is no stage says what it lacks."""

    BARE = Arrived(request=Request(id="r", model="m"), entry="1-0", enqueued_at=1.0)
    ENCODES = Beat(endpoint="e0", epoch=1, roles=("encode",))

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            pytest.param([Line(now=1.0, beat=ENCODES)], "holds no request", id="nobody asks"),
            pytest.param([Line(now=1.0, arrived=BARE)], "holds no beat", id="nobody lives"),
            pytest.param(
                [Line(now=1.0, arrived=BARE), Line(now=1.0, beat=ENCODES)],
                r"nobody in it decodes \(e0 encode\), wanted",
                id="nobody decodes",
            ),
        ],
    )
    def test_what_is_no_stage_says_what_it_lacks(self, lines, message):
        with pytest.raises(SettingsError, match=message):
            recorded.stage(story.read(lines), CoreSettings(), name="log")

    def test_endpoints_that_take_no_part_are_left_out_by_name(self):
        """Encoders, and prefill without a link: nobody can give them work."""
        beats = (
            self.ENCODES,
            Beat(endpoint="e1", epoch=1),
            Beat(endpoint="e2", epoch=1, roles=("prefill",)),
        )
        told = story.read(
            [Line(now=1.0, arrived=self.BARE), *(Line(now=1.0, beat=b) for b in beats)]
        )

        made = recorded.machines(told)

        assert [one.name for one in made] == ["e1"]
        assert "e0, e2 neither decode nor" in "".join(recorded.cautions(told, made))

    def test_the_command_ends_by_name(self, tmp_path):
        """`headgate replay` of a parted pool under a policy that has no second leg: a settings error, which is exit 2."""
        _, data = recorded_run(where=PARTED, rows=talk(span_s=3.0))
        path = tmp_path / "parted.jsonl"
        path.write_bytes(data)

        words = ["replay", str(path), "--policy", "plan,power-of-two", "--jobs", "1"]
        shown = CliRunner().invoke(root(["replay"]), words)

        assert "'power-of-two' does not part prefill from decode" in str(shown.exception)
