"""A batch on a real server: every line gets its answer once, whatever ends the run."""

import asyncio
import contextlib
import json
import os
import resource

import pytest
from played import Played

from dispatcher.batch import Batch
from dispatcher.client import Client
from scheduler.errors import SettingsError
from scheduler.settings import LimitSettings


@pytest.fixture
async def played(redis_url, pool):
    """The servers' parts, not running."""
    parts = await Played.start(redis_url, pool)
    yield parts
    await parts.close()


@pytest.fixture
def batch_of(tmp_path):
    """A batch of these lines, its files in a directory of their own."""

    def of(lines, **more):
        source = tmp_path / "in.jsonl"
        source.write_text("".join(f"{one}\n" for one in lines))
        return Batch(source, tmp_path / "out.jsonl", **more)

    return of


def line(custom_id, text="hi", **more):
    body = {"model": "llama", "prompt": text}
    row = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}
    return json.dumps(row | more)


def written(path):
    return [json.loads(one) for one in path.read_text().splitlines()]


async def carried(batch, url, pool, **more):
    told = []
    limits = more.pop("limits", None)
    async with Client(redis=url, pool=pool, name=batch.client_name, limits=limits) as client:
        await batch.run(client, wishes={}, told=told.append, moved=lambda _: None, **more)
    return told


@contextlib.asynccontextmanager
async def serving(parts):
    running = asyncio.create_task(parts.run())
    try:
        yield
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


class TestBatch:
    async def test_a_line_in_is_a_line_out(self, played, batch_of, redis_url, pool, tmp_path):
        """OpenAI's own shape, more lines than may be in flight, any order."""
        batch = batch_of([line(f"c{n}", f"say {n}") for n in range(40)])

        async with serving(played):
            told = await carried(batch, redis_url, pool, in_flight=7)

        answers = {one["custom_id"]: one for one in written(tmp_path / "out.jsonl")}
        assert told == []
        assert len(answers) == 40
        assert answers["c3"]["error"] is None
        assert answers["c3"]["response"]["status_code"] == 200
        assert answers["c3"]["response"]["body"]["choices"][0]["text"] == "say 3 "
        assert answers["c3"]["response"]["request_id"] == batch.request_id("c3")

    async def test_a_killed_run_goes_on_where_it_stopped(
        self, played, batch_of, redis_url, pool, tmp_path
    ):
        """Answers written are kept, requests in Redis are not sent twice, half a line is cut off."""
        lines = [line(f"c{n}", f"say {n}") for n in range(10)]
        first = asyncio.create_task(carried(batch_of(lines), redis_url, pool, in_flight=6))
        while await played.turn(block_s=1.0) == 0:
            pass
        while not (tmp_path / "out.jsonl").read_bytes():  # noqa: ASYNC110  a file has no event
            await asyncio.sleep(0)
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        with (tmp_path / "out.jsonl").open("a") as out:
            out.write('{"id":"batch_req_half a li')

        async with serving(played):
            second = batch_of(lines)
            await carried(second, redis_url, pool)

        answers = written(tmp_path / "out.jsonl")
        assert sorted(one["custom_id"] for one in answers) == sorted(f"c{n}" for n in range(10))
        assert len(await played.connection.entries(played.keys.requests)) == 10
        assert 0 < second.tally.written_before < 10

    async def test_bad_lines_are_named_and_the_rest_goes_on(
        self, played, batch_of, redis_url, pool, tmp_path
    ):
        """File, line and fault; in the errors' own file; and only once over two runs."""
        lines = [
            line("good"),
            "{",
            line("bad-url", url="/v1/embeddings"),
            line("bad-method", method="GET"),
            line("good"),
            "",
            json.dumps({"custom_id": "no-model", "body": {}}),
            json.dumps({"body": {}}),
            line("fails"),
            "[" * 10_000,
        ]
        for _ in range(2):
            batch = batch_of(lines, errors=tmp_path / "errors.jsonl")
            async with serving(played):
                told = await carried(batch, redis_url, pool)

        assert told == []
        assert [one["custom_id"] for one in written(tmp_path / "out.jsonl")] == ["good", "fails"]
        errors = {one["error"]["line"]: one["error"] for one in written(tmp_path / "errors.jsonl")}
        assert sorted(errors) == [2, 3, 4, 5, 7, 8, 10]
        assert "stands on line 1 too" in errors[5]["message"]
        assert "'model' is None" in errors[7]["message"]
        assert batch.tally.failed_before == 7

    async def test_a_mended_file_answers_what_it_mends(
        self, played, batch_of, redis_url, pool, tmp_path
    ):
        """A line's number says which one failed in the same file only; in another one it is another line."""
        no_model = json.dumps({"custom_id": "b", "body": {}})
        async with serving(played):
            await carried(batch_of([line("a"), "{", no_model]), redis_url, pool)
            batch = batch_of([line("a"), line("new"), line("b")])

            told = await carried(batch, redis_url, pool)

        assert told == []
        assert (batch.tally.written_before, batch.tally.completed, batch.tally.failed_before) == (
            1,
            2,
            0,
        )
        answers = [one["custom_id"] for one in written(tmp_path / "out.jsonl") if one["response"]]
        assert sorted(answers) == ["a", "b", "new"]

    async def test_a_failed_request_is_an_error_line(self, played, batch_of, redis_url, pool):
        """Its outcome is the code, its reason the message."""
        batch = batch_of([line("x")])

        told = []
        async with (
            Client(redis=redis_url, pool=pool, name=batch.client_name) as client,
            serving(played),
        ):
            tally = await batch.run(
                client, wishes={"tenant": "fail"}, told=told.append, moved=lambda _: None
            )

        assert (tally.completed, tally.failed) == (0, 1)
        assert told == ["in.jsonl, line 1: failed: as the test wants"]

    async def test_a_full_queue_only_slows_it_down(self, played, batch_of, redis_url, pool):
        """Turned away for want of room: sent again, never an error."""
        batch = batch_of([line(f"c{n}") for n in range(9)])

        async with serving(played):
            await carried(batch, redis_url, pool, limits=LimitSettings(waiting_max=2))

        assert (batch.tally.completed, batch.tally.failed) == (9, 0)

    async def test_two_runs_at_once_are_refused(self, played, batch_of, redis_url, pool, tmp_path):
        """The second finds the output locked and says so."""
        lines = [line("c0")]
        first = asyncio.create_task(carried(batch_of(lines), redis_url, pool))
        while not (tmp_path / "out.jsonl").exists():  # noqa: ASYNC110  a file has no event
            await asyncio.sleep(0)

        with pytest.raises(SettingsError, match="written by another run"):
            await carried(batch_of(lines), redis_url, pool)

        async with serving(played):
            await first


