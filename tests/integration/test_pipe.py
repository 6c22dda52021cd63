"""Our own connection to a plain server: everybody gets the replies to what they asked, or learns that they will not."""

import asyncio
import time

import pytest
from servers import BINARIES, serving

from dispatcher.streams import dispatch
from dispatcher.streams.connection import Connection
from dispatcher.streams.pipe import Address, Pipe
from dispatcher.streams.where import Where
from scheduler.keys import Keys

LIMIT_S = 10


@pytest.fixture
async def pipe(redis_url):
    one = Pipe(Address.of(Where(url=redis_url)))
    yield one
    one.close()


async def ask(pipe, *commands):
    return await pipe.ask(commands, limit_s=LIMIT_S)


class TestPipe:
    async def test_everybody_gets_their_own(self, pipe):
        """Many who ask at once over one connection are answered each with theirs."""
        asked = [ask(pipe, *[("ECHO", f"{who}.{n}") for n in range(who)]) for who in range(50)]

        answers = await asyncio.gather(*asked)

        assert answers == [[f"{who}.{n}".encode() for n in range(who)] for who in range(50)]

    async def test_a_complaint_is_a_reply(self, pipe):
        """What the server refuses does not touch what stands beside it."""
        first, refused, last = await ask(pipe, ("ECHO", "a"), ("NONSENSE",), ("ECHO", "b"))

        assert (first, last) == (b"a", b"b")
        assert "unknown command" in str(refused)

    async def test_who_gives_up_takes_nothing_along(self, pipe):
        """After a cancelled asker the next one gets its own replies, not his."""
        await ask(pipe, ("PING",))
        impatient = asyncio.create_task(ask(pipe, ("BLPOP", "nothing", "0.05")))
        await asyncio.sleep(0)
        impatient.cancel()

        assert await ask(pipe, ("ECHO", "mine")) == [b"mine"]
        assert impatient.cancelled()

    async def test_a_lost_connection_is_told_to_all_and_made_anew(self, pipe, redis_url):
        """Nothing is said again behind one's back; the next question opens a new connection."""
        [number] = await ask(pipe, ("CLIENT", "ID"))
        waiting = [asyncio.create_task(ask(pipe, ("BLPOP", "nothing", "9"))) for _ in range(2)]
        other = Pipe(Address.of(Where(url=redis_url)))
        while (await ask(other, ("CLIENT", "KILL", "ID", number))) != [1]:
            pass

        for answer in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(answer, ConnectionError)
        assert (await ask(pipe, ("CLIENT", "ID")))[0] > number
        other.close()

    async def test_what_is_begun_is_on_its_way(self, pipe):
        """What is begun is written at once, before what others ask later; without a connection nothing is begun."""
        assert pipe.begin([("INCR", "n")]) is None

        await ask(pipe, ("DEL", "n"))
        later = asyncio.create_task(ask(pipe, ("INCR", "n")))
        begun = pipe.begin([("INCR", "n")])

        assert await pipe.replies(begun, limit_s=LIMIT_S) == [1]
        assert await later == [2]

    async def test_what_is_begun_can_be_lengthened(self, pipe):
        """More goes behind what was begun as long as nothing else was asked, and its replies come with those."""
        await ask(pipe, ("DEL", "n"))
        begun = pipe.begin([("INCR", "n")])
        assert pipe.extend(begun, [("INCR", "n"), ("INCR", "n")])
        other = pipe.begin([("INCR", "n")])

        assert not pipe.extend(begun, [("INCR", "n")]), "its replies would be another's"
        assert await pipe.replies(begun, limit_s=LIMIT_S) == [1, 2, 3]
        assert await pipe.replies(other, limit_s=LIMIT_S) == [4]
        assert not pipe.extend(other, [("INCR", "n")]), "it has all it asked for"

    async def test_who_is_to_be_told_is_told_first(self, pipe):
        """Replies are told of before any task has its turn, and what is raised then is the asker's alone."""
        await ask(pipe, ("PING",))
        told = []

        def came(replies):
            told.append(replies)
            raise LookupError("not what was expected")

        fine = asyncio.create_task(pipe.ask([("ECHO", "a")], limit_s=LIMIT_S, came=told.append))
        fine.add_done_callback(lambda _: told.append("asker"))
        assert await fine == [b"a"]
        with pytest.raises(LookupError):
            await pipe.ask([("ECHO", "b")], limit_s=LIMIT_S, came=came)

        assert told == [[b"a"], "asker", [b"b"]]
        assert await ask(pipe, ("ECHO", "mine")) == [b"mine"]

    async def test_silence_is_not_waited_out(self, pipe):
        """What comes after the limit is nobody's: the connection is given up with it."""
        with pytest.raises(TimeoutError):
            await pipe.ask([("BLPOP", "nothing", "0.1")], limit_s=0.01)

        assert await ask(pipe, ("ECHO", "mine")) == [b"mine"]

    async def test_a_reply_in_the_turn_of_its_limit_counts(self, pipe):
        """It was told already to who is told first: to say then that nothing came would tell it twice, or never."""
        await ask(pipe, ("PING",))
        told = []
        begun = pipe.begin([("ECHO", "late")], told.append)
        waiting = asyncio.ensure_future(pipe.replies(begun, limit_s=0.01))
        await asyncio.sleep(0)

        time.sleep(0.1)  # noqa: ASYNC251  the loop is held up: reply and limit come in one turn

        assert await waiting == [b"late"]
        assert told == [[b"late"]]

    async def test_it_logs_in_and_selects(self, redis_url, pipe):
        """User, password and database of the URL hold for every new connection."""
        await ask(pipe, ("ACL", "SETUSER", "me", "on", ">it", "+@all", "~*"))
        where = Where(url=redis_url.replace("redis://", "redis://me:it@").replace("/0", "/3"))
        mine = Pipe(Address.of(where))

        who, _, there = await ask(mine, ("ACL", "WHOAMI"), ("SET", "x", "1"), ("GET", "x"))

        assert (who, there, await ask(pipe, ("GET", "x"))) == (b"me", b"1", [None])
        mine.close()
        await ask(pipe, ("ACL", "DELUSER", "me"))

    async def test_who_is_turned_away_has_no_answer(self, tmp_path):
        """A server without room says so and closes: that is nobody's reply, and all who asked learn of it."""
        bugs = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: bugs.append(what))
        with serving(next(iter(BINARIES.values())), tmp_path, "maxclients 1") as port:
            inside, outside = (Pipe(Address("127.0.0.1", port, "", ())) for _ in range(2))
            assert await ask(inside, ("PING",)) == [b"PONG"]

            for _ in range(50):
                with pytest.raises(ConnectionError, match="max number of clients"):
                    await ask(outside, ("PING",))
            with pytest.raises(ConnectionError):
                await ask(outside, ("PING",), ("PING",))
            inside.close()

        assert not bugs

    async def test_a_password_that_the_server_does_not_want(self, redis_url):
        """It is let pass, as over redis-py's connections: both kinds agree on who may in."""
        mine = Pipe(Address.of(Where(url=redis_url, password="idle")))

        assert await ask(mine, ("ECHO", "in")) == [b"in"]
        mine.close()


async def test_what_was_begun_and_lost_is_said_again(redis_url, pool):
    """A call that was under way when its connection went is said over another, like any other call."""
    connection = await Connection.connect(Where(url=redis_url))
    keys = Keys("hg", pool)
    call = dispatch.lead(keys, "node", ttl_s=60)
    await connection.batch([call])  # opens the pipe

    begun = connection.begin([call])
    assert begun is not None
    connection._calls.close()  # before its reply can come
    [reply] = await connection.batch([call], begun)

    assert reply[1] == b"node"
    await connection.close()
