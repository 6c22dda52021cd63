"""A policy of the lab by its label, its profile read from a file: `plan:profile=FILE:fill=0.2`."""

import tomllib
from pathlib import Path

from msgspec import structs

from dispatcher import plugins
from dispatcher.cli.download import FileError
from scheduler.errors import SettingsError
from scheduler.profile import profile as profiles
from scheduler.profile.parts import Part
from scheduler.profile.profile import Profile
from scheduler.sim import policy
from scheduler.sim.policies.base import LabPolicy

SIGN = "profile="


def named(label: str) -> LabPolicy:
    """As `policy.named`; `profile=FILE` is the `[profile]` table of a settings file.

    Raises:
        SettingsError: no such policy, setting or part; the message says what exists.
        FileError: the file cannot be read.
    """
    words = label.strip().split(":")
    files = [word.removeprefix(SIGN) for word in words if word.startswith(SIGN)]
    found = policy.named(":".join(word for word in words if not word.startswith(SIGN)))
    if not files:
        return found
    if "profile" not in found.__struct_fields__:
        raise SettingsError(f"policy {words[0]!r} takes no profile, wanted plan or another core")
    return structs.replace(found, profile=read(Path(files[-1])))


def read(path: Path) -> Profile:
    """The profile that a settings file sets; its other tables are not looked at."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("profile")
    except OSError as error:
        raise FileError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: not TOML: {error}") from None
    if not isinstance(table, dict) or not table:
        raise SettingsError(f"{path} has no [profile] table")
    found = plugins.chosen({}, table)
    try:
        return profiles.decode(table, [kind for kind in found if issubclass(kind, Part)])
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None
