"""What a step's plan is made of: how far it looks, whom it hands over where, and who is set aside."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from scheduler.errors import SettingsError
from scheduler.ledger import Line
from scheduler.legs import Pledge
from scheduler.state import Floats, Ticket
from scheduler.wire.words import Leg

AtLeastNothing = Annotated[float, Meta(ge=0, le=1e9)]
Share = Annotated[float, Meta(ge=0, le=1)]


class PlanSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far the plan looks and how early it binds."""

    commit_window_s: Annotated[float, Meta(gt=0, le=1e9)] = 0.25
    """
    Only what starts within this many predicted seconds is handed over.

    What is handed over cannot give way any more. 0.1 leaves endpoints idle, 1 costs a point in overload.
    """

    horizon: Annotated[int, Meta(ge=1)] = 256
    "The most urgent requests that are considered together; a step goes on behind them only if all can go (I8)."

    pace_worth: AtLeastNothing = 0.7
    """
    What the promises per token of those who decode already are worth beside a newcomer's own; 0: nobody asks.

    Where a newcomer would break more than it gains it is not put; where that is everywhere, it waits.
    """

    late_worth: Share = 0.3
    """
    What serving one whose first token is late already counts beside a promise that can still be kept.

    It goes where it breaks less than that: 1 serves the late at once and makes others late, 0 waits for the unpromised.
    """

    keep_clear: AtLeastNothing = 1.0
    """
    So much counts each promise of those to come that one who is late would probably break; 0: nothing.

    It goes, where nobody urgent waits, to the endpoints that will be missed least: where that breaks less than
    `late_worth`. The rest stay clear of long prompts that nobody can have in time, and of their answers.
    """

    patience: AtLeastNothing = 1.0
    """
    A request with more time than so many of its own stays goes only where it breaks less; 0: wherever it may now.

    Who has a minute then leaves the moments of many arrivals to those who have a second.
    """

    fill: AtLeastNothing = 0.4
    """
    What a prompt costs others where the KV is full, in predicted seconds to its own first token; 0: nothing.

    Such an endpoint decodes more slowly for all, evicts prefixes that others come back for, and soon takes nobody. Half
    full it counts half of that; of who was promised nothing an eighth, and only what is not cached there; of who was
    promised a pace that the pool keeps with ease, nothing: see `pressure`.
    """

    externality: AtLeastNothing = 1.0
    """
    What a second that it costs others counts beside one of its own, of who was promised nothing; 0: nothing.

    Whoever was handed over a moment ago waits for it too, in one step of the engine; and what is cached elsewhere and
    computed anew here keeps those to come waiting: see `others_s`.
    """

    cache_patience: AtLeastNothing = 0.5
    """
    A request waits where its prefix is, and no KV is free, for so many times the seconds that it saves; 0: for none.

    Elsewhere it would be computed once more, which costs that endpoint as much, and what it has cached.
    """

    answer_part: Share = 0.6
    """
    Of its expected answer, the part that a request counts with where KV is given away; 1: all of it.

    Who decodes has on average said half. Room for all ends of all answers at once is room that stands empty while
    long prompts wait for it; where it is short after all, the engine preempts, and finds most of the KV again.
    """

    tie: AtLeastNothing = 0.02
    "Endpoints whose predicted first token differs by less than this part are taken as equal: chance decides."

    explore: AtLeastNothing = 0.0
    """
    Scale of a draw on the predicted log seconds of those that could start now; 0: only equals are drawn.

    0.05 to 0.1 is what predictions do not know anyway. Every chance is then logged, for `headgate evaluate`. An
    endpoint of which nothing was measured yet is drawn for one request at a time.
    """

    explore_paid: Share = 0.0
    "With `explore`: of the requests with slack, the part that takes any endpoint which makes it with room."

    def __post_init__(self) -> None:
        if self.explore_paid > 0 and self.explore <= 0:
            raise SettingsError(
                f"plan.explore_paid is {self.explore_paid} and plan.explore {self.explore}, wanted both above 0"
            )


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A request and the endpoint that the plan gives it now."""

    ticket: Ticket
    slot: int
    line: Line
    "What the ledger is to hold."
    cached_tokens: int
    best_cached_tokens: int
    "On the endpoint that has the most and may take it."
    start_s: float
    "Predicted seconds until the endpoint begins it."
    work_s: float
    "Predicted seconds of the endpoint's time."
    total_s: float
    "Predicted seconds to its first token."
    ahead_tokens: float
    "Prefill before it, for the features."
    ahead_pairs: float
    propensity: float
    "With what chance this endpoint was taken."
    everywhere_s: Floats
    "float64[n_slots]: `total_s` on every slot; `inf` where it could not go."
    why: str
    weighed: tuple[tuple[int, float, float, int, float, float], ...] = ()
    """
    Where chance decided: the slots a record names, each one's chance, predicted wait, cached tokens, pressure on its KV
    and seconds it costs others.
    """
    leg: Leg = "whole"
    onward_s: float = 0.0
    "Of a prefill leg, what of the seconds to its first token comes after it."
    pledge: Pledge | None = None
    "Of a prefill leg, the place kept for what comes after it."
    features: tuple[str, ...] = ()
    "Of a decode leg, what the predictor of transfers saw."


class Aside(msgspec.Struct, frozen=True):
    """A request that the plan sets aside or takes up again."""

    kind: Literal["set_aside", "take_up"]
    ticket: Ticket
    total_s: float
    "Predicted seconds to its first token on its best endpoint."
    alone_s: float
    "The same where nothing stands before it."
