"""What a worker has in hand, said piece by piece, so that a beat stays short however much it is."""

from collections.abc import Iterable

import msgspec

SAID_MAX = 64
"Jobs named in one beat: some 2.5 KB; the rest are named in the next ones."


class Holdings(msgspec.Struct, frozen=True):
    """A stretch of what is in hand, in the order of ids, and how far it goes."""

    names: tuple[str, ...] = ()
    "`id:attempt`."

    after: str = ""
    "The id these come behind; empty: from the first."

    to: str = ""
    "The last id, with it; empty: to the end."


def following(held: Iterable[tuple[str, int]], said: Holdings) -> Holdings:
    """The stretch behind the one said last; behind the end it begins anew.

    >>> one = following([("b", 1), ("a", 2)], Holdings())
    >>> one.names, one.to
    (('a:2', 'b:1'), '')
    """
    behind = sorted(pair for pair in held if pair[0] > said.to)
    part = behind[:SAID_MAX]
    return Holdings(
        names=tuple(f"{request_id}:{attempt}" for request_id, attempt in part),
        after=said.to,
        to=part[-1][0] if len(behind) > len(part) else "",
    )
