"""Posts to an engine that is played byte by byte: what its client makes of every way to answer."""

import asyncio
import base64
import contextlib

import pytest

from scheduler.errors import EngineError
from workers import posts as posting
from workers.posts import ERROR_BYTES, HEAD_BYTES, Posts, StaleError

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

DONE = CHUNKED + b"0\r\n\r\n"
"A whole answer, and the connection is kept."


async def read():
    """A few turns of the loop: the other end, in this process too, has what was written."""
    for _ in range(3):
        await asyncio.sleep(0)


class Played:
    """A server that answers its posts with these bytes in turn; `None` closes the connection without a word.

    A list is said piece by piece, each of which the other end reads by itself.
    """

    def __init__(self, *answers):
        self.answers = list(answers)
        self.posted = []
        self.connections = 0
        self.closed = asyncio.Event()
        self.talks = []

    async def talk(self, reader, writer):
        self.connections += 1
        self.talks.append(asyncio.current_task())
        try:
            while self.answers:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().partition(b"content-length:")[2].split()[0])
                self.posted.append(head + await reader.readexactly(size))
                answer = self.answers.pop(0)
                for piece in answer if isinstance(answer, list) else [answer]:
                    if piece is None:
                        return
                    writer.write(piece)
                    await read()
                if b"ends with the connection" in piece:
                    break
            else:
                await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            self.closed.set()


@contextlib.asynccontextmanager
async def played(*answers, headers=None, login="", path=""):
    server = Played(*answers)
    listening = await asyncio.start_server(server.talk, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    posts = Posts(f"http://{login}127.0.0.1:{port}{path}", headers or {}, connect_s=5.0)
    try:
        yield server, posts
    finally:
        posts.close()
        listening.close()
        await asyncio.gather(*server.talks)


async def said(posts, heard=lambda _: None):
    return await posts.send("/v1/completions", b"{}", {"X-Request-Id": "r-1"}, heard)


async def test_a_post_is_what_was_asked_for():
    """Path, the engine's headers, the request's own and the body arrive as one request."""
    async with played(
        CHUNKED + b"0\r\n\r\n", headers={"Authorization": "Bearer k"}, path="/of"
    ) as (
        server,
        posts,
    ):
        await said(posts)

    head, _, body = server.posted[0].partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    assert first == b"POST /of/v1/completions HTTP/1.1"
    assert {b"Authorization: Bearer k", b"X-Request-Id: r-1", b"Content-Length: 2"} < set(lines)
    assert lines[0].startswith(b"Host: 127.0.0.1:")
    assert not any(line.startswith(b"Authorization: Basic") for line in lines)
    assert body == b"{}"


async def test_a_login_in_the_url_is_sent_as_browsers_do():
    """What had to be quoted there is as it was before; and it is no part of the host."""
    async with played(DONE, login="me:p%40ss%3A@") as (server, posts):
        await said(posts)

    lines = server.posted[0].split(b"\r\n")
    assert b"Authorization: Basic " + base64.b64encode(b"me:p@ss:") in lines
    assert any(line.startswith(b"Host: 127.0.0.1:") for line in lines)


async def test_what_comes_is_heard_and_the_connection_is_kept():
    """Every byte of a success is heard, in order, and the next post goes over the same connection."""
    heard = []
    async with played(CHUNKED + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", CHUNKED + b"0\r\n\r\n") as (
        server,
        posts,
    ):
        assert await said(posts, heard.append) == (200, b"")
        assert await said(posts) == (200, b"")

        assert b"".join(heard) == b"abcde"
        assert server.connections == 1


@pytest.mark.parametrize(
    "ending",
    [
        pytest.param(b"Connection: close\r\nContent-Length: 2\r\n\r\nab", id="it says so"),
        pytest.param(b"X: ends with the connection\r\n\r\nab", id="no length"),
    ],
)
async def test_a_connection_that_is_not_kept_is_not_used_again(ending):
    """Where the engine closes behind its answer the answer counts, and the next post has a new connection."""
    heard = []
    async with played(b"HTTP/1.1 200 OK\r\n" + ending, CHUNKED + b"0\r\n\r\n") as (server, posts):
        assert await said(posts, heard.append) == (200, b"")
        assert await said(posts) == (200, b"")

        assert heard == [b"ab"]
        assert server.connections == 2


async def test_an_error_is_told_with_its_body_and_never_heard():
    """A status other than 200 comes back with its body, all of it."""
    heard = []
    answer = [b"HTTP/1.1 400 Bad Request\r\nContent-Length: 5\r\n\r\nwr", b"ong"]
    async with played(answer) as (_, posts):
        assert await said(posts, heard.append) == (400, b"wrong")
    assert not heard


async def test_an_endless_error_is_read_to_its_bound():
    """Of an error only so much is read, and its connection is not used again."""
    answer = b"HTTP/1.1 500 Oh\r\nContent-Length: 999999999\r\n\r\n" + b"x" * ERROR_BYTES
    async with played(answer, CHUNKED + b"0\r\n\r\n") as (server, posts):
        status, error = await said(posts)
        await said(posts)

        assert (status, len(error)) == (500, ERROR_BYTES)
        assert server.connections == 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        pytest.param(None, "closed before the answer", id="nothing"),
        pytest.param(
            CHUNKED + b"ff\r\nends with the connection", "broke off", id="half of an answer"
        ),
        pytest.param(b"SSH-2.0-nobody\r\n\r\n", "no HTTP", id="another protocol"),
        pytest.param(b"HTTP/1.1 200 OK\r\nX: " + b"x" * HEAD_BYTES, "head", id="endless head"),
        pytest.param(
            CHUNKED + b"1\r\na\r\n0\r\n" + b"X: x\r\n" * HEAD_BYTES, "trailer", id="endless trailer"
        ),
        pytest.param(
            CHUNKED + b"1;x=" + b"x" * 9 * HEAD_BYTES, "trailer", id="endless chunk extension"
        ),
        pytest.param(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
            "another protocol, unasked",
            id="switch",
        ),
        pytest.param(2 * (CHUNKED + b"1\r\na\r\n0\r\n\r\n"), "two answers", id="two answers"),
    ],
)
async def test_what_is_no_answer_is_an_engines_error(answer, reason):
    """Whatever breaks the exchange says how, and leaves no connection behind."""
    async with played(answer) as (server, posts):
        with pytest.raises(EngineError, match=reason):
            await said(posts)
        await server.closed.wait()


