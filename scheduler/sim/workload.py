"""What arrives: rows of a workload, and how one workload becomes another.

A workload is a tuple of arrivals in the order of time. Real traces keep their
bursts only while nobody redraws them, so every change here moves, cuts or thins
rows that exist; none invents one.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
from msgspec import structs

NAMES = {
    "at_s": "t",
    "prompt_tokens": "i",
    "output_tokens": "o",
    "session": "s",
    "turn": "k",
    "parent": "p",
    "gap_s": "g",
    "blocks": "h",
    "block_tokens": "b",
    "client": "c",
    "images": "img",
    "image_tokens": "imgtok",
    "reasoning_share": "rr",
    "ttft_s": "ttft",
    "tpot_s": "tpot",
    "deadline_s": "deadline",
    "priority": "prio",
    "tenant": "tenant",
    "expected_tokens": "expected",
}
"How a field is called in a trace file: short, since a file has many rows."


class Arrival(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False, rename=NAMES
):
    """One request as the world sends it, its true output length included.

    The promises (`ttft_s` to `tenant`) are empty in public traces; a mix fills them.
    """

    at_s: float
    "Seconds after the start of the workload; never negative."

    prompt_tokens: int
    "At least 1; image tokens are part of it where `image_tokens` is set."

    output_tokens: int
    "The true length, at least 1. No policy may read it."

    session: int | None = None
    "Rows of one conversation share it; None stands alone."

    turn: int = 1
    "1 for the first request of a session."

    parent: int | None = None
    "Index in this workload of the turn before; always an earlier row."

    gap_s: float | None = None
    "Seconds from the parent's arrival to this one."

    blocks: tuple[int, ...] = ()
    "Ids of the prompt's blocks: equal id at equal position = the same prefix."

    block_tokens: int = 0
    "Tokens in one block; 0 where no blocks are known."

    client: str = ""
    "The caller or the class of work that the source names."

    images: int = 0
    image_tokens: int = 0

    reasoning_share: float | None = None
    "Part of the output that is reasoning, 0 to 1."

    ttft_s: float | None = None
    "Promised seconds to the first token; None promises nothing."

    tpot_s: float | None = None
    "Promised seconds per output token after the first."

    deadline_s: float | None = None
    "Promised seconds from arrival to the last token."

    priority: int = 0
    "Higher goes first among equals."

    tenant: str = ""

    expected_tokens: int | None = None
    "What its client says of the answer's length; see `foresight`."


Workload = tuple[Arrival, ...]

SPAN_LEAST_S = 1e-6
"Rows closer together than a trace can say came all at once."


class Promise(msgspec.Struct, frozen=True, kw_only=True):
    """What an arrival is promised; each field as in `Arrival`."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    deadline_s: float | None = None
    priority: int = 0
    tenant: str = ""


def promised(arrivals: Sequence[Arrival], promise: Promise) -> Workload:
    """The same rows, every one with this promise."""
    fields = structs.asdict(promise)
    return tuple(structs.replace(a, **fields) for a in arrivals)


def rate(arrivals: Sequence[Arrival]) -> float:
    """Mean arrivals a second between the first and the last; 0 when there is no span."""
    if len(arrivals) < 2:
        return 0.0
    span_s = arrivals[-1].at_s - arrivals[0].at_s
    return (len(arrivals) - 1) / span_s if span_s >= SPAN_LEAST_S else 0.0


def scaled(
    arrivals: Sequence[Arrival],
    *,
    rate_per_s: float | None = None,
    factor: float | None = None,
    gaps: Literal["scaled", "kept"] = "scaled",
) -> Workload:
    """The same arrivals, closer together or further apart.

    Args:
        arrivals: in order of time.
        rate_per_s: the mean rate wanted; give this or `factor`.
        factor: how many times faster; 2.0 halves every time.
        gaps: `scaled` moves every row; `kept` moves whole sessions by their first
            row and leaves the pauses between turns as they were, for closed loops.

    Raises:
        ValueError: neither or both given, a value that is not positive, or a rate asked of
            rows that all come at once.

    >>> [a.at_s for a in scaled([Arrival(at_s=4.0, prompt_tokens=1, output_tokens=1)], factor=2.0)]
    [2.0]
    """
    speed = _speed(arrivals, rate_per_s, factor)
    if gaps == "scaled":
        return tuple(
            structs.replace(
                a, at_s=a.at_s / speed, gap_s=None if a.gap_s is None else a.gap_s / speed
            )
            for a in arrivals
        )
    starts: dict[int, float] = {}
    moved = []
    for a in arrivals:
        start_s = a.at_s if a.session is None else starts.setdefault(a.session, a.at_s)
        moved.append(structs.replace(a, at_s=start_s / speed + (a.at_s - start_s)))
    order = sorted(range(len(moved)), key=lambda row: (moved[row].at_s, row))
    return picked(moved, order)


