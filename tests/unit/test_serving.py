"""An attempt in its engine: real HTTP to a scripted engine, a real Redis; whatever either does, it ends once."""

import asyncio
import contextlib
import itertools

import pytest
import structlog
from attempts import pulled
from hand import until
from scripted import ANSWER, CHUNKED, WELL, Scripted, chunk, page

from scheduler.settings import EngineAddress, LeaseSettings, WorkerSettings
from workers import serving
from workers.attempt import Stop
from workers.endpoint import Endpoint
from workers.halves import CLAIM, NO_KV
from workers.metrics import Meter
from workers.writer import Writer

PIECE = b'data: {"choices":[{"text":"so far"}]}\n\n'

BEGUN = CHUNKED + chunk(PIECE)
"The beginning of an answer, of which no more comes."

FOUR = ANSWER.replace(b'"completion_tokens":1', b'"completion_tokens":4')

PARKED = b'{"usage":{"prompt_tokens":3,"completion_tokens":1},"kv_transfer_params":{"at":1}}'


class Served:
    """An endpoint of which nothing runs but what serves: no reader, no probes, no beats that nobody asked for."""

    def __init__(self, hand, engine, **settings):
        self.hand, self.engine, self.meter = hand, engine, Meter()
        self.settings = WorkerSettings(**{"tokens_s": 0.001} | settings)
        self.writer = Writer(hand.redis, hand.keys, self.settings, self.meter)
        self.endpoint = Endpoint(
            EngineAddress(name="e0", url=engine.url),
            connection=hand.redis,
            writer=self.writer,
            keys=hand.keys,
            settings=self.settings,
            lease=LeaseSettings(),
            meter=self.meter,
            worker="w0",
        )
        self.endpoint.health.away = ""

    @contextlib.asynccontextmanager
    async def working(self):
        await self.endpoint._engine.open()
        writing = asyncio.create_task(self.writer.run())
        try:
            async with asyncio.timeout(20), asyncio.TaskGroup() as group:
                self.endpoint._serving.group = group
                yield self
                await self.settled()
        finally:
            writing.cancel()
            await self.endpoint._engine.close()

    def hold(self, one):
        self.endpoint._hands.take(one)
        self.endpoint._hands.hold(one)
        return one

    def start(self, one):
        """Admit it."""
        self.hold(one)
        self.endpoint._serving.start(one)
        return one

    async def settled(self):
        """Until nothing runs and all is written."""
        await until(lambda: not self.endpoint._hands.running)
        await self.writer.settled()

    async def outcome(self, one):
        """Serve it; its reward's outcome and reason."""
        self.start(one)
        await self.settled()
        [reward] = await self.hand.rewards(one.job.id)
        return reward.outcome, reward.reason

    def fenced(self):
        return self.meter.registry.get_sample_value("headgate_worker_fenced_total")


@pytest.fixture
async def engine():
    async with Scripted() as played:
        yield played


@pytest.fixture
async def served(hand, engine):
    async with Served(hand, engine).working() as made:
        yield made


