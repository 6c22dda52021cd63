"""All that the core knows, in one place: what it was told once, and what it has learned and remembers since.

The three parts of the core (`requests`, `endpoints`, `planning`) share one `Memory` and keep next to nothing
themselves, so that there is one account of everything and one moment that is now.
"""

import msgspec

from scheduler import cost, view
from scheduler.book import Book
from scheduler.errors import SettingsError
from scheduler.fairness import FairnessSettings
from scheduler.outbox import Outbox
from scheduler.plan import PlanSettings
from scheduler.policies import AnyPolicy, Policy, Urgency
from scheduler.predict import Predictor
from scheduler.prefix import Index
from scheduler.profile.profile import Profile
from scheduler.sessions import Sessions
from scheduler.slo import Objective
from scheduler.state import Ticket


class CoreSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the core is told once."""

    policy: AnyPolicy | Policy = Urgency()
    "Who goes first."

    objectives: dict[str, Objective] = {}
    "Named promises."

    fairness: FairnessSettings = FairnessSettings()
    "How tenants share."

    plan: PlanSettings = PlanSettings()
    "How far the plan looks and how early it binds."

    profile: Profile | None = None
    "How an endpoint is chosen; None: as the plan does, by seconds."

    lease_s: float = 3.0
    "An endpoint not heard from for this long loses what it holds."

    kv_lease_s: float = 20.0
    "How long a computed prompt's KV is relied on; less than the engines' own lease (vLLM's `kv_lease_duration`: 30)."

    waiting_max: int = 100_000
    "One more is rejected, with a time to come back."

    max_attempts: int = 3
    "How often a request may be tried that does not say."

    unknown_model_grace_s: float = 2.0
    "How long a model that nobody ever served may be waited for while endpoints are alive: a start's first beats."

    step_max: int = 1024
    "The most requests that one step ends because their time ran out (I8)."

    finished_max: int = 10_000
    """
    Ids of ended requests that are remembered, to know a late duplicate.

    Two seconds' worth at 5,000 a second, and 1 MB: it only saves asking. Redis knows every id for its retention, and
    refuses a repetition that is not remembered here.
    """

    def __post_init__(self) -> None:
        if self.profile is not None and self.plan.explore > 0:
            raise SettingsError(
                f"plan.explore is {self.plan.explore} beside a [profile], whose own picker decides what is left to "
                "chance: wanted 0, and a `tie` of max-score-picker or another picker"
            )


class Memory:
    """The present (`book`, `outbox`), what was learned (`predictor`, `prefixes`, `sessions`), and the moment."""

    def __init__(self, settings: CoreSettings) -> None:
        """Know nothing yet but the settings."""
        self.settings = settings
        self.book = Book(settings.finished_max, settings.fairness)
        self.outbox = Outbox(settings.policy.label)
        self.predictor = Predictor()
        self.prefixes = Index()
        self.sessions = Sessions()
        self.now = float("-inf")
        self.token_s = cost.UNKNOWN.token_s
        "Predicted seconds of one prompt token on a usual endpoint, as of the last step."

    def backlog_s(self) -> float:
        """Predicted seconds of prefill that wait."""
        return view.backlog_s(self.book, self.predictor)

    def pace_row(self, slot: int) -> tuple[float, ...]:
        """What decoding costs there now, in the terms of `pace`."""
        return self.predictor.pace.row(slot, *self.book.ledger.load(slot), self.now)

    def note(self, ticket: Ticket, kind: str, reason: str, slack_s: float | None = None) -> None:
        """Log a turn that moves nothing in Redis."""
        self.outbox.note(
            ticket.id,
            kind,
            reason,
            self.now,
            attempt=ticket.attempt,
            slack_s=slack_s,
            waiting=len(self.book.lines),
        )
