"""I5: what a recording tells a fresh core gives the recorded commands, and any difference is named."""

import io
import math

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs
from typer.testing import CliRunner

from dispatcher.cli import recordings
from dispatcher.cli.root import root
from dispatcher.journal import FILES_KEPT, STANDS_S, Journal, Recorder, begin
from scheduler import recording
from scheduler.core import CoreSettings, Scheduler
from scheduler.errors import SettingsError
from scheduler.events import Arrived, Assign
from scheduler.policies import Urgency
from scheduler.recording import RecordingError
from scheduler.sim import fleet, recorded, refit, workload, world
from scheduler.sim.fleet import CERTAIN, Delays, EndpointSpec, Fault, Fleet
from scheduler.sim.refit import Factors
from scheduler.sim.replay import replayed
from scheduler.sim.world import World
from scheduler.slo import Objective
from scheduler.wire.client import Request
from scheduler.wire.worker import Beat

CHAT = {"chat": Objective(ttft_ms=800.0, weight=2.0)}
FLEET = Fleet(
    name="three",
    endpoints=(EndpointSpec(profile="a100", count=2), EndpointSpec(profile="l40s")),
    faults=(
        Fault(at_s=6.0, endpoint="a100-0", kind="slow", factor=3.0),
        Fault(at_s=9.0, endpoint="l40s-0", kind="die"),
        Fault(at_s=14.0, endpoint="l40s-0", kind="join"),
    ),
)


def arrivals(seed, *, rate_rps=12.0, span_s=20.0):
    """Conversations of every length, some with promises."""
    rng = np.random.default_rng(seed)
    n = int(rate_rps * span_s)
    at_s = np.sort(rng.uniform(0, span_s, n))
    return tuple(
        workload.Arrival(
            at_s=float(at),
            prompt_tokens=int(rng.lognormal(6.5, 1.0)) + 1,
            output_tokens=int(rng.integers(2, 120)),
            blocks=(int(rng.integers(5)),),
            block_tokens=128,
            ttft_s=float(rng.choice([0.3, 1.0, 5.0])) if rng.random() < 0.6 else None,
            deadline_s=8.0 if rng.random() < 0.3 else None,
            priority=int(rng.integers(-1, 3)),
        )
        for at in at_s
    )


def recorded_run(seed=0, core_settings=None, where=FLEET, **more):
    """A run of the lab and its recording, as bytes."""
    core_settings = core_settings or CoreSettings(objectives=CHAT, lease_s=Delays().lease_s)
    file = io.BytesIO()
    head = recording.head(core_settings, seed=seed, version="0", pool="lab")
    journal = Journal(head, lambda _: file, bytes_max=2**40)
    run = played(journal, core_settings, seed, where, **more)
    return run, file.getvalue()


def played(journal, core_settings, seed=0, where=FLEET, **more):
    """A run of the lab that this journal takes down."""
    core = Recorder(Scheduler(core_settings, np.random.default_rng(seed)), journal)
    rows = world.rows(arrivals(seed, **more))
    run = World(
        rows,
        fleet.machines(where, seed),
        delays=where.delays,
        is_open=False,
        faults=where.faults,
    )
    run.run(core)
    journal.flush_by(math.inf)
    return run


def lines_of(data):
    return recording.read(enumerate(data.splitlines(), 1), name="test")


def again(data, *changes):
    head, lines = lines_of(data)
    return replayed(lines, recording.settings(head, changes), seed=head.seed)


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**31),
    policy=st.sampled_from([Urgency(), Urgency(odds_min=0.2, stretch=0.0)]),
    rate_rps=st.sampled_from([3.0, 12.0, 40.0]),
)
def test_i5_whatever_happened_happens_again(seed, policy, rate_rps):
    """I5: under deaths, slow-downs, overload and any seed a recording gives the same commands, byte for byte."""
    chosen = CoreSettings(policy=policy, objectives=CHAT)
    _, data = recorded_run(seed, chosen, rate_rps=rate_rps, span_s=10.0)

    outcome = again(data)

    assert outcome.difference is None
    assert outcome.commands > 0