class TestStart:
    async def test_whose_job_was_taken_back_stops_at_once(self, served, engine, hand):
        """Redis is asked when it is admitted, not when it first has something to write: another runs it already."""
        engine.said = [CHUNKED]
        one = await pulled(hand)
        await hand.reclaim("r1")

        served.start(one)
        await served.settled()

        assert one.stage == "gone"
        assert served.fenced() == 1
        assert await hand.rewards("r1") == await hand.results("r1") == []

    async def test_a_tombstone_is_enough(self, served, engine, hand):
        """Cancelled when it was on its way here: no word need come behind it."""
        engine.said = [CHUNKED]
        one = await pulled(hand)
        await hand.redis.command("HSET", hand.keys.request("r1"), "cancelled", "1")

        assert await served.outcome(one) == ("cancelled", "cancelled before it started")
        assert [result.outcome for result in await hand.results("r1")] == ["cancelled"]

    async def test_redis_hears_that_it_runs(self, served, engine, hand):
        """So do beats, of the start and of the first token."""
        one = served.start(await pulled(hand))
        await served.settled()

        assert (one.stage, one.admitted_at is not None) == ("gone", True)
        assert served.endpoint._pulse._started == ["r1:1"]
        [first] = served.endpoint._pulse._first_tokens
        name, _, after_ms = first.rpartition(":")
        assert name == "r1:1"
        assert 0 <= float(after_ms) < 60_000

    async def test_the_engine_is_asked_before_anybody_else_has_a_turn(self, served, hand):
        """Over the connection that is kept, when the call returns."""
        await served.outcome(await pulled(hand, "r0"))
        posts = served.endpoint._engine._posts
        one = await pulled(hand)
        assert len(posts._idle) == 1

        served.start(one)

        assert not posts._idle

    async def test_a_connection_that_was_just_closed_costs_no_attempt(self, served, engine, hand):
        """It is posted again over a new one."""
        engine.said = [WELL, None, WELL]
        await served.outcome(await pulled(hand, "r0"))

        assert await served.outcome(await pulled(hand)) == ("completed", "")

    @pytest.mark.parametrize("is_kept", [False, True], ids=["a new connection", "a kept one"])
    async def test_one_halted_at_once_ends_as_well(self, served, engine, hand, is_kept):
        """Before its task had a turn: the client is told, and an engine that was asked already is rid of it."""
        if is_kept:
            await served.outcome(await pulled(hand, "r0"))
        engine.said = [BEGUN]
        one = served.start(await pulled(hand))
        one.halt(Stop("cancelled", "at once"))
        await served.settled()

        [result] = await hand.results("r1")
        assert (result.outcome, result.reason) == ("cancelled", "at once")
        assert one.stage == "gone"
        await until(lambda: all(talk.done() for talk in engine.talks))

    async def test_whose_epoch_ends_says_nothing(self, served, engine, hand):
        """The worker is fenced or told to go: whatever it would say of the request is not its own to say."""
        engine.said = [BEGUN]
        one = served.start(await pulled(hand))
        await until(lambda: one.first_token_at)

        one.task.cancel()
        await asyncio.wait([one.task])

        assert one.task.cancelled()
        assert one.stage == "running"
        served.endpoint._drop_all()
        assert await hand.rewards("r1") == await hand.results("r1") == []

    async def test_what_was_decided_before_the_epoch_ends_is_said(self, served, engine, hand):
        """Cancelled and told to go in one moment: the task obeys the latter, and the client hears of the former."""
        engine.said = [BEGUN]
        one = served.start(await pulled(hand))
        await until(lambda: one.first_token_at)

        one.halt(Stop("cancelled", "not wanted"))
        one.task.cancel()
        await asyncio.wait([one.task])
        await served.settled()

        assert one.task.cancelled()
        assert [result.reason for result in await hand.results("r1")] == ["not wanted"]

    async def test_it_is_watched_from_then_on(self, served, engine, hand):
        """For a first token, and then for the next."""
        watched, settings = served.endpoint._vigil, served.settings
        engine.said = [BEGUN]
        one = served.start(await pulled(hand))
        assert settings.stall_s < watched.due_s() <= settings.first_token_s

        await until(lambda: one.first_token_at)

        assert watched.due_s() <= settings.stall_s
        one.halt(Stop("returned"))


