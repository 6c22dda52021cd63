"""docs/PLUGINS.md says what the code does: its tables, its profiles and its example."""

import re
import tomllib
from pathlib import Path

import conformance
import msgspec
import planned
import pytest

from scheduler.plan import PlanSettings
from scheduler.profile import profile
from scheduler.profile.parts import Fetcher

PAGE = (Path(__file__).parents[2] / "docs" / "PLUGINS.md").read_text()
ROWS = dict(re.findall(r"^\| `([a-z-]+)` \| (.*?) \|", PAGE, re.MULTILINE))
BLOCKS = {
    kind: re.findall(rf"^```{kind}\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
    for kind in ("toml", "python")
}
LISTED = [kind for kind in profile.BUILT_IN if not issubclass(kind, Fetcher)]


@pytest.mark.parametrize("kind", LISTED, ids=lambda kind: kind.__struct_config__.tag)
def test_every_part_is_listed_with_its_settings(kind):
    """By its name, with the default of each setting that has a plain one."""
    row = ROWS[kind.__struct_config__.tag]

    for field in msgspec.structs.fields(kind):
        if field.name == "weight":
            continue
        assert f"`{field.name}`" in row
        if isinstance(field.default, int | float):
            assert f"`{field.name}` = {field.default:g}" in row.replace("4194304", "4.1943e+06")


def test_nothing_is_listed_that_is_not_there():
    """A row is a built-in part."""
    assert {name for name in ROWS if name.endswith(("-filter", "-scorer", "-picker"))} == {
        kind.__struct_config__.tag for kind in LISTED
    }


def test_the_plans_own_profile_is_the_one_shown():
    """With the plan's own fill, externality and tie."""
    plan = PlanSettings()
    [shown] = [block for block in BLOCKS["toml"] if "slo-filter" in block]

    assert profile.decode(tomllib.loads(shown)["profile"]) == planned.of_plan(
        fill=plan.fill, externality=plan.externality, tie=plan.tie
    )


def test_llm_ds_profile_can_be_read():
    """The first that a reader copies."""
    made = profile.decode(tomllib.loads(BLOCKS["toml"][0])["profile"])

    assert [part.weight for part in made.scorers] == [2, 2, 3]


def test_the_example_runs_and_conforms():
    """What the page says to write is a plug-in, and passes its own suite."""
    names = {}
    exec(BLOCKS["python"][0], names)
    part = conformance.with_fetchers(names["Warmth"](), names["Idle"]())

    for rule in conformance.rules(names["Warmth"]):
        rule(part)
