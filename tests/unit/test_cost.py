"""Physics before learning: seconds from data sheets."""

import pytest

from scheduler import cost


@pytest.mark.parametrize("name", sorted(cost.CLASSES))
def test_every_class_is_physically_plausible(name):
    """Between one and a hundred thousand tokens a second; attention is the smaller part up to long contexts."""
    hardware = cost.CLASSES[name]

    assert 1e3 < 1 / hardware.token_s < 1e5
    assert hardware.attention_s * 8192 < hardware.token_s
    assert 1e-3 < hardware.step_s < 0.1


@pytest.mark.parametrize(
    ("declared", "expected"),
    [("a100", "a100"), ("NVIDIA H100 80GB HBM3", "h100"), ("L40S", "l40s"), ("l4", "l4")],
)
def test_a_declared_class_is_found_by_its_beginning(declared, expected):
    """As drivers print them; the longest name that fits."""
    assert cost.hardware(declared) is cost.CLASSES[expected]


def test_an_undeclared_class_is_neutral():
    """Within a factor of four of every class we know, so it is learned quickly."""
    assert cost.hardware("") is cost.UNKNOWN
    for hardware in cost.CLASSES.values():
        assert 1 / 4 <= hardware.token_s / cost.UNKNOWN.token_s <= 4


def test_attention_counts_each_pair_once():
    """Computing a prompt in two halves costs what computing it at once costs."""
    assert cost.pairs(100.0, 100.0) == cost.pairs(50.0, 50.0) + cost.pairs(50.0, 100.0)


def test_features_are_seconds_under_the_declared_hardware():
    """Weight one on each is the data sheet's own prediction."""
    row = cost.features(hardware=cost.CLASSES["a100"], tokens=2000.0, pairs=2e6, decode_kv=0.0)

    assert len(row) == len(cost.FEATURES)
    assert sum(row) == pytest.approx(2000 / 16_000 + 0.012, rel=0.1)