class TestHeard:
    @pytest.mark.parametrize("is_kept", [False, True], ids=["a new connection", "a kept one"])
    async def test_a_stream_is_written_as_it_comes(self, served, engine, hand, is_kept):
        """The first token in the moment in which it comes, the rest soon; the log, the record and the reward agree."""
        if is_kept:
            await served.outcome(await pulled(hand, "r0"))
        engine.said = [BEGUN]
        one = served.start(await pulled(hand, stream=True))
        await until(lambda: hand.tokens("r1"))

        assert await hand.text("r1") == "so far"
        assert one.first_token_at is not None
        one.halt(Stop("returned", "enough"))
        await served.settled()
        assert await hand.text("r1") == "so far"
        assert [reward.outcome for reward in await hand.rewards("r1")] == ["returned"]

    async def test_the_first_piece_does_not_wait_for_others(self, hand, engine):
        """Pieces gather for a while; the first is what somebody waits for."""
        async with Served(hand, engine, tokens_s=3600.0).working() as served:
            engine.said = [BEGUN]
            one = served.start(await pulled(hand, stream=True))

            await until(lambda: hand.tokens("r1"))

            one.halt(Stop("returned", "enough"))

    async def test_later_pieces_follow_soon(self, served, engine, hand):
        """Not with the end: somebody reads along. Of a quiet one nobody does, and nothing is written."""
        engine.said = 2 * [[BEGUN, chunk(PIECE)]]
        quiet = served.start(await pulled(hand, "quiet"))
        await until(lambda: quiet.gap_max_s)
        one = served.start(await pulled(hand, stream=True))

        async def has_all():
            return await hand.text("r1") == "so farso far"

        await until(has_all)
        assert await hand.tokens("quiet") == []
        one.halt(Stop("returned"))
        quiet.halt(Stop("returned"))

    async def test_times_are_of_tokens(self, served, engine, hand, monkeypatch):
        """A second passes each time that the engine says something; what keeps a connection alive is no token."""
        ticks = itertools.count(100.0)
        monkeypatch.setattr(serving, "perf_counter", lambda: next(ticks))
        engine.said = [
            [BEGUN, chunk(b": alive\n\n"), chunk(PIECE), chunk(PIECE), chunk(FOUR) + chunk(b"")]
        ]

        assert await served.outcome(await pulled(hand)) == ("completed", "")

        [reward] = await hand.rewards("r1")
        assert (reward.prefill_s, reward.gap_max_s) == (1.0, 2.0)
        assert reward.tpot_s == pytest.approx(4.0 / 3)
        assert served.meter.gaps["e0"].buckets()[1] == 4.0
        assert served.endpoint.rhythm.step_s == 0.0, "nothing decodes any more"
        assert served.endpoint.health.heard_tick == 105.0

    async def test_who_waits_is_looked_at_when_something_changes(self, served, engine, hand):
        """With a first token and with an end; where nobody waits nobody is woken."""
        changed = served.endpoint._changed
        engine.said = [[BEGUN, chunk(ANSWER)]]
        one = served.start(await pulled(hand))
        changed.clear()
        await until(lambda: one.answer.is_done)
        waiting = served.hold(await pulled(hand, "waits"))
        changed.clear()
        one.halt(Stop("returned"))
        await served.settled()
        assert changed.is_set()

        engine.said = [BEGUN]
        two = served.start(await pulled(hand, "r2"))
        changed.clear()
        await until(lambda: two.first_token_at)
        assert changed.is_set()
        two.halt(Stop("returned"))
        served.endpoint._return_held("enough")
        assert waiting.stage == "ending"

    async def test_a_quiet_answer_has_no_log(self, served, hand):
        """It is in the record."""
        assert await served.outcome(await pulled(hand)) == ("completed", "")

        assert await hand.tokens("r1") == []
        [result] = await hand.results("r1")
        assert b'"hi"' in result.body
        assert served.endpoint.rhythm.answers.usual_tokens == 1


