"""What workers report: beats and rewards; and the jobs taken back from endpoints that fall silent."""

from scheduler import forecast, ledger
from scheduler.events import Recovered
from scheduler.memory import Memory
from scheduler.prefix import Account
from scheduler.requests import Requests
from scheduler.state import Endpoint, Kept, Ticket
from scheduler.wire.client import Control
from scheduler.wire.words import KV_PARAMS_BYTES
from scheduler.wire.worker import Beat, Reward

FORGIVEN_MAX = 16
"""Attempts lost before an engine had them that do not count.

A restarted worker takes all its endpoints' jobs with it, once for each endpoint; a request that kills whoever
takes it, before that can say so, still ends.
"""

PATIENCE_S = 2.0
"How long one whose prompt is computed may wait for an endpoint where its pace is kept."

MISSED_S = 2.0
"""How long a worker must say that it does not have a job before it is believed.

Its end may have been read before the beat was written and still lie behind it; a second is much for that.
"""


class Endpoints:
    """Events about endpoints: beats open and close their slots everywhere, rewards teach the predictor and the caches."""

    def __init__(self, memory: Memory, requests: Requests) -> None:
        """Keep accounts in this memory; `requests` ends what must not be tried again."""
        self._memory = memory
        self._requests = requests
        self._fleet = memory.book.fleet
        self._lease_at = float("-inf")
        "No lease ends before this moment: a beat only moves a lease's end away, so few steps need look."
        self._reborn: dict[str, Beat] = {}
        """
        The first beat of each endpoint that was restarted. What it held before is taken back by the next `decide`, when
        the rewards that were read in the same step are known.
        """
        self._astray: list[tuple[Ticket, Endpoint]] = []
        "Recovered from before an endpoint's restart: taken back likewise."
        self._missing: list[tuple[Ticket, int]] = []
        "Requests that their worker does not have, and at which attempt: taken back likewise."

    @property
    def has_news(self) -> bool:
        """Whether the next `decide` has something to take back."""
        return bool(self._reborn or self._astray or self._missing)

    def moments(self) -> list[float]:
        """When the next lease may end."""
        kv_at = self._memory.book.legs.next_loss_at()
        leases = [] if kv_at is None else [kv_at]
        return [self._lease_at, *leases] if self._fleet.endpoints else leases

    # Facts

    def beat(self, beat: Beat) -> None:
        """It lives, and this is what it has begun since the last beat."""
        endpoint = self._fleet.endpoints.get(beat.endpoint)
        if beat.epoch < self._fleet.epochs.get(beat.endpoint, 0):
            return  # a worker that was replaced still talks
        if endpoint is not None and beat.epoch > endpoint.epoch:
            self._reborn[beat.endpoint] = beat
            self._fleet.epochs[beat.endpoint] = beat.epoch
            return
        if endpoint is None:
            endpoint = self._join(beat)
        else:
            self._fleet.hear(endpoint, beat, self._memory.now)
            keeps = not beat.no_prefix_cache
            self._memory.prefixes.resize(endpoint.slot, beat.kv_tokens, keeps=keeps)
            self._memory.sessions.resize(endpoint.slot, beat.kv_tokens, keeps=keeps)
        self._progress(beat)
        if endpoint.away_at is not None:
            # An engine that does not answer its own worker hands over nothing: better found out here than by others.
            for ticket in self._memory.book.legs.waiting_for(endpoint.name):
                self._lose_kv(
                    ticket, f"{endpoint.name} is away: {beat.reason or 'no reason given'}"
                )
        if beat.kv_epoch:
            self._memory.prefixes.hear(endpoint.slot, _account(beat))
        if beat.read_at is not None:
            self._look_for_missing(endpoint, beat, beat.read_at)

    def reward(self, reward: Reward) -> None:
        """An attempt is over: learn from it, and finish the request or let it wait again."""
        book, now = self._memory.book, self._memory.now
        endpoint = self._fleet.endpoints.get(reward.endpoint)
        ticket = book.tickets.get(reward.id)
        if endpoint is not None and endpoint.epoch == reward.epoch:
            self._learn(reward, endpoint, ticket)
        if ticket is None or ticket.attempt != reward.attempt:
            return
        if reward.outcome == "prefilled" and ticket.is_held:
            self._prefilled(reward, ticket)
        elif reward.outcome not in ("returned", "prefilled"):
            self._finish(reward, ticket, endpoint)
        elif ticket.is_held:
            book.give_back(ticket, "hand_back", now)
            if endpoint is not None and not ticket.is_cancelled:
                endpoint.rest(now)
                self._fleet.resting.append(endpoint)
            if ticket.is_cancelled:
                self._requests.end_if_over(ticket)

    def drain(self, event: Control) -> None:
        """A person drains or resumes an endpoint: no new work, or work again."""
        self._fleet.drain(event.endpoint, is_drained=event.action == "drain")

    def recovered(self, ticket: Ticket, event: Recovered) -> None:
        """Put it where an earlier leader's commands had left it."""
        if event.prefilled is None:
            self._hold(ticket, event)
        else:
            self._go_on(ticket, event.prefilled)

    def _hold(self, ticket: Ticket, event: Recovered) -> None:
        """It was given to this endpoint, which may not have been heard from yet: it has a lease."""
        endpoint = self._fleet.endpoints.get(event.endpoint) or self._expect(event)
        ticket.attempt = max(1, event.attempt)
        ticket.computed_tokens = ticket.prompt_tokens
        line = ledger.uncached(
            ticket,
            answer_part=self._memory.settings.plan.answer_part,
            kv_max=self._fleet.kv_max.item(endpoint.slot),
        )
        self._memory.book.recover(ticket, endpoint, line, self._memory.now)
        if endpoint.epoch != event.epoch:
            self._astray.append((ticket, endpoint))
        if ticket.is_cancelled:
            self._requests.abort_later(ticket)

    def _go_on(self, ticket: Ticket, reward: Reward) -> None:
        """It stood between two legs: so it does again while its KV is there, else it waits as at its beginning."""
        kept = self._kept(reward, ticket)
        if kept is None:
            self._requests.wait(ticket)
            return
        ticket.computed_tokens = _computed(reward)
        self._memory.book.resume(ticket, kept)
        self._requests.end_if_over(ticket)

    def _finish(self, reward: Reward, ticket: Ticket, endpoint: Endpoint | None) -> None:
        """Its worker has written its end."""
        book, is_completed = self._memory.book, reward.outcome == "completed"
        if is_completed or reward.first_token_at is not None:
            book.legs.fetched(ticket.id)
        if is_completed:
            is_second = ticket.leg == "decode"
            computed = ticket.computed_tokens if is_second else _computed(reward)
            book.lines.charge(ticket, computed, reward.output_tokens)
            if reward.on_time is not None:
                book.lines.settle(ticket, is_kept=reward.on_time)
        book.finish(ticket, self._memory.now)
        if endpoint is not None and is_completed:
            endpoint.returns = 0

    def _prefilled(self, reward: Reward, ticket: Ticket) -> None:
        """Its prompt is computed. It waits for an endpoint that decodes, or from the start where its KV is gone or it was cancelled."""
        book, memory = self._memory.book, self._memory
        kept = self._kept(reward, ticket)
        if kept is None or ticket.is_cancelled:
            book.give_back(ticket, "hand_back", memory.now)
            self._requests.end_if_over(ticket)
            return
        ticket.computed_tokens = _computed(reward)
        book.hand_over(ticket, kept, memory.now)
        memory.note(ticket, "prefilled", f"on {kept.endpoint}: waits for an endpoint that decodes")

    def _kept(self, reward: Reward, ticket: Ticket) -> Kept | None:
        """The KV that a prefill leg speaks of; None where it is gone, or the leg did not say where it is."""
        now, lease_s = self._memory.now, self._memory.settings.kv_lease_s
        endpoint = self._fleet.endpoints.get(reward.endpoint)
        is_sound = ticket.leg == "prefill" and 0 < len(reward.kv_params) <= KV_PARAMS_BYTES
        if endpoint is None or endpoint.epoch != reward.epoch or endpoint.away_at is not None:
            return None
        if not is_sound:
            return None
        # The engine's lease began when it was done, however late we hear of it.
        since_at = now if reward.finished_at is None else min(now, reward.finished_at)
        if since_at + lease_s <= now:
            return None
        return Kept(
            endpoint=endpoint.name,
            epoch=endpoint.epoch,
            tokens=float(ticket.prompt_tokens),
            params=reward.kv_params,
            cached_tokens=reward.cached_tokens,
            until_at=since_at + lease_s,
            patient_until_at=since_at + min(PATIENCE_S, 0.5 * lease_s),
        )

    def _learn(self, reward: Reward, endpoint: Endpoint, ticket: Ticket | None) -> None:
        slot = endpoint.slot
        is_seen = ticket is not None and ticket.seen_attempt == reward.attempt
        self._memory.predictor.learn(reward, slot, is_seen=is_seen)
        if ticket is None or ticket.attempt != reward.attempt:
            return
        if reward.cached_tokens is not None and reward.leg != "decode":
            self._correct(slot, ticket, reward, reward.cached_tokens)
        if reward.tpot_s is not None and ticket.pace:
            # The load at its beginning and at its end, halfway: nearer to what it met than either.
            ends = zip(ticket.pace, self._memory.pace_row(slot), strict=True)
            row = [0.5 * (first + last) for first, last in ends]
            self._memory.predictor.pace.learn(slot, row, reward.tpot_s)

    def _correct(self, slot: int, ticket: Ticket, reward: Reward, cached_tokens: int) -> None:
        """What was believed of its cache, against what the engine found."""
        memory, request = self._memory, ticket.request
        if request.blocks:
            memory.prefixes.correct(
                slot, believed_tokens=ticket.cached_tokens, cached_tokens=cached_tokens
            )
        elif request.session:
            memory.sessions.correct(
                slot, expected_tokens=ticket.session_tokens, cached_tokens=cached_tokens
            )
            # What was said is cached as well, and the session's next prompt begins with it.
            memory.sessions.insert(
                slot, request.session, reward.prompt_tokens + reward.output_tokens
            )

    def _progress(self, beat: Beat) -> None:
        """What it began since the last beat. A report about another attempt moves nothing."""
        for report in beat.started:
            ticket = self._reported(beat.endpoint, report, parts=2)
            if ticket is not None:
                self._memory.book.start(ticket)
        for report in beat.first_tokens:
            ticket = self._reported(beat.endpoint, report, parts=3)
            if ticket is not None:
                self._memory.book.first_token(ticket, self._memory.now)
                self._see(ticket, report)

    def _see(self, ticket: Ticket, report: str) -> None:
        """Learn from a first token when it comes: the answer's end, and with it the reward, may be a minute away."""
        slot = self._fleet.endpoints[ticket.endpoint].slot
        is_new = ticket.leg != "decode" and ticket.seen_attempt != ticket.attempt
        if not is_new or not self._memory.predictor.is_young(slot):
            return
        seen = forecast.held(ticket.features, ticket.predicted_s, _seconds(report))
        if seen is not None:
            ticket.seen_attempt = ticket.attempt
            self._memory.predictor.see(seen, slot)

    def _look_for_missing(self, endpoint: Endpoint, beat: Beat, read_at: float) -> None:
        """Find jobs that the worker must have read and does not have: after `MISSED_S` they are taken back."""
        held = frozenset(beat.holds)
        for ticket in endpoint.held.values():
            is_named = ticket.id > beat.holds_after and (
                not beat.holds_to or ticket.id <= beat.holds_to
            )
            if not is_named or ticket.handed_at >= read_at:
                continue
            if f"{ticket.id}:{ticket.attempt}" in held:
                ticket.missed_at = None
            elif ticket.missed_at is None:
                ticket.missed_at = self._memory.now
            elif self._memory.now - ticket.missed_at >= MISSED_S:
                self._missing.append((ticket, ticket.attempt))

    def _reported(self, endpoint: str, report: str, parts: int) -> Ticket | None:
        """The ticket that `id:attempt` or `id:attempt:milliseconds` speaks of, if this endpoint holds it."""
        words = report.rsplit(":", parts - 1)
        ticket = self._memory.book.tickets.get(words[0])
        if len(words) != parts or ticket is None or ticket.endpoint != endpoint:
            return None
        return ticket if words[1] == str(ticket.attempt) else None

    def _join(self, beat: Beat) -> Endpoint:
        endpoint = self._fleet.join(beat, self._memory.now)
        self._memory.book.ledger.open(endpoint.slot)
        self._memory.predictor.open(endpoint.slot, beat)
        keeps = not beat.no_prefix_cache
        self._memory.prefixes.open(endpoint.slot, beat.kv_tokens, keeps=keeps)
        self._memory.sessions.open(endpoint.slot, beat.kv_tokens, keeps=keeps)
        return endpoint

    def _expect(self, event: Recovered) -> Endpoint:
        """An endpoint known only from what it holds: away until its first beat."""
        beat = Beat(endpoint=event.endpoint, epoch=event.epoch, state="away")
        return self._join(beat)

    # Losses

    def take_back_the_lost(self) -> None:
        """Let the requests wait again whose endpoint was restarted or fell silent, or whose worker does not have them."""
        if self.has_news:
            self._take_back_the_named()
        if self._lease_at <= self._memory.now:
            self._lose_the_silent()
        legs = self._memory.book.legs
        for ticket in legs.lost(self._memory.now) if legs.kept else ():
            self._lose_kv(ticket, "nobody could decode it before its KV was forgotten")

    def _take_back_the_named(self) -> None:
        for ticket, endpoint in self._astray:
            if ticket.is_held and ticket.endpoint == endpoint.name:
                self._take_back(ticket, endpoint, f"{endpoint.name} began a new life")
        self._astray.clear()
        for ticket, attempt in self._missing:
            if ticket.is_held and ticket.attempt == attempt:
                endpoint = self._fleet.endpoints[ticket.endpoint]
                self._take_back(ticket, endpoint, f"{endpoint.name} does not have it")
        self._missing.clear()
        for name, beat in self._reborn.items():
            endpoint = self._fleet.endpoints[name]
            self._lose(endpoint, f"{name} began a new life")
            self._join(beat)
        self._reborn.clear()

    def _lose_the_silent(self) -> None:
        lease_s, now = self._memory.settings.lease_s, self._memory.now
        for endpoint in list(self._fleet.endpoints.values()):
            if endpoint.lost_at(lease_s) <= now:
                silent_s = now - endpoint.seen_at
                self._lose(endpoint, f"{endpoint.name} was last heard {silent_s:.1f} s ago")
        ends = [endpoint.lost_at(lease_s) for endpoint in self._fleet.endpoints.values()]
        self._lease_at = min(ends, default=now + lease_s)

    def _lose(self, endpoint: Endpoint, reason: str) -> None:
        """Take back all it holds, and let it go: it removes itself only, never stalls the pool."""
        for ticket in list(endpoint.held.values()):
            self._take_back(ticket, endpoint, reason)
        for ticket in self._memory.book.legs.lose(endpoint.name, endpoint.slot):
            self._lose_kv(ticket, reason)
        self._fleet.leave(endpoint)
        self._memory.predictor.close(endpoint.slot)
        self._memory.prefixes.close(endpoint.slot)
        self._memory.sessions.close(endpoint.slot)

    def _lose_kv(self, ticket: Ticket, reason: str) -> None:
        """Its prompt must be computed again: the leg that did it is no attempt that failed."""
        self._memory.book.lose_kv(ticket)
        self._memory.note(ticket, "kv_lost", reason)

    def _take_back(self, ticket: Ticket, endpoint: Endpoint, reason: str) -> None:
        if ticket.state == "assigned" and ticket.forgiven < FORGIVEN_MAX:
            ticket.forgiven += 1
        self._memory.outbox.reclaim(ticket, endpoint, reason, self._memory.now)
        self._memory.book.give_back(ticket, "reclaim", self._memory.now)
        self._requests.end_if_over(ticket)


def _computed(reward: Reward) -> int:
    """Tokens of the prompt that were computed, and not found in the cache."""
    return max(0, reward.prompt_tokens - (reward.cached_tokens or 0))


def _account(beat: Beat) -> Account:
    return Account(
        epoch=beat.kv_epoch,
        seq=beat.kv_seq,
        stored=beat.kv_stored,
        removed=beat.kv_removed,
        rest=beat.kv_rest,
        was_empty=beat.kv_was_empty,
    )


def _seconds(report: str) -> float | None:
    """What `id:attempt:milliseconds` says; None where that is no number."""
    try:
        return 1e-3 * float(report.rpartition(":")[2])
    except ValueError:
        return None
