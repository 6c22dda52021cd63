"""How soon the shipped core has learned, paired with one that knows already; the figures are in docs/LEARNING.md."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "bench_learning", Path(__file__).parents[1] / "bench" / "learning.py"
)
learning = importlib.util.module_from_spec(spec)
spec.loader.exec_module(learning)


PART = 1.10


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Long enough to see it settle."""
    monkeypatch.setattr(learning, "SPAN_S", 60.0)
    monkeypatch.setattr(learning, "SLOW_AT_S", 10.0)


@pytest.mark.parametrize("hardware", [None, "l4"], ids=["as declared", "declared 2.3 times slower"])
def test_a_cold_start_is_over_soon(hardware):
    """From 500 completions on the mean time to first token is within 10 % of who started warm."""
    found = learning.cold(0, hardware, since_s=500 / learning.RATE_RPS)

    assert found.mean_s <= PART * found.known_s


def test_a_threefold_slow_down_is_met_in_half_a_minute():
    """From 30 s on within 10 % of who has known it from the beginning."""
    found = learning.slowed(0, since_s=30.0)

    assert found.mean_s <= PART * found.known_s
