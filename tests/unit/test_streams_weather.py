"""What redis-py raises, as the one error that everybody else knows."""

import pytest

from dispatcher.streams.weather import Weather
from scheduler.errors import StreamError


async def test_a_write_to_a_lost_connection_is_weather():
    """uvloop says so with a bare RuntimeError, which nobody above would catch."""
    lost = "unable to perform operation on <TCPTransport closed=True>; the handler is closed"
    with pytest.raises(StreamError, match="the handler is closed"), Weather("redis://h"):
        raise RuntimeError(lost)


async def test_any_other_is_a_bug():
    """A bug is not weather: it ends the process."""
    with pytest.raises(RuntimeError), Weather("redis://h"):
        raise RuntimeError("no such thing")