class TestItsFiles:
    @pytest.mark.parametrize("ours", ["out.jsonl", "errors.jsonl"])
    async def test_a_batch_is_not_answered_into_itself(self, batch_of, tmp_path, ours):
        """Its lines would be answers, those answers lines, and so on until the disk is full."""
        batch_of([line("c1")])
        (tmp_path / ours).symlink_to(tmp_path / "in.jsonl")

        with pytest.raises(SettingsError, match=f"{ours}' is the batch itself"):
            batch_of([line("c1")], errors=tmp_path / "errors.jsonl")

    @pytest.mark.parametrize(
        ("before", "message"),
        [
            pytest.param("a poem, the last line open", "ends in b'a poem", id="somebody's words"),
            pytest.param(None, "is no file", id="a pipe"),
        ],
    )
    async def test_what_is_not_ours_is_not_cut(
        self, batch_of, redis_url, pool, tmp_path, before, message
    ):
        """Only half a line of our own, which a crash left, is ever dropped."""
        out = tmp_path / "out.jsonl"
        os.mkfifo(out) if before is None else out.write_text(before)
        with contextlib.ExitStack() as held:
            if before is None:
                held.callback(os.close, os.open(out, os.O_RDWR))
            with pytest.raises(SettingsError, match=message):
                await carried(batch_of([line("c1")]), redis_url, pool)

        assert before is None or out.read_text() == before

    async def test_a_full_disk_is_said(self, batch_of, redis_url, pool, tmp_path):
        """It takes half a line and no more; the next run cuts that off and writes what is missing."""
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (100, limits[1])
        )  # the disk, as this process sees it
        try:
            with pytest.raises(SettingsError, match="File too large; run it again to go on"):
                await carried(batch_of(["not json"]), redis_url, pool)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        await carried(batch_of(["not json"]), redis_url, pool)

        assert [one["error"]["line"] for one in written(tmp_path / "out.jsonl")] == [1]