class TestFailure:
    @pytest.mark.parametrize("is_kept", [False, True], ids=["a new connection", "a kept one"])
    @pytest.mark.parametrize(
        ("said", "words"),
        [
            pytest.param(BEGUN + chunk(b""), "without a finish reason", id="half of one"),
            pytest.param(page(b'{"message":"no room"}', 500), "no room", id="an error"),
            pytest.param(CHUNKED + chunk(b"garbage\n\n"), "garbage", id="garbage"),
        ],
    )
    async def test_what_is_no_answer_goes_back(self, served, engine, hand, is_kept, said, words):
        """Whichever way it was asked; with what was wrong."""
        if is_kept:
            await served.outcome(await pulled(hand, "r0"))
        engine.said = [said]

        outcome, reason = await served.outcome(await pulled(hand))

        assert (outcome, words in reason) == ("returned", True)

    async def test_a_bug_is_its_own(self, served, engine, hand, monkeypatch):
        """A request that trips one goes back with its name, the log has the traceback, and others are served."""

        def trip(*_):
            raise ZeroDivisionError("by nobody")

        with monkeypatch.context() as broken, structlog.testing.capture_logs() as logs:
            broken.setattr(served.endpoint.rhythm, "first", trip)
            outcome, reason = await served.outcome(await pulled(hand))

        assert (outcome, "ZeroDivisionError: by nobody" in reason) == ("returned", True)
        assert [one["request_id"] for one in logs if one["event"] == "serving_failed"] == ["r1"]
        assert await served.outcome(await pulled(hand, "r2")) == ("completed", "")

    async def test_failures_in_a_row_send_the_held_away(self, hand, engine):
        """The engine is away with the last of them: those who wait for it learn it at once, and beats have said so."""
        async with Served(hand, engine, failures_max=2).working() as served:
            await hand.redis.command("HSET", hand.keys.endpoint("e0"), "epoch", "0")
            waiting = served.hold(await pulled(hand, "waits"))
            engine.said = 2 * [page(b"broken", 500)]
            await served.outcome(await pulled(hand, "r1"))
            assert (waiting.stage, served.endpoint.health.away) == ("held", "")
            assert served.endpoint.health.load_at is None, "a status explains itself"

            await served.outcome(await pulled(hand, "r2"))

            assert "2 requests failed in a row" in served.endpoint.health.away
            assert [beat.state for beat in await hand.beats()] == ["away"]
            [reward] = await hand.rewards("waits")
            assert (reward.outcome, "engine away" in reward.reason) == ("returned", True)

    async def test_a_success_between_them_counts_anew(self, hand, engine):
        """In a row means in a row."""
        async with Served(hand, engine, failures_max=2).working() as served:
            engine.said = [page(b"broken", 500), WELL, page(b"broken", 500)]
            for name in ("r1", "r2", "r3"):
                await served.outcome(await pulled(hand, name))

            assert served.endpoint.health.away == ""

    async def test_a_broken_engine_is_asked_before_more_is_sent(self, served, engine, hand):
        """Nobody knows what a connection that breaks off means; the held are tried again once it has answered."""
        engine.said = [None]
        served.start(await pulled(hand))
        served.endpoint._changed.clear()
        await served.settled()

        assert served.endpoint.health.away == ""
        assert served.endpoint._changed.is_set()
        assert served.endpoint.health.load_at is not None, "it was asked"

    async def test_a_broken_engine_that_is_away_sends_the_held_away(self, served, engine, hand):
        """Its one failure, and its own word for it, are enough."""
        await hand.redis.command("HSET", hand.keys.endpoint("e0"), "epoch", "0")
        served.hold(await pulled(hand, "waits"))
        engine.said, engine.pages["/health"] = [None], page(b"", 503)

        await served.outcome(await pulled(hand))

        assert served.endpoint.health.away == "/health says 503"
        assert [reward.outcome for reward in await hand.rewards("waits")] == ["returned"]

    async def test_an_engine_that_does_not_know_a_model_is_asked_which(self, served, engine, hand):
        """Behind a proxy it may be another one by now; it is no failure of its own."""
        engine.said = [page(b"no such model", 404)]
        engine.pages["/v1/models"] = page(b'{"data":[{"id":"other"}]}')

        assert (await served.outcome(await pulled(hand)))[0] == "returned"

        assert served.endpoint.health.models == ("other",)
        assert served.endpoint.health._failures == 0

    async def test_one_given_up_is_a_failure_of_its_engine(self, hand, engine):
        """Silence counts as one; who had said all of it has an answer all the same."""
        async with Served(hand, engine, failures_max=1).working() as served:
            await hand.redis.command("HSET", hand.keys.endpoint("e0"), "epoch", "0")
            engine.said = [CHUNKED + chunk(ANSWER), BEGUN]
            done = served.start(await pulled(hand, "done"))
            begun = served.start(await pulled(hand, "begun"))
            await until(lambda: done.answer.is_done and begun.first_token_at)

            for one in (done, begun):
                one.halt(Stop("silent", "the engine was silent"))
            await served.settled()

            assert [one.outcome for one in await hand.rewards("done")] == ["completed"]
            [reward] = await hand.rewards("begun")
            assert (reward.outcome, reward.reason) == ("returned", "the engine was silent")
            assert "the engine was silent" in served.endpoint.health.away
            await until(hand.beats)
            assert [beat.state for beat in await hand.beats()] == ["away"]

    async def test_one_that_said_all_of_nothing_has_failed(self, served, engine, hand):
        """[DONE] alone is no answer, however it was ended."""
        engine.said = [CHUNKED + chunk(b"data: [DONE]\n\n")]
        one = served.start(await pulled(hand))
        await until(lambda: one.answer.is_done)
        one.halt(Stop("silent", "the engine was silent"))
        await served.settled()

        [reward] = await hand.rewards("r1")
        assert (reward.outcome, "without a finish reason" in reward.reason) == ("returned", True)