async def test_a_connection_closed_before_a_first_answer_is_no_stale_one():
    """It was new: the engine had it, and may have the request."""
    async with played(None, DONE) as (server, posts):
        with pytest.raises(EngineError) as caught:
            await said(posts)

        assert caught.type is EngineError
        assert len(server.posted) == 1


async def test_a_stale_connection_is_written_to_once_more():
    """Closed in the moment in which it is posted to: nobody has read that, and it is no answer either."""
    async with played(DONE, None, DONE) as (server, posts):
        await said(posts)

        assert await said(posts) == (200, b"")

        assert (server.connections, len(server.posted)) == (2, 3)


async def test_what_was_begun_on_a_stale_one_says_so():
    """Who began it sends it again."""
    async with played(DONE, None) as (_, posts):
        await said(posts)
        reply = posts.begin("/v1/completions", b"{}", {}, print)

        with pytest.raises(StaleError):
            await reply


@pytest.mark.parametrize(
    ("answer", "stale_s"),
    [
        pytest.param(None, 0.0, id="it had time to"),
        pytest.param([b"HTTP/1.1 100 Continue\r\n\r\n", None], 9.0, id="it had taken it"),
        pytest.param([b"HTTP/1.1 2", None], 9.0, id="it had begun to answer"),
    ],
)
async def test_what_may_have_been_served_is_not_posted_again(monkeypatch, answer, stale_s):
    """A request would run twice: the asker hears of it, and decides."""
    monkeypatch.setattr(posting, "STALE_S", stale_s)
    async with played(DONE, answer, DONE) as (server, posts):
        await said(posts)

        with pytest.raises(EngineError) as caught:
            await said(posts)

        assert caught.type is EngineError
        assert len(server.posted) == 2


