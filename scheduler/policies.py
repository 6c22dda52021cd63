"""Who goes first: the plug-ins. A policy is a frozen Struct; its tag is its name, its fields are its settings.

A policy says two things, both plain numbers, and the plan does the rest:
    `rank`       a request's place in line, fixed while it waits, so that the line never needs sorting again
    `terms`      what it asks besides: how unlikely to make it a request may be before it is set aside

Priority is no wall: a level is worth `band_s` seconds of deadline. Whoever waits therefore ages past every
band in the end, by the passing of time alone.
"""

import functools
import math
import operator
from typing import Annotated

import msgspec
from msgspec import Meta

Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy asks of the plan beside the order. The defaults ask nothing (I10)."""

    odds_min: float = 0.0
    "Below this chance to be on time on its best endpoint a request is set aside; 0: never."

    price: float = 0.0
    "How much more than that is asked of it in overload, the more the longer it takes; 0: nothing."

    aside_share: float = 0.0
    "Of the seconds handed out, the part kept for the longest set aside."


class Policy(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="name"
):
    """What every policy offers; a plug-in derives from it and takes a tag."""

    @property
    def label(self) -> str:
        """The name it is chosen by."""
        return str(self.__struct_config__.tag)

    @property
    def terms(self) -> Terms:
        """What it asks of the plan beside the order."""
        return Terms()

    def rank(self, *, enqueued_at: float, due_at: float, priority: int, work_s: float) -> float:
        """Its place in line, in seconds; smaller goes first, ties to the older.

        Args:
            enqueued_at: when it came.
            due_at: when its first token must be there; `inf` without promise.
            priority: higher first.
            work_s: predicted seconds of its prefill on a usual endpoint.
        """
        raise NotImplementedError


class Fcfs(Policy, frozen=True, tag="fcfs"):
    """First come, first served. The baseline: promises and priorities are ignored."""

    def rank(self, *, enqueued_at: float, due_at: float, priority: int, work_s: float) -> float:  # noqa: ARG002
        """The moment it came."""
        return enqueued_at


class Edf(Policy, frozen=True, tag="edf"):
    """Earliest due first. Right below saturation; above it, everybody is served a little too late."""

    patience_s: Positive = 60.0
    "A request without promise is ranked as if it were due this long after it came."

    def rank(self, *, enqueued_at: float, due_at: float, priority: int, work_s: float) -> float:  # noqa: ARG002
        """The moment it is due."""
        return due_at if math.isfinite(due_at) else enqueued_at + self.patience_s


class Urgency(Policy, frozen=True, tag="urgency"):
    """Earliest due first among those who can still make it, with priorities; the rest are set aside, reversibly."""

    odds_min: Share = 0.5
    "Below this chance to be on time on its best endpoint a request is set aside; 0: never, whatever the price."

    price: Annotated[float, Meta(ge=0)] = 0.5
    """
    In overload the place of one who probably fails, or takes long, is worth more to others; 0: to nobody.

    The chance asked of a request is this much, times the seconds that wait for each endpoint over the seconds
    promised, times its own work over the usual work; its weight counts for it.
    """

    patience_s: Positive = 60.0
    "A request without promise is ranked as if it were due this long after it came."

    stretch: Annotated[float, Meta(ge=0)] = 20.0
    """
    For how many times its own prefill a request without promise lets shorter ones pass.

    Shortest first with ageing: the mean first token comes sooner, and the longest waits so much longer at most.
    0: in the order they came.
    """

    head_start: Annotated[float, Meta(ge=0)] = 1.5
    """
    How far ahead of its due moment's place a request goes that takes much of its promised seconds; 0: nowhere.

    By so many times its own work, times the part of the promise that it takes. An endpoint that others are planned on
    for two seconds is no place for one that takes three of its five, but they, being short, can follow it.
    """

    band_s: Positive = 5.0
    "Seconds of deadline that one level of priority is worth."

    aside_share: Share = 0.01
    """
    Of the seconds handed out, the part kept for the longest set aside.

    It is what keeps an endless overload from starving them. 0.05 serves them five times as fast, and costs a
    point or two of the promises; 0 lets them wait for an idle endpoint, however long.
    """

    @property
    def terms(self) -> Terms:
        """Its own fields."""
        return Terms(
            odds_min=self.odds_min,
            price=self.price,
            aside_share=self.aside_share,
        )

    def rank(self, *, enqueued_at: float, due_at: float, priority: int, work_s: float) -> float:
        """The moment it is due, earlier by its head start and by a band for each level of priority."""
        due = enqueued_at + self.patience_s + self.stretch * work_s
        if math.isfinite(due_at):
            promised_s = max(1e-3, due_at - enqueued_at)
            due = due_at - self.head_start * min(work_s, promised_s) ** 2 / promised_s
        return due - self.band_s * priority


BUILT_IN: tuple[type[Policy], ...] = (Fcfs, Edf, Urgency)

AnyPolicy = Fcfs | Edf | Urgency
"What a settings file may choose from, by `name`, when no plug-in is installed."


def union(plug_ins: tuple[type[Policy], ...] = ()) -> type[Policy]:
    """The tagged union of the built-in policies and these: what to decode a `[policy]` table with.

    >>> msgspec.convert({"name": "edf", "patience_s": 5.0}, union())
    Edf(patience_s=5.0)
    """
    return functools.reduce(operator.or_, (*BUILT_IN, *plug_ins))