class TestHalves:
    @pytest.mark.parametrize("is_kept", [False, True], ids=["a new connection", "a kept one"])
    async def test_a_prefill_leg_is_one_answer(self, served, engine, hand, is_kept):
        """No log, no record; what it cost and where its KV is. It speaks for its engine, as any answer."""
        if is_kept:
            await served.outcome(await pulled(hand, "r0"))
        engine.said = [page(b"broken", 500), page(PARKED)]
        await served.outcome(await pulled(hand, "fails"))
        assert served.endpoint.health._failures == 1
        one = await pulled(hand, job_leg="prefill", stream=True)

        assert await served.outcome(one) == ("prefilled", "")

        [reward] = await hand.rewards("r1")
        assert (reward.prompt_tokens, reward.output_tokens, reward.kv_params) == (3, 1, CLAIM)
        assert reward.prefill_s >= 0
        assert await hand.redis.command("GET", hand.keys.kv("r1")) == b'{"at":1}'
        assert await hand.tokens("r1") == await hand.results("r1") == []
        assert served.endpoint.health._failures == 0
        assert served.endpoint.health.heard_tick > 0
        assert len(served.endpoint.rhythm._prefilled) == 1 + is_kept

    async def test_what_cannot_be_parted_asks_nobody(self, served, engine, hand):
        """Its decode leg computes it all; this engine has no part in it."""
        engine.said = [page(PARKED)]
        one = await pulled(hand, job_leg="prefill")
        one.body["n"] = 2

        assert await served.outcome(one) == ("prefilled", "")

        assert len(engine.said) == 1
        [reward] = await hand.rewards("r1")
        assert (reward.first_token_at, reward.prefill_s) == (None, None)
        assert await hand.redis.command("GET", hand.keys.kv("r1")) == NO_KV

    @pytest.mark.parametrize(
        ("said", "failures"),
        [
            pytest.param([page(b"no KV", 500)], 0, id="before its first token"),
            pytest.param([BEGUN + chunk(b"")], 1, id="after it"),
        ],
    )
    async def test_where_kv_cannot_be_fetched_nobody_knows_whose_fault_it_is(
        self, served, engine, hand, said, failures
    ):
        """The engine that decodes is asked how it is, and not blamed; once it speaks it is alone."""
        engine.said = said
        fields = {"job_leg": "decode", "job_kv_params": b'{"at":1}'}

        outcome, _ = await served.outcome(await pulled(hand, **fields))

        assert outcome == "returned"
        assert served.endpoint.health._failures == failures
        assert served.endpoint.health.load_at is not None
