"""The lab's policies by name."""

from collections.abc import Mapping

import msgspec

from scheduler.errors import SettingsError
from scheduler.sim.policies import lines, ours, routers
from scheduler.sim.policies.base import LabPolicy

ALL: tuple[type[LabPolicy], ...] = (
    ours.Plan,
    ours.CoreFcfs,
    ours.CoreEdf,
    lines.FirstCome,
    lines.ShortestFirst,
    lines.EarliestDue,
    lines.EarliestDueDrop,
    lines.LeastSlack,
    lines.MooreHodgson,
    lines.Niyama,
    lines.Kairos,
    routers.RoundRobin,
    routers.Random,
    routers.LeastRequest,
    routers.PowerOfTwo,
    routers.JsqTokens,
    routers.Aibrix,
    routers.Sglang,
    routers.LlmdWeighted,
    routers.LlmdSticky,
    routers.LlmdPredicted,
    routers.Lmetric,
    routers.Dynamo,
    routers.Mooncake,
    routers.Lodestar,
    routers.EarliestFinish,
    routers.Oracle,
)

BY_NAME: Mapping[str, type[LabPolicy]] = {str(kind.__struct_config__.tag): kind for kind in ALL}


_KINDS: Mapping[str, type[LabPolicy]] = {**BY_NAME, "recorded": ours.Recorded}
"With the one that only a recording has."


def named(text: str) -> LabPolicy:
    """A policy from `name` or `name:field=value:field=value`.

    >>> named("dynamo:overlap_weight=2").overlap_weight
    2.0

    Raises:
        SettingsError: no such policy or field; the message says what exists.
    """
    name, *parts = text.strip().split(":")
    if name not in _KINDS:
        raise SettingsError(f"policy is {name!r}, wanted one of: {', '.join(BY_NAME)}")
    kind = _KINDS[name]
    fields: dict[str, str] = {}
    for part in parts:
        key, sign, value = part.partition("=")
        if not sign or key not in kind.__struct_fields__:
            known = ", ".join(kind.__struct_fields__) or "none"
            raise SettingsError(f"policy {name!r} has no setting {key!r}, wanted one of: {known}")
        fields[key] = value
    try:
        return msgspec.convert(fields, kind, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(f"policy {text!r}: {error}") from None


def is_peer(label: str) -> bool:
    """Whether a label is of a policy that is not ours and can exist; of one that is unknown here it is.

    >>> is_peer("edf-drop:seats=48"), is_peer("plan:fill=0"), is_peer("oracle")
    (True, False, False)
    """
    kind = _KINDS.get(label.partition(":")[0])
    return kind is None or kind().is_peer
