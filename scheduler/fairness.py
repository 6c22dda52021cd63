"""What each tenant has been given, in tokens of service, and who therefore goes before whom.

    account[tenant] += (prompt tokens computed + output_weight * output tokens) / weight[tenant]
    band[tenant]     = account // quantum

Whoever waits in the lowest band goes first, and within a band the most urgent. So urgency decides among tenants who
have had about the same, and none can buy a place with promises or priorities once it is a quantum ahead. What one
leaves unused the others get, and it is no debt of theirs later: a tenant that comes back starts one quantum below the
lowest who waited, no lower. So who asks for less than its share goes before all who ask for more.

Who was promised a moment so far ahead that even at its tenant's share all that this one waits for is served before it
(`order.TenantLines`) has nothing from its turn, and lets the others pass until then.

That orders who waits, and keeps nothing free for who has not come yet: seats are not taken back, and where pace is short
whoever waits takes the last one. So the promises of a tenant count the less the further its recent use is beyond its share
(`standing`), and a place is only taken, or somebody's pace broken, by those whose promises count enough. But only as far as
it is needed: while those within their share have theirs kept, everybody's count in full.

After the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). We differ in
four things: accounts are compared in bands, as wide as a quantum of deficit round robin (Shreedhar and Varghese,
1995), so that deadlines have a say; the whole answer is charged when a request is handed over, by prediction, and
corrected by what the engine reports; and a lead ends at `LEAD_MAX` bands, so that nobody pays for ever for an hour
in which the others could not use the fleet. And a tenant keeps up to a quantum of what it left unused, where theirs
keeps nothing: otherwise whoever waits seldom would be in no lower band than those who always do.
"""

import math
from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

LEAD_MAX = 100
"Bands that a tenant can be ahead of the lowest who waits: what it took beyond is forgiven."

RECENT = 100
"Quanta of service over which a tenant's use is compared with its share."

STEEP = 3
"Twice its share, and a promise counts an eighth: a little beyond it hardly less."

SHORT = 0.1
"When so many promises of those within their share are missed, the others' count as little as that; of fewer, more."

SETTLED = 50
"Over so many of their latest."

RATED_S = 60.0
"Over how many seconds the pool's rate of service is taken."

FADED_MAX = 10.0
"Of one request, however large: what it makes the rest fade, in logs."

FADED = 1e6
"What counts so much less than the latest is forgotten."

IDLE_MAX = 10_000
"Accounts kept, with those of tenants who have nothing here; a forgotten one begins as a newcomer's."

KEPT_MAX = 1000
"Accounts that a snapshot holds, of those who have had most: some 40 KB."


Weight = Annotated[float, Meta(ge=1e-6, le=1e6)]
"Of a promise or a tenant beside others: sums and quotients of them stay numbers."


class FairnessSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tenants share a pool that cannot serve them all at once."""

    quantum_tokens: Annotated[int, Meta(ge=0, le=10**12)] = 0
    """
    How many tokens of service a tenant may be ahead of another before it stands behind it, however urgent.

    Fewer share more strictly, more leave more to urgency; half a second of the pool's prefill is a good start, 16384
    for four A100. 0: tenants are not told apart.
    """

    output_weight: Annotated[float, Meta(ge=0, le=1e6)] = 2.0
    "What an output token counts beside a prompt token that had to be computed; prices are commonly 2 to 5 times."

    over_worth: Annotated[float, Meta(gt=0, le=1)] = 0.1
    """
    What a promise of a tenant beyond its share counts at least beside one of a tenant within it; 1: the same.

    Seats cannot be taken back, so who goes first is not enough: below 1 those beyond their share also leave the
    headroom in which the others, who come later, keep theirs. Only as far as promises to those are missed: while
    there is enough for everybody, all promises count in full.
    """

    weights: dict[str, Weight] = {}
    "Shares by tenant, as [fairness.weights]; who is not named has 1."


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """The accounts as a new leader takes them over."""

    floor: float = 0.0
    "The lower edge of the lowest band in which anybody waited."

    had: dict[str, float] = {}
    """
    By tenant, for requests that have ended; those that a worker holds are charged again when they are found there.

    What ends between a leader's last snapshot and the next one's beginning is nobody's debt: seconds of work.
    """

    recent: dict[str, float] = {}
    "By tenant, tokens of recent service, likewise."

    missed: float = 0.0
    "Of the latest promises to tenants within their share, the part that was not kept."

    def is_sound(self) -> bool:
        """Whether these are accounts, and no more than are ever kept."""
        figures = self.floor, self.missed, *self.had.values(), *self.recent.values()
        if max(len(self.had), len(self.recent)) > KEPT_MAX:
            return False
        return all(0 <= one < math.inf for one in figures)


class Accounts:
    """Service by tenant, in tokens over its weight. Owned by the lines; nothing here knows a request."""

    def __init__(self, settings: FairnessSettings) -> None:
        """Start with nobody having had anything."""
        assert settings.quantum_tokens > 0, "fairness is off, nobody keeps accounts"
        self.settings = settings
        self._had: dict[str, float] = {}
        self._floor = 0.0
        "The lower edge of the lowest band in which anybody waited; never falls."
        self._recent: dict[str, float] = {}
        "By tenant, tokens of recent service, in units that grow in place of all that is old fading."
        self._recent_sum = self._recent_weight = 0.0
        "Of all of those: their service, and their shares."
        self._fresh = 1.0
        "What a token of service counts now in those units."
        self._rate, self._rated_at = 0.0, -math.inf
        "Tokens of service given a second of late, and until when that is counted."
        self._missed = 0.0
        "Of the latest promises to tenants within their share, the part that was not kept."

    def __len__(self) -> int:
        return len(self._had)

    def service(self, prompt_tokens: float, output_tokens: float) -> float:
        """Tokens of service: prompt tokens computed, and output tokens at their weight."""
        return prompt_tokens + self.settings.output_weight * output_tokens

    def had(self, tenant: str) -> float:
        """What it has had, in tokens over its weight."""
        return self._had.get(tenant, self._start)

    def band(self, had: float) -> int:
        """The band of an account; lower goes first."""
        return int(had // self.settings.quantum_tokens)

    def standing(self, tenant: str) -> float:
        """What its promises count: the less the further it is beyond its share, as far as others come short by that."""
        beyond = self._beyond(tenant)
        if beyond <= 1.0 or not self._missed:
            return 1.0
        needed = min(1.0, self._missed / SHORT)
        faded: float = beyond ** (-STEEP * needed)
        return max(self.settings.over_worth, faded)

    def settle(self, tenant: str, *, is_kept: bool) -> None:
        """A promise to one of its requests was kept, or will not be."""
        if self._beyond(tenant) <= 1.0:
            self._missed += ((not is_kept) - self._missed) / SETTLED

    def _beyond(self, tenant: str) -> float:
        """Its recent use in units of its share of all recent use."""
        used = self._recent.get(tenant, 0.0)
        if used <= 0.0:
            return 0.0
        return used / self.weight(tenant) * self._recent_weight / max(used, self._recent_sum)

    def pass_time(self, now: float) -> None:
        """What was given counts as spread over the seconds until now, in unix seconds."""
        passed_s = now - self._rated_at
        if passed_s > 0:
            self._rate *= math.exp(-passed_s / RATED_S)
            self._rated_at = now

    def drain_s(self, service: float, share: float) -> float:
        """Seconds in which so many tokens of service are given to this share of the pool, as it has served of late."""
        return service / (self._rate * share) if self._rate > 0 else math.inf

    def join(self, tenant: str) -> None:
        """It begins to wait: what it did not use while it had nothing here is gone, but for a quantum."""
        self._had[tenant] = max(self.had(tenant), self._start)
        if len(self._had) > IDLE_MAX:
            self._forget()

    def lift(self, lowest_band: int) -> None:
        """Nobody who waits is in a lower band than this."""
        self._floor = max(self._floor, float(lowest_band * self.settings.quantum_tokens))

    def charge(self, tenant: str, service: float) -> None:
        """It is given so much; less than nothing takes back what was charged too much."""
        highest = self._floor + LEAD_MAX * self.settings.quantum_tokens
        had = self.had(tenant) + service / self.weight(tenant)
        self._had[tenant] = max(0.0, min(had, highest))
        self._rate = max(0.0, self._rate + service / RATED_S)
        self._use(tenant, service)

    def export(self, charged: Iterable[tuple[str, float]]) -> Given:
        """What a new leader needs to know.

        Args:
            charged: tenant and tokens of service of each request that some worker holds.
        """
        charged = list(charged)
        present = {tenant for tenant, _ in charged}
        # The rest say no more than a newcomer's.
        leads = [one for one in self._had.items() if one[1] > self._start or one[0] in present]
        leads.sort(key=lambda one: (-one[1], one[0]))
        had = dict(leads[:KEPT_MAX])
        used = sorted(self._recent.items(), key=lambda one: (-one[1], one[0]))
        recent = {tenant: service / self._fresh for tenant, service in used[:KEPT_MAX]}
        for tenant, service in charged:
            if tenant in had:
                had[tenant] = max(0.0, had[tenant] - service / self.weight(tenant))
            if tenant in recent:
                recent[tenant] = max(0.0, recent[tenant] - service)
        return Given(floor=self._floor, had=had, recent=recent, missed=self._missed)

    def restore(self, given: Given) -> None:
        """Take over the accounts of an earlier leader, before anybody waits here; they must be sound."""
        self._floor = given.floor
        highest = self._floor + LEAD_MAX * self.settings.quantum_tokens
        self._had = {tenant: min(had, highest) for tenant, had in given.had.items()}
        self._recent = dict(given.recent)
        self._missed = given.missed
        self._fresh = 1.0
        self._sum_up()

    def _use(self, tenant: str, service: float) -> None:
        """Count it among the recent. What went before fades as service is given, not with time."""
        faded = max(0.0, service) / (RECENT * self.settings.quantum_tokens)
        self._fresh *= math.exp(min(faded, FADED_MAX))
        before = self._recent.get(tenant, 0.0)
        after = max(0.0, before + service * self._fresh)
        if tenant not in self._recent:
            self._recent_weight += self.weight(tenant)
        self._recent[tenant] = after
        self._recent_sum += after - before
        if self._fresh > FADED or len(self._recent) > IDLE_MAX:
            self._fade()

    def _fade(self) -> None:
        """Count in today's units again, without those whose use has faded; of too many, without the least."""
        latest = sorted(self._recent.items(), key=lambda one: one[1])[-(IDLE_MAX // 2) :]
        least = latest[-1][1] / FADED
        self._recent = {one: used / self._fresh for one, used in latest if used > least}
        self._fresh = 1.0
        self._sum_up()

    def _sum_up(self) -> None:
        self._recent_sum = sum(self._recent.values())
        self._recent_weight = sum(map(self.weight, self._recent))

    def weight(self, tenant: str) -> float:
        """Its share beside those of others; 1 where none is set."""
        return self.settings.weights.get(tenant, 1.0)

    @property
    def _start(self) -> float:
        """Where newcomers begin."""
        return max(0.0, self._floor - self.settings.quantum_tokens)

    def _forget(self) -> None:
        """Drop the accounts that say no more than a newcomer's; of those with a lead, the smallest where it must be."""
        kept = {tenant: had for tenant, had in self._had.items() if had > self._start}
        if len(kept) > IDLE_MAX // 2:  # half at once: the next ones come free
            kept = dict(sorted(kept.items(), key=lambda one: one[1])[-(IDLE_MAX // 2) :])
        self._had = kept
