"""I5: what a recording tells a fresh core gives the recorded commands, and any difference is named."""

import io

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from taped import CHAT, lines_of, played, recorded_run
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
from scheduler.sim import story
from scheduler.sim.replay import replayed
from scheduler.wire.client import Control, Request
from scheduler.wire.worker import Beat


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
            part, told = found.head.part, story.read(found.lines)

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

    def test_who_was_drained_is_drained_in_the_parts_that_follow(self, tmp_path):
        """By a person in this reign or in one before; who was resumed is not."""
        head = recording.head(CoreSettings(), seed=1, version="0", pool="lab")
        paths = [tmp_path / f"{part}.jsonl" for part in range(2)]
        journal = Journal(head, lambda part: paths[part].open("xb"), bytes_max=1)
        before = Scheduler(CoreSettings(), np.random.default_rng(1))
        core = Recorder(Scheduler(CoreSettings(), np.random.default_rng(1)), journal)
        for name in ("a", "b"):
            before.receive(Control(action="drain", endpoint=name), 1.0)
        core.restore(before.snapshot())
        core.receive(Control(action="resume", endpoint="a"), 2.0)
        core.receive(Control(action="drain", endpoint="c"), 2.0)
        journal.flush_by(2.0)
        journal.close("resigned")

        with recordings.opened(paths[1]) as part:
            drains = story.read(part.lines).drains

        assert sorted(drains) == [(0.0, "b", True), (0.0, "c", True)]

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
