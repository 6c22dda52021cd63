"""The server's clock as it is known here."""

import pytest

from dispatcher.streams.clock import Clock, Reading


def test_the_quickest_reply_counts(monkeypatch):
    """A reply that waited on its way is off by half its wait; the one that did not is believed."""
    clock = Clock()
    monkeypatch.setattr("time.monotonic", lambda: 60.0)

    clock.set(
        [
            Reading(server=1_050.0, asked_at=50.0, heard_at=50.040),
            Reading(server=1_050.1005, asked_at=50.1, heard_at=50.101),
            Reading(server=1_050.2, asked_at=50.2, heard_at=50.230),
        ]
    )

    assert clock.now() == pytest.approx(1_060.0, abs=1e-9)
