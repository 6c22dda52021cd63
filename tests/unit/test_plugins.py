"""Plug-ins of an installed package are found by name, and whatever is wrong with one is said in a line."""

import shutil
import sys
from pathlib import Path

import pytest

from dispatcher import node, plugins
from dispatcher.cli import lab_policy
from scheduler.errors import SettingsError
from scheduler.parsing import parse

EXAMPLE = Path(__file__).parents[1] / "plugin" / "warmth.py"

PROFILE = """
[[profile.fetchers]]
name = "idle-fetcher"

[[profile.scorers]]
name = "warmth-scorer"
half_s = 5
weight = 2

[profile.picker]
name = "weighted-random-picker"
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Lay a package with these entry points where Python looks for installed ones."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("warmth", "broken_plugin"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    shutil.copy(EXAMPLE, tmp_path)

    def install(package: str, **entries: str) -> None:
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name.replace('_', '-')} = {value}" for name, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[headgate.plugins]", *lines]) + "\n")

    return install


@pytest.fixture
def warmth(install):
    install(
        "warmth",
        idle_fetcher="warmth:Idle",
        warmth_scorer="warmth:Warmth",
        newest_first="warmth:NewestFirst",
    )


def test_an_installed_package_brings_parts_and_a_policy(warmth):
    """From settings to the core's, with nothing said but names."""
    settings = parse(PROFILE + '[policy]\nname = "newest-first"\n', {})

    made = node.core_settings(settings)

    assert [part.label for part in made.profile.parts] == [
        "idle-fetcher",
        "warmth-scorer",
        "weighted-random-picker",
    ]
    assert (made.profile.scorers[0].half_s, made.profile.scorers[0].weight) == (5.0, 2.0)
    assert made.policy.label == "newest-first"


def test_the_lab_takes_a_profile_from_a_file(warmth, tmp_path):
    """`plan:profile=FILE`: the same table as in the settings, beside other settings of the policy."""
    file = tmp_path / "warm.toml"
    file.write_text(PROFILE)

    found = lab_policy.named(f"plan:profile={file}:fill=0.1")

    assert (found.fill, found.profile.scorers[0].label) == (0.1, "warmth-scorer")
    with pytest.raises(SettingsError, match="'llm-d-weighted' takes no profile"):
        lab_policy.named(f"llm-d-weighted:profile={file}")


def test_what_nobody_names_is_not_imported(install):
    """A broken package that is installed and not used breaks nothing."""
    install("broken", broken_scorer="broken_plugin:Nothing")

    assert plugins.chosen({}, {"scorers": [{"name": "queue-scorer"}]}) == ()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("broken_plugin:Nothing", "plug-in 'my-scorer' of bad cannot be imported from"),
        ("warmth:Warmth", "calls itself 'warmth-scorer', wanted the entry point's name"),
        ("warmth:np", "wanted a Policy, Fetcher, Filter, Scorer or Picker"),
    ],
)
def test_a_wrong_plug_in_is_named_with_its_package(install, value, said):
    """What it is, whose, and what is wrong."""
    install("bad", my_scorer=value)

    with pytest.raises(SettingsError, match=said):
        plugins.chosen({}, {"scorers": [{"name": "my-scorer"}]})


def test_two_packages_with_one_name_are_refused(install):
    """Which of them was meant cannot be known."""
    for package in ("one", "two"):
        install(package, warmth_scorer="warmth:Warmth")

    with pytest.raises(SettingsError, match=r"brought by one and two|brought by two and one"):
        plugins.chosen({}, {"scorers": [{"name": "warmth-scorer"}]})


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('[[profile.scorers]]\nname = "queue-scorrer"', r"profile.scorers\[0\].name is 'queue-scorrer'; did you mean 'queue-scorer'"),
        ('[[profile.scorers]]\nname = "pace-filter"', r"profile.scorers\[0\].name is 'pace-filter'"),
        ('[[profile.scorers]]\nname = "queue-scorer"\nwait = 2', r"profile.scorers\[0\] \(queue-scorer\): .*wait"),
        ('[[profile.scorers]]\nname = "queue-scorer"\nweight = -1', r"profile.scorers\[0\] \(queue-scorer\): .*>= 0"),
        ('[profile]\nscorers = "queue"', r"profile.scorers is 'queue', wanted \[\[profile.scorers\]\] tables"),
        ('[profile.scorer]\nname = "queue-scorer"', "profile.scorer is no part, wanted one of: fetchers"),
        ('[profile]\npicker = "best"', "profile.picker is 'best', wanted a table"),
        ('[policy]\nname = "edff"', "policy.name is 'edff', wanted 'fcfs' or 'edf' or 'urgency'"),
        ("[plan]\nfil = 1", "plan.fil is not a setting; did you mean fill"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_settings_is_a_line(lines, said):
    """It names the place, the value found and the value wanted."""
    with pytest.raises(SettingsError, match=said):
        node.core_settings(parse(lines, {}))


@pytest.mark.parametrize(
    "line", ["horizon = 0", "patience = -1.0", "answer_part = 60.0", "late_worth = 1.5", "explore_paid = -0.1"]
)  # fmt: skip
def test_a_plan_out_of_bounds_is_refused(line):
    """What would plan nobody, or room for sixty answers, is told by name before anything starts."""
    with pytest.raises(
        SettingsError, match=rf"plan\.{line.split()[0]} is {line.split()[2]}, wanted "
    ):
        node.core_settings(parse(f"[plan]\n{line}", {}))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (f"{PROFILE}[plan]\nexplore = 0.1", r"plan.explore is 0.1 beside a \[profile\].*: wanted 0"),
        ("[plan]\nexplore_paid = 0.1", "plan.explore_paid is 0.1 and plan.explore 0.0, wanted both above 0"),
    ],
)  # fmt: skip
def test_exploration_that_nobody_would_carry_out_is_refused(warmth, lines, said):
    """A profile's picker decides itself what is left to chance, and paid exploration is a part of the free one."""
    with pytest.raises(SettingsError, match=said):
        node.core_settings(parse(lines, {}))


def test_a_part_that_reads_what_nobody_fetches_is_refused(warmth):
    """Before anything is served."""
    with pytest.raises(SettingsError, match="warmth-scorer reads 'idle-s', which no fetcher"):
        node.core_settings(parse('[[profile.scorers]]\nname = "warmth-scorer"\n', {}))