class TestDifference:
    def test_a_changed_setting_is_named_by_its_first_effect(self):
        """The turn, the request and the field where two settings part."""
        _, data = recorded_run()

        outcome = again(data, "plan.commit_window_s=0.05")

        assert outcome.difference is not None
        assert outcome.difference.turn <= outcome.turns
        assert outcome.difference.request
        assert outcome.difference.field.startswith(("command", "number of commands"))

    def test_one_changed_figure_is_named_as_it_stands(self):
        """A field that was tampered with: its path, what is recorded and what comes now."""
        _, data = recorded_run(span_s=3.0)
        at = next(n for n, line in enumerate(data.splitlines()) if b'"assign"' in line)
        lines = data.splitlines(keepends=True)
        plain = msgspec.json.decode(lines[at])
        place = next(n for n, one in enumerate(plain["decided"]) if "assign" in one)
        job = plain["decided"][place]["assign"]["job"]
        was, job["prefill_s"] = job["prefill_s"], 9.25
        lines[at] = msgspec.json.encode(plain) + b"\n"

        found = again(b"".join(lines)).difference

        assert found.field == f"command {place + 1}.assign.job.prefill_s"
        assert (found.recorded, float(found.replayed)) == ("9.25", was)
        assert found.request == job["id"]

    def test_a_command_that_is_missing_is_counted(self):
        """A turn that says less or more than recorded."""
        _, data = recorded_run(span_s=3.0)
        lines = data.splitlines(keepends=True)
        at = next(n for n, line in enumerate(lines) if b'"assign"' in line)
        plain = msgspec.json.decode(lines[at])
        plain["decided"].pop()
        lines[at] = msgspec.json.encode(plain) + b"\n"

        found = again(b"".join(lines)).difference

        assert found.field == "number of commands"
        assert found.replayed.startswith(f"{len(plain['decided']) + 1}, among them ")

    def test_a_change_that_names_nothing_says_what_there_is(self):
        """An unknown setting is refused with those that exist; so is a value of a wrong kind."""
        _, data = recorded_run(span_s=1.0)
        with pytest.raises(SettingsError, match=r"plan\.commit_window_s"):
            again(data, "plan.window=3")
        with pytest.raises(SettingsError, match="float"):
            again(data, "plan.commit_window_s=soon")


class TestParts:
    """A journal that grows full goes on in the next file, and the newest files are kept."""

    @pytest.fixture
    def parts(self, tmp_path):
        def parts(bytes_max):
            journal = begin(
                str(tmp_path),
                CoreSettings(objectives=CHAT),
                pool="p",
                epoch=0,
                version="0",
                now=1.5e9,
                bytes_max=bytes_max,
            )
            played(journal, CoreSettings(objectives=CHAT))
            journal.close("resigned")
            return sorted((tmp_path / "p").iterdir())

        return parts

    def test_together_they_repeat_the_reign(self, parts):
        """From the first part on, to the reign's own end, as from one file."""
        first, *later = parts(200_000)
        assert len(later) > 2

        with recordings.opened(first) as found:
            outcome = replayed(recordings.whole(found), recording.settings(found.head), seed=0)

        assert (outcome.difference, outcome.end) == (None, "resigned")
        assert outcome.turns > 100

    def test_what_is_kept_is_the_newest_and_tells_of_its_own_time(self, parts):
        """The last part alone knows the endpoints and what was asked then; its turns can't be repeated, and it says so."""
        files = parts(20_000)
        with recordings.opened(files[-1]) as found:
            part, told = found.head.part, recorded.story(found.lines)

        assert len(files) == FILES_KEPT
        assert part > FILES_KEPT
        assert set(told.beats) == {"a100-0", "a100-1", "l40s-0"}
        shown = CliRunner().invoke(root(["replay"]), ["replay", str(files[-1])])
        assert f"is part {part} of its reign, wanted part 0" in str(shown.exception)

    def test_who_has_long_gone_does_not_stand_in_a_new_part(self, tmp_path):
        """Where pods come and go under new names, a reign of months would begin each part with all of them."""
        head = recording.head(CoreSettings(), seed=1, version="0", pool="lab")
        paths = [tmp_path / f"{part}.jsonl" for part in range(2)]
        journal = Journal(head, lambda part: paths[part].open("xb"), bytes_max=1)
        core = Recorder(Scheduler(CoreSettings(), np.random.default_rng(1)), journal)
        core.receive(Beat(endpoint="gone", epoch=1), 0.0)
        core.receive(Beat(endpoint="here", epoch=1), 2 * STANDS_S)
        journal.flush_by(2 * STANDS_S)
        journal.close("resigned")

        with recordings.opened(paths[1]) as part:
            assert [beat.endpoint for beat in next(part.lines).standing] == ["here"]

    def test_a_disk_that_fails_ends_the_recording_only(self, tmp_path):
        """The next part cannot be opened: the core goes on, and the journal says that it is shut."""

        def open_file(part):
            if part:
                raise OSError(28, "No space left on device")
            return (tmp_path / "part").open("xb")

        head = recording.head(CoreSettings(), seed=0, version="0", pool="p")
        journal = Journal(head, open_file, bytes_max=20_000)
        run = played(journal, CoreSettings(objectives=CHAT))

        assert not journal.is_open
        assert len(run.fates) > 0

    def test_no_part_follows_what_could_not_be_written(self, tmp_path):
        """Lines are missing there: what follows would be replayed as if nothing were."""
        opened = []

        class Full(io.BytesIO):
            def write(self, _):
                raise OSError(28, "No space left on device")

        head = recording.head(CoreSettings(), seed=0, version="0", pool="p")
        journal = Journal(head, lambda part: opened.append(part) or Full(), bytes_max=1)
        journal.flush_by(1.0)
        journal.flush_by(2.0)

        assert opened == [0]
        assert not journal.is_open


