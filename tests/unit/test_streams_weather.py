"""What redis-py raises, as the one error that everybody else knows."""

import asyncio
from urllib.parse import urlsplit

import pytest
from redis.asyncio.connection import Connection

from dispatcher.streams.weather import Weather
from scheduler.errors import StreamError


async def test_a_write_to_a_lost_connection_is_weather():
    """uvloop says so with a bare RuntimeError, which nobody above would catch."""
    lost = "unable to perform operation on <TCPTransport closed=True>; the handler is closed"
    with pytest.raises(StreamError, match="the handler is closed"), Weather("redis://h"):
        raise RuntimeError(lost)


async def test_a_write_to_a_closed_connection_is_weather(redis_url):
    """A Cluster's client closes all that it has where one node fails, under those who are about to write."""
    where = urlsplit(redis_url)
    connection = Connection(host=where.hostname, port=where.port, socket_timeout=5)
    await connection.connect()
    writing = asyncio.create_task(connection.send_command("PING"))
    await asyncio.sleep(0)
    await connection.disconnect(nowait=True)

    with pytest.raises(StreamError, match="writelines"), Weather(redis_url):
        await writing


async def test_any_other_is_a_bug():
    """A bug is not weather: it ends the process."""
    with pytest.raises(RuntimeError), Weather("redis://h"):
        raise RuntimeError("no such thing")
    with pytest.raises(AttributeError), Weather("redis://h"):
        raise AttributeError(name="writelines", obj=object())
