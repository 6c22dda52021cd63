"""What a server complains of, in words that say what it wants."""

import pytest

from dispatcher.streams.weather import as_stream_error


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("ERR Function not found", "wanted a dispatcher that has connected once"),
        ("HELLO must be called with the client already authenticated", "HEADGATE_REDIS_PASSWORD"),
        ("You can't write against a read only replica.", "wanted its master"),
        ("OOM command not allowed when used memory > 'maxmemory'.", "it is full"),
    ],
)
def test_a_complaint_is_followed_by_what_is_wanted(said, wanted):
    """Redis says what it was told, not what to do about it."""
    error = as_stream_error(RuntimeError(said), "redis://h:1")

    assert str(error).startswith(f"redis at redis://h:1: {said} (")
    assert wanted in str(error)
