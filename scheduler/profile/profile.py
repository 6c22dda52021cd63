"""A profile: which parts, with what weights; from a `[profile]` table.

[[profile.filters]]
name = "saturation-filter"

[[profile.scorers]]
name = "prefix-cache-scorer"
weight = 3

[profile.picker]
name = "max-score-picker"
"""

import difflib
from collections.abc import Iterable, Mapping

import msgspec

from scheduler.errors import SettingsError
from scheduler.profile import fetchers, filters, pickers, scorers
from scheduler.profile.fetchers import WORTH, AnyFetcher
from scheduler.profile.filters import AnyFilter
from scheduler.profile.parts import Fetcher, Filter, Part, Picker, Scorer
from scheduler.profile.pickers import AnyPicker, MaxScore
from scheduler.profile.scorers import AnyScorer

PARTS_MAX = 64
"Parts of one profile: each runs for every request that is placed (I8)."

KINDS: dict[str, type[Part]] = {
    "fetchers": Fetcher,
    "filters": Filter,
    "scorers": Scorer,
    "picker": Picker,
}
"What may stand in each place of the table."

BUILT_IN: tuple[type[Part], ...] = (
    *fetchers.BUILT_IN,
    *filters.BUILT_IN,
    *scorers.BUILT_IN,
    *pickers.BUILT_IN,
)


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The parts in the order in which they run."""

    fetchers: tuple[AnyFetcher, ...] = ()
    "Besides the built-in ones, or in their place."

    filters: tuple[AnyFilter, ...] = ()

    scorers: tuple[AnyScorer, ...] = ()
    "None, or none with a weight: all candidates are equals."

    picker: AnyPicker = MaxScore()

    @property
    def parts(self) -> tuple[Part, ...]:
        """All of them."""
        return (*self.fetchers, *self.filters, *self.scorers, self.picker)


def decode(table: Mapping[str, object], plug_ins: Iterable[type[Part]] = ()) -> Profile:
    """The profile that a `[profile]` table describes.

    >>> decode({"scorers": [{"name": "queue-scorer", "weight": 2}]}).scorers
    (Queue(weight=2.0),)

    Raises:
        SettingsError: an unknown part or setting, or a part that reads what no fetcher makes; names its place.
    """
    known = (*BUILT_IN, *plug_ins)
    parts: dict[str, object] = {}
    for place, value in table.items():
        if place not in KINDS:
            raise SettingsError(f"profile.{place} is no part, wanted one of: {', '.join(KINDS)}")
        if place == "picker":
            parts[place] = _part(value, place, "profile.picker", known)
        elif not isinstance(value, list):
            raise SettingsError(f"profile.{place} is {value!r}, wanted [[profile.{place}]] tables")
        else:
            parts[place] = tuple(
                _part(one, place, f"profile.{place}[{at}]", known) for at, one in enumerate(value)
            )
    made = Profile(**parts)  # type: ignore[arg-type]
    _check(made)
    return made


def _part(value: object, place: str, path: str, known: Iterable[type[Part]]) -> Part:
    if not isinstance(value, dict):
        raise SettingsError(f"{path} is {value!r}, wanted a table")
    kinds = {_tag(kind): kind for kind in known if issubclass(kind, KINDS[place])}
    name = value.get("name")
    if name not in kinds:
        close = difflib.get_close_matches(str(name), kinds, n=1)
        wanted = f"did you mean {close[0]!r}?" if close else f"wanted one of: {', '.join(kinds)}"
        raise SettingsError(f"{path}.name is {name!r}; {wanted}")
    try:
        return msgspec.convert(value, kinds[name])
    except msgspec.ValidationError as error:
        raise SettingsError(f"{path} ({name}): {error}") from None


def _check(profile: Profile) -> None:
    if len(profile.parts) > PARTS_MAX:
        raise SettingsError(f"profile has {len(profile.parts)} parts, wanted at most {PARTS_MAX}")
    made = {kind.provides for kind in fetchers.BUILT_IN} | {WORTH}
    for part in profile.parts:
        missing = [column for column in part.needs if column not in made]
        if missing:
            raise SettingsError(
                f"profile: {part.label} reads {missing[0]!r}, which no fetcher before it provides"
            )
        if isinstance(part, Fetcher):
            made.add(part.provides)


def _tag(kind: type[Part]) -> str:
    return str(kind.__struct_config__.tag)
