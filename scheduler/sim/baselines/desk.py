"""What a router of the field has on its desk: its endpoints, its books, and the commands it writes."""

import numpy as np

from scheduler import cost
from scheduler.events import Assign, Command, Finish, Reclaim
from scheduler.ledger import Ledger, Line
from scheduler.predict import Predictor
from scheduler.sim.baselines.senses import Account, Asked, Costs, Prefixes, Scrapes
from scheduler.state import Bools
from scheduler.wire.dispatcher import Decision, Job
from scheduler.wire.words import Leg
from scheduler.wire.worker import Beat, Result, Reward


class Desk:
    """Endpoints by slot, and the books that the senses show."""

    def __init__(self, *, lease_s: float, prefix_blocks: int = 0, learns: bool = False) -> None:
        """An empty desk.

        Args:
            lease_s: silence after which an endpoint is lost.
            prefix_blocks: how many blocks a slot's prefix table may hold, 0 for none.
            learns: whether the cost model is kept and taught; without, `costs` are the data sheet's.
        """
        self.ledger = Ledger()
        self.predictor = Predictor()
        self.prefixes = Prefixes(prefix_blocks)
        self.beats: list[Beat] = []
        self.names: list[str] = []
        self.account = Account(self.ledger)
        self.scrapes = Scrapes(self.beats)
        self.costs = Costs(self.predictor, self.ledger)
        self._has_prefixes = prefix_blocks > 0
        self._learns = learns
        self._slots: dict[str, int] = {}
        self._seen_at: list[float] = []
        self._lease_s = lease_s
        self._held: dict[str, tuple[int, Asked]] = {}
        self._attempts: dict[str, int] = {}
        self._reclaims: list[Command] = []
        self._usual_tokens = 256.0
        self.first_legs: frozenset[str] = frozenset()
        "Roles of endpoints that new requests are sent to; empty: all."

    def living(self, asked: Asked, now: float, roles: frozenset[str] = frozenset()) -> list[int]:
        """Slots that were heard from within the lease, serve this model and prompt, and have one of these roles.

        Args:
            asked: whose prompt.
            now: seconds of the run.
            roles: of the leg in question; empty: those that new requests are sent to.
        """
        return [
            slot
            for slot, seen_at in enumerate(self._seen_at)
            if now - seen_at <= self._lease_s
            and self._serves(slot, asked)
            and self.beats[slot].state == "ready"
            and self._has_role(slot, roles or self.first_legs)
        ]

    def takes_first(self) -> Bools:
        """Which slots new requests are sent to."""
        found: Bools = np.array(
            [
                self._has_role(slot, self.first_legs) and beat.state == "ready"
                for slot, beat in enumerate(self.beats)
            ]
        )
        return found

    def _serves(self, slot: int, asked: Asked) -> bool:
        beat = self.beats[slot]
        return asked.prompt_tokens < beat.max_model_len and asked.request.model in beat.models

    def _has_role(self, slot: int, roles: frozenset[str]) -> bool:
        return not roles or not roles.isdisjoint(self.beats[slot].roles)

    def asked(self, request_id: str) -> Asked | None:
        """What was sent under this id and has not been answered."""
        held = self._held.get(request_id)
        return None if held is None else held[1]

    def is_heard(self, now: float) -> Bools:
        """Which slots were heard from within the lease."""
        found: Bools = now - np.array(self._seen_at) <= self._lease_s
        return found

    def is_possible(self, asked: Asked) -> bool:
        """Whether any endpoint ever seen serves this model and could hold this prompt."""
        return any(self._serves(slot, asked) for slot in range(len(self.beats)))

    def send(
        self,
        asked: Asked,
        slot: int,
        now: float,
        predicted_s: float = 0.0,
        *,
        kv_params: bytes = b"",
    ) -> Assign:
        """Enter it in the books and write the command; with `kv_params` it is a decode leg."""
        leg = self._leg(slot, kv_params)
        cached = self.prefixes.match(asked)[slot] if self._has_prefixes else 0
        tokens = float(max(1, asked.prompt_tokens - cached))
        pairs = cost.pairs(tokens, asked.prompt_tokens)
        answer = asked.request.expected_tokens or self._usual_tokens
        kv = float(asked.prompt_tokens) + (answer if leg != "prefill" else 0.0)
        features = self._features(slot, tokens, pairs, now) if self._learns else ()
        if leg == "decode":
            tokens, pairs, features = 0.0, 0.0, ()
        self.ledger.commit(slot, asked.id, Line(tokens=tokens, pairs=pairs, kv=kv), now)
        if leg == "decode":
            self.ledger.first_token(slot, asked.id, now)
        if self._has_prefixes:
            self.prefixes.insert(slot, asked)
        self._held[asked.id] = (slot, asked)
        self._attempts[asked.id] = self._attempts.get(asked.id, 0) + 1
        return self._command(
            asked,
            slot,
            cached=cached,
            predicted_s=predicted_s,
            features=features,
            leg=leg,
            kv_params=kv_params,
            now=now,
        )

    def _leg(self, slot: int, kv_params: bytes) -> Leg:
        if kv_params:
            return "decode"
        return "prefill" if "prefill" in self.beats[slot].roles else "whole"

    def _features(self, slot: int, tokens: float, pairs: float, now: float) -> tuple[str, ...]:
        """What the predictor is to learn from when the answer has passed."""
        decode_kv = self.ledger.decode_kv
        rates = self.predictor.rates(decode_kv)
        backlog = self.ledger.backlog(rates, now)
        return self.predictor.features(
            slot,
            tokens=tokens + float(backlog.tokens[slot]),
            pairs=pairs + float(backlog.pairs[slot]),
            decode_kv=float(decode_kv[slot]),
            start_s=float(backlog.seconds(rates)[slot]),
        )

    def _command(
        self,
        asked: Asked,
        slot: int,
        *,
        cached: int,
        predicted_s: float,
        features: tuple[str, ...],
        leg: Leg,
        kv_params: bytes,
        now: float,
    ) -> Assign:
        request, beat = asked.request, self.beats[slot]
        deadline_s = request.deadline_s
        job = Job(
            id=asked.id,
            entry=asked.entry,
            attempt=self._attempts[asked.id],
            epoch=beat.epoch,
            leg=leg,
            model=request.model,
            path=request.path,
            enqueued_at=asked.enqueued_at,
            ttft_s=request.ttft_s,
            tpot_s=request.tpot_s,
            deadline_at=None if deadline_s is None else asked.enqueued_at + deadline_s,
            priority=request.priority or 0,
            tenant=request.tenant,
            session=request.session,
            prompt_tokens=asked.prompt_tokens,
            cached_tokens=cached,
            expected_tokens=request.expected_tokens,
            decided_at=now,
            prefill_s=predicted_s,
            features=features,
            kv_params=kv_params,
        )
        name = beat.endpoint
        return Assign(
            endpoint=name,
            job=job,
            explain=lambda: Decision(id=asked.id, kind="assigned", at=now, endpoint=name),
        )

    def refuse(self, asked: Asked, reason: str, now: float) -> Finish:
        """Answer it with a rejection."""
        result = Result(
            id=asked.id,
            outcome="rejected",
            reason=reason,
            enqueued_at=asked.enqueued_at,
            finished_at=now,
        )
        return Finish(entry=asked.entry, reply_to="", result=result)

    def hear(self, beat: Beat, now: float) -> list[Asked]:
        """Take in a beat; whoever was lost with an endpoint's former life comes back."""
        slot = self._slots.get(beat.endpoint)
        lost: list[Asked] = []
        if slot is None:
            slot = self._slots[beat.endpoint] = len(self.beats)
            self.beats.append(beat)
            self.names.append(beat.endpoint)
            self._seen_at.append(now)
            self._open(slot, beat)
        elif beat.epoch > self.beats[slot].epoch:
            lost = self.lose(slot, now)
            self._open(slot, beat)
        self.beats[slot] = beat
        self._seen_at[slot] = now
        for report in beat.first_tokens:
            request_id = report.rsplit(":", 2)[0]
            held = self._held.get(request_id)
            if held is not None and held[0] == slot:
                self.ledger.first_token(slot, request_id, now)
        return lost

    def _open(self, slot: int, beat: Beat) -> None:
        self.ledger.open(slot)
        self.predictor.open(slot, beat)
        if self._has_prefixes:
            self.prefixes.open(slot)

    def learn(self, reward: Reward, now: float) -> None:
        """An answer has passed."""
        slot = self._slots[reward.endpoint]
        if self._learns:
            self.predictor.learn(reward, slot)
        if self._held.pop(reward.id, None) is not None:
            self.ledger.release(slot, reward.id, now)
        if reward.outcome in ("prefilled", "returned"):
            return
        self._attempts.pop(reward.id, None)
        self._usual_tokens = round(0.98 * self._usual_tokens + 0.02 * reward.output_tokens)

    def silent(self, now: float) -> list[int]:
        """Slots that hold something and were not heard from within the lease."""
        return [
            slot
            for slot, seen_at in enumerate(self._seen_at)
            if now - seen_at > self._lease_s and self.ledger.seats[slot] > 0
        ]

    def lose(self, slot: int, now: float) -> list[Asked]:
        """Everything that a lost endpoint held, to be sent elsewhere."""
        lost = [asked for held_by, asked in self._held.values() if held_by == slot]
        for asked in lost:
            del self._held[asked.id]
            self.ledger.release(slot, asked.id, now)
            self._reclaims.append(self._reclaim(asked, self.names[slot], now))
        return lost

    def reclaims(self) -> list[Command]:
        """Words that fence what lost endpoints may still say, since they were last asked for."""
        taken, self._reclaims = self._reclaims, []
        return taken

    def _reclaim(self, asked: Asked, endpoint: str, now: float) -> Reclaim:
        attempt = self._attempts[asked.id]
        decision = Decision(id=asked.id, kind="reclaimed", at=now, endpoint=endpoint)
        return Reclaim(
            id=asked.id,
            entry=asked.entry,
            endpoint=endpoint,
            attempt=attempt,
            deadline_at=None,
            decision=decision,
        )

    def lapse_at(self) -> float | None:
        """When the next endpoint that holds something would count as lost."""
        seats = self.ledger.seats
        held = [at for slot, at in enumerate(self._seen_at) if seats[slot] > 0]
        return min(held) + self._lease_s + 1e-3 if held else None
