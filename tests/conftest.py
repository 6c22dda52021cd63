"""Real servers for the tests: private, on free loopback ports, ended with the session.

`redis_url` and `pool` are what most tests want. A test that asks for `every_server` in place of `redis_url`
runs once on each kind of server this machine has: the embedded Valkey always, Debian's Redis where installed.
"""

import secrets
import signal
from collections.abc import AsyncIterator, Callable, Iterator

import hypothesis
import pytest
from hand import Hand
from servers import BINARIES

from dispatcher.local import Server
from dispatcher.resp import Connection

# By itself it would fail what takes 200 ms once: a busy machine is no bug.
hypothesis.settings.register_profile("house", deadline=None)
hypothesis.settings.load_profile("house")

# In the background of a script Ctrl-C is ignored, and whatever we start would ignore it too: some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest tests/engine --engine vllm` asks real servers what the emulator is asked otherwise."""
    parser.addoption("--engine", choices=("emulator", "vllm"), default="emulator")


@pytest.fixture(scope="session")
def server_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """One server a kind, started when first asked for."""
    running: dict[str, Server] = {}

    def of(name: str) -> Server:
        if name not in running:
            directory = tmp_path_factory.mktemp(name)
            running[name] = Server(directory=directory, binary=BINARIES[name]).start()
        return running[name]

    yield of
    for server in running.values():
        server.stop()


@pytest.fixture(scope="session")
def redis_server(server_of: Callable[[str], Server]) -> Server:
    """This session's private server; tests that stop or freeze a server start their own instead."""
    return server_of(next(iter(BINARIES)))


@pytest.fixture
def redis_url(redis_server: Server) -> str:
    """An empty Redis."""
    return _emptied(redis_server)


@pytest.fixture(params=list(BINARIES))
def every_server(request: pytest.FixtureRequest, server_of: Callable[[str], Server]) -> str:
    """An empty Redis of each kind in turn; its URL."""
    return _emptied(server_of(request.param))


@pytest.fixture
def pool() -> str:
    """A pool's name that no other test uses, so that a straggler of theirs is not read as ours."""
    return f"pool-{secrets.token_hex(4)}"


def _emptied(server: Server) -> str:
    with Connection(server.url, timeout_s=5) as connection:
        assert connection.call("FLUSHALL") == "OK"
        assert connection.call("FUNCTION", "FLUSH") == "OK"
    return server.url


@pytest.fixture
async def hand(redis_url: str, pool: str) -> AsyncIterator[Hand]:
    """Plays the dispatcher to a worker: hands jobs over and reads what comes of them."""
    player = await Hand.of(redis_url, pool)
    yield player
    await player.redis.close()