class TestFormat:
    def test_bodies_stay_out_and_their_length_counts(self, tmp_path):
        """A prompt's text is nowhere in a recording, and the estimate made from its bytes is."""
        path = tmp_path / "recording"
        head = recording.head(CoreSettings(), seed=1, version="0", pool="p")
        journal = Journal(head, lambda _: path.open("xb"), bytes_max=2**30)
        core = Recorder(Scheduler(CoreSettings(), np.random.default_rng(1)), journal)
        beat = Beat(endpoint="e0", epoch=1, models=("m",))
        secret = b'{"prompt": "' + b"secret " * 400 + b'"}'
        request = Arrived(
            request=Request(id="r", model="m", body=secret), entry="1-0", enqueued_at=5.0
        )
        for fact in (beat, request):
            core.receive(fact, 5.0)
        [sent] = [c for c in core.decide(5.0) if isinstance(c, Assign)]
        journal.close("resigned")

        assert sent.job.body == secret
        assert sent.job.prompt_tokens == len(secret) // 4
        written = path.read_bytes()
        assert b"secret" not in written
        assert b'"body_bytes":%d' % len(secret) in written
        assert again(written).difference is None

    def test_what_is_no_recording_is_told_so(self):
        """A foreign file, another format and a broken line each name file and line."""
        with pytest.raises(RecordingError, match=r"test, line 1: .*is no recording"):
            lines_of(b'{"trace": "x"}\n')
        with pytest.raises(RecordingError, match="line 1: format is 9, wanted 1"):
            lines_of(b'{"recording": 9, "version": "0", "pool": "p"}\n')
        _, lines = lines_of(b'{"recording": 1, "version": "0", "pool": "p"}\n{"now": "soon"}\n')
        with pytest.raises(RecordingError, match="test, line 2"):
            list(lines)

    def test_settings_come_back_as_they_were(self):
        """Infinities and named objectives survive the file."""
        chosen = CoreSettings(policy=Urgency(odds_min=0.3), objectives=CHAT)
        head = recording.head(chosen, seed=3, version="0", pool="p")
        head = msgspec.json.decode(msgspec.json.encode(head), type=recording.Head)

        assert recording.settings(head) == chosen


class TestRecorded:
    @pytest.mark.parametrize(
        ("models", "roles", "message"),
        [
            (("a", "b"), ("both",), r"holds requests for 2 models \(a, b\), wanted one"),
            (("a", "a"), ("prefill",), "e0 only prefill, wanted endpoints that serve whole"),
        ],
        ids=["two models", "two legs"],
    )
    def test_what_the_lab_cannot_play_again_is_refused(self, models, roles, message):
        """It fits one profile to each endpoint, and all of them serve one model, whole."""
        told = recorded.Story(
            requests={f"r{at}": (Request(model=m), float(at)) for at, m in enumerate(models)},
            beats={"e0": [(0.0, Beat(endpoint="e0", epoch=1, roles=roles))]},
        )

        with pytest.raises(SettingsError, match=message):
            recorded.stage(told, {}, name="log", lease_s=3.0)

    def test_the_arrivals_are_those_of_the_run(self):
        """Moments, lengths and promises come back; who never finished has the usual length."""
        run, data = recorded_run(rate_rps=4.0)
        told = recorded.story(lines_of(data)[1])

        work = recorded.work(told, CHAT, min(at for _, at in told.requests.values()))

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

    def test_a_death_and_a_return_are_seen(self):
        """An endpoint that fell silent and came back with a new epoch dies and joins in the lab."""
        _, data = recorded_run(span_s=25.0)
        told = recorded.story(lines_of(data)[1])

        found = recorded.faults(told, 0.0, lease_s=3.0)

        assert [(f.endpoint, f.kind) for f in found] == [("l40s-0", "die"), ("l40s-0", "join")]
        assert 7.5 < found[0].at_s < 9.5
        assert 13.5 < found[1].at_s < 15.5

    def test_endpoints_are_as_slow_as_measured(self):
        """A fleet twice as slow as its profiles, and noisy, is found so within 15 %."""
        where = structs.replace(FLEET, faults=(), chance=CERTAIN)
        slow = tuple(refit.slowed(m, Factors(2.0, 1.5)) for m in fleet.machines(where, 0))
        assert slow
        file = io.BytesIO()
        head = recording.head(CoreSettings(), seed=0, version="0", pool="lab")
        journal = Journal(head, lambda _: file, bytes_max=2**40)
        core = Recorder(Scheduler(CoreSettings(), np.random.default_rng(0)), journal)
        run = World(
            world.rows(arrivals(0, rate_rps=6.0, span_s=60.0)),
            slow,
            delays=where.delays,
            is_open=False,
        )
        run.run(core)
        journal.flush_by(math.inf)

        made = recorded.machines(recorded.story(lines_of(file.getvalue())[1]))

        for mine, real in zip(made, sorted(slow, key=lambda m: m.name), strict=True):
            prefill = mine.actual.coef.g / real.nominal.coef.g
            decode = mine.actual.coef.ad / real.nominal.coef.ad
            assert prefill == pytest.approx(2.0, rel=0.15), mine.name
            assert decode == pytest.approx(1.5, rel=0.15), mine.name