@pytest.mark.parametrize(
    "idle",
    [
        pytest.param([DONE, None], id="closed"),
        pytest.param([DONE, b"HTTP/1.1 200 OK\r\n"], id="a word that nobody asked for"),
    ],
)
async def test_what_is_kept_is_watched(idle):
    """An end, or anything unasked, while a connection is idle: it is not written to again, and nothing is raised."""
    troubles = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: troubles.append(context))
    async with played(idle, DONE) as (server, posts):
        await said(posts)
        await server.closed.wait()
        await read()

        assert posts.begin("/v1/completions", b"{}", {}, print) is None
        assert await said(posts) == (200, b"")

        assert (server.connections, troubles) == (2, [])


async def test_an_idle_connection_is_kept_for_so_long(monkeypatch):
    """Then it is closed, when next one is looked for."""
    async with played(DONE, DONE) as (server, posts):
        await said(posts)
        monkeypatch.setattr(posting, "KEPT_S", -1.0)

        assert await said(posts) == (200, b"")

        assert server.connections == 2
        await server.closed.wait()


async def test_nobody_listens():
    """An engine that is away is said to be."""
    async with played() as (_, posts):
        pass
    with pytest.raises(EngineError, match="connection: "):
        await said(posts)


async def test_early_words_are_passed_over():
    """A 100 before the answer is not the answer."""
    answer = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab"
    heard = []
    async with played(answer) as (_, posts):
        assert await said(posts, heard.append) == (200, b"")
    assert heard == [b"ab"]


async def test_who_goes_takes_the_connection_along():
    """Cancelled in the middle of an answer the engine sees the end of the connection, and nothing more is heard."""
    async with played(CHUNKED + b"3\r\nabc\r\n") as (server, posts):
        begun = asyncio.Event()
        asking = asyncio.create_task(said(posts, lambda _: begun.set()))
        await begun.wait()
        asking.cancel()

        with pytest.raises(asyncio.CancelledError):
            await asking
        await server.closed.wait()


async def test_what_the_hearer_raises_is_the_askers():
    """Garbage ends the exchange with the hearer's own error."""

    def heard(_):
        raise EngineError("garbage in the stream")

    async with played(CHUNKED + b"3\r\nabc\r\n") as (server, posts):
        with pytest.raises(EngineError, match="garbage"):
            await said(posts, heard)
        await server.closed.wait()


async def test_a_header_ends_where_its_line_ends():
    """A value with a line break in it would be another header: it is refused."""
    async with played() as (_, posts):
        for value in ("r\r\nX: y", "r\nX: y", "r\rX: y"):
            with pytest.raises(EngineError, match="line break") as caught:
                await posts.send("/v1/completions", b"{}", {"X-Request-Id": value}, print)
            assert not caught.value.retryable


async def test_a_kept_connection_is_written_to_at_once():
    """What is begun needs no turn of the loop to be written; without a kept connection nothing is."""
    async with played(CHUNKED + b"0\r\n\r\n", CHUNKED + b"0\r\n\r\n") as (server, posts):
        asked = ("/v1/completions", b"{}", {"X-Request-Id": "r-1"}, lambda _: None)
        assert posts.begin(*asked) is None
        await posts.send(*asked)

        reply = posts.begin(*asked)

        assert reply is not None
        assert await reply == (200, b"")
        assert (server.connections, len(server.posted)) == (1, 2)


async def test_who_gives_up_what_was_begun_takes_the_connection_along():
    """Cancelling the reply is all that it takes for the engine to see the end of the connection."""
    async with played(CHUNKED + b"0\r\n\r\n", CHUNKED + b"3\r\nabc\r\n") as (server, posts):
        asked = ("/v1/completions", b"{}", {"X-Request-Id": "r-1"})
        await posts.send(*asked, lambda _: None)
        begun = asyncio.Event()
        reply = posts.begin(*asked, lambda _: begun.set())
        await begun.wait()

        reply.cancel()

        await server.closed.wait()