def sliced(arrivals: Sequence[Arrival], start_s: float, end_s: float) -> Workload:
    """The rows with start_s <= at_s < end_s, moved so that `start_s` is 0.

    A turn whose parent lies before the window keeps its turn and blocks and loses
    the parent.

    Raises:
        ValueError: the window is empty or starts before 0.
    """
    if not 0 <= start_s < end_s:
        raise ValueError(f"slice is {start_s} to {end_s} s, wanted 0 <= start < end")
    rows = [row for row, a in enumerate(arrivals) if start_s <= a.at_s < end_s]
    return tuple(structs.replace(a, at_s=a.at_s - start_s) for a in picked(arrivals, rows))


def spread(arrivals: Sequence[Arrival], grid_s: float, rng: np.random.Generator) -> Workload:
    """The rows of a source with a coarse clock, each moved by chance within its tick.

    Raises:
        ValueError: the grid is not positive, or a row has a parent, which might come after it.
    """
    if not 0 < grid_s < np.inf:
        raise ValueError(f"grid is {grid_s} s, wanted a positive number")
    if any(a.parent is not None for a in arrivals):
        raise ValueError("rows have parents, wanted rows without: spread before linking turns")
    by_s = rng.uniform(0, grid_s, len(arrivals))
    moved = (
        structs.replace(a, at_s=round(a.at_s + float(by), 6))
        for a, by in zip(arrivals, by_s, strict=True)
    )
    return tuple(sorted(moved, key=lambda a: a.at_s))


def merged(*workloads: Sequence[Arrival]) -> Workload:
    """Several workloads at once, in order of time; sessions and blocks stay apart."""
    rows: list[Arrival] = []
    next_session = next_block = 0
    for arrivals in workloads:
        base, session, block = len(rows), next_session, next_block
        rows.extend(
            structs.replace(
                a,
                session=None if a.session is None else a.session + session,
                parent=None if a.parent is None else a.parent + base,
                blocks=tuple(b + block for b in a.blocks),
            )
            for a in arrivals
        )
        next_session += 1 + max((a.session for a in arrivals if a.session is not None), default=-1)
        next_block += 1 + max((max(a.blocks) for a in arrivals if a.blocks), default=-1)
    order = sorted(range(len(rows)), key=lambda row: (rows[row].at_s, row))
    return picked(rows, order)


def picked(arrivals: Sequence[Arrival], rows: Sequence[int]) -> Workload:
    """These rows in this order, parents pointing at their new places.

    A row whose parent is not picked loses it, and the gap with it.
    """
    place = {old: new for new, old in enumerate(rows)}
    picked = []
    for old in rows:
        a = arrivals[old]
        if a.parent is not None:
            parent = place.get(a.parent)
            gap_s = None if parent is None else a.gap_s
            a = structs.replace(a, parent=parent, gap_s=gap_s)
        picked.append(a)
    return tuple(picked)


def _speed(arrivals: Sequence[Arrival], rate_per_s: float | None, factor: float | None) -> float:
    if (rate_per_s is None) == (factor is None):
        raise ValueError(f"rate_per_s is {rate_per_s} and factor {factor}, wanted exactly one")
    wanted = rate_per_s if factor is None else factor
    if wanted is None or not 0 < wanted < np.inf:
        raise ValueError(f"scale is {wanted}, wanted a positive number")
    if factor is not None:
        return factor
    present = rate(arrivals)
    if present == 0:
        raise ValueError(
            f"{len(arrivals)} arrivals come all at once, wanted some span to scale to {wanted}/s"
        )
    return wanted / present
