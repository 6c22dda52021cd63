"""What other packages bring: policies and parts of profiles, by entry point.

    [project.entry-points."headgate.plugins"]
    warmth-scorer = "warmth:Warmth"

The entry point bears the plug-in's own name (its tag). Only what the settings name is imported, so that a package that
is installed and not used costs nothing and breaks nothing.
"""

from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points

from scheduler import policies
from scheduler.errors import SettingsError
from scheduler.policies import Policy
from scheduler.profile import profile
from scheduler.profile.parts import Part

GROUP = "headgate.plugins"

PlugIn = type[Policy] | type[Part]

BUILT_IN = {
    str(kind.__struct_config__.tag): kind for kind in (*policies.BUILT_IN, *profile.BUILT_IN)
}


def chosen(policy: Mapping[str, object], parts: Mapping[str, object]) -> tuple[PlugIn, ...]:
    """The plug-ins that a `[policy]` and a `[profile]` table name; a name that nobody brings is left out.

    Raises:
        SettingsError: one cannot be imported, is no plug-in, bears another name, or is brought by two packages.
    """
    names = [name for name in _names(policy, parts) if name not in BUILT_IN]
    if not names:
        return ()
    found = entry_points(group=GROUP)
    return tuple(
        _load(name, list(found.select(name=name))) for name in names if found.select(name=name)
    )


def _names(policy: Mapping[str, object], parts: Mapping[str, object]) -> list[str]:
    tables: list[object] = [policy]
    for value in parts.values():
        tables += value if isinstance(value, list) else [value]
    names = [table.get("name") for table in tables if isinstance(table, Mapping)]
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def _load(name: str, found: Iterable[EntryPoint]) -> PlugIn:
    first, *others = found
    if others:
        packages = " and ".join(_package(entry) for entry in (first, *others))
        raise SettingsError(f"plug-in {name!r} is brought by {packages}, wanted one of them")
    what = f"plug-in {name!r} of {_package(first)}"
    try:
        kind = first.load()
    except Exception as error:
        raise SettingsError(f"{what} cannot be imported from {first.value!r}: {error!r}") from error
    if not (isinstance(kind, type) and issubclass(kind, Policy | Part)):
        raise SettingsError(
            f"{what} is {kind!r}, wanted a Policy, Fetcher, Filter, Scorer or Picker"
        )
    tag = kind.__struct_config__.tag
    if tag != name:
        raise SettingsError(f"{what} calls itself {tag!r}, wanted the entry point's name")
    return kind


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.module
