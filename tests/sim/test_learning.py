"""How soon the shipped core has learned, paired with one that knows already; the figures are in docs/EVALUATION.md."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "bench_learning", Path(__file__).parents[1] / "bench" / "learning.py"
)
learning = importlib.util.module_from_spec(spec)
spec.loader.exec_module(learning)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Long enough to see it settle."""
    monkeypatch.setattr(learning, "SPAN_S", 100.0)
    monkeypatch.setattr(learning, "SLOW_AT_S", 40.0)


@pytest.mark.parametrize("hardware", [None, "l4"], ids=["as declared", "declared 2.3 times slower"])
def test_a_cold_start_is_over_soon(hardware):
    """Within 10 % of who started warm, after at most 60 s or 500 completions, and for good."""
    found = learning.cold(0, hardware)

    assert found.seconds <= 60.0 or found.samples <= 500


def test_a_threefold_slow_down_is_met_in_half_a_minute():
    """Within 10 % of who has known it from the beginning, after at most 30 s."""
    found = learning.slowed(0)

    assert found.seconds <= 30.0
