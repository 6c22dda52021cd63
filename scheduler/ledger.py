"""The work handed to each endpoint that has not ended.

The dispatcher's own account, written in the same step as the choice: scraped load is stale, and makes a burst
herd onto one endpoint. It is released by facts only (first token, terminal event, a lease's end), never by a timer.

    commit ──> prefilling ──first_token──> decoding ──release──> nothing
                   `────────────release────────────────────────────^

All amounts are whole or half numbers, so that adding and taking away leaves no dust in the floats.
"""

import bisect
import math

import msgspec
import numpy as np

from scheduler import cost
from scheduler.pins import Pins
from scheduler.prefix import BLOCK_TOKENS
from scheduler.state import Floats, Ticket

OVERDUE_FACTOR = 2.0
"A head that has taken twice its prediction is late: hung or throttled, no longer noise."

OVERDUE_GRACE_S = 0.05
"Besides, for steps and delivery, so that short prompts are not called late."

PROGRESS_MAX = np.array(0.95)
"""
The most that may be presumed done of a prefill whose first token has not been seen.

As an array it is multiplied, and compared, in half the time that numpy takes with a number of Python's.
"""

LEAST_S = 1e-9
"No head and no step is shorter, so that an age can be divided by it."

HEAD_MIN_S = np.array(LEAST_S)
"As an array, likewise."


class Rates(msgspec.Struct, frozen=True):
    """What prefilling costs on every endpoint at this moment; float64[n_slots] each."""

    overhead_s: Floats
    "Seconds each first token takes besides, which do not keep the next one waiting."

    token_s: Floats
    "Seconds per uncached token."

    pair_s: Floats
    "Seconds per pair of attention."


class Backlog(msgspec.Struct, frozen=True):
    """Prefill that stands before the next request; float64[n_slots] each."""

    tokens: Floats
    "Uncached tokens without first token, less what the head must have done by now."

    pairs: Floats
    "The same in pairs of attention."

    overdue_s: Floats | None = None
    """
    How long the head has been later than can be believed; the endpoint is not free, whatever the sums say.

    None: nobody's is.
    """

    def seconds(self, rates: Rates) -> Floats:
        """Predicted seconds until the endpoint can begin something new."""
        seconds: Floats = self.tokens * rates.token_s + self.pairs * rates.pair_s
        if self.overdue_s is not None:
            seconds += self.overdue_s
        return seconds


class Line(msgspec.Struct, frozen=True):
    """One request's account on one endpoint."""

    tokens: float
    "Uncached tokens to prefill; at least 1, since an engine always computes the last one."

    pairs: float
    "Pairs of attention."

    kv: float
    "KV tokens it counts with: prompt and a part of its expected answer, never more than the endpoint has."

    tpot_s: float = math.inf
    "The seconds per token that it was promised and may expect there; `inf`: it binds nobody."

    weight: float = 1.0
    "What that promise is worth."

    begins_at: float = -math.inf
    "When its engine can begin it, by prediction; `-inf`: nobody predicted it."

    blocks: tuple[str, ...] = ()
    "Its prefix chain, no longer than `kv`: what others there hold as well is held once."


class Ledger:
    """One column an endpoint; columns are opened and closed as endpoints come and go."""

    def __init__(self) -> None:
        self.prefilling: list[dict[str, Line]] = []
        self.decoding: list[dict[str, Line]] = []
        self.pins = Pins()
        self._promises: list[list[float]] = []
        "By slot, the seconds per token promised there, shortest first."
        self._n_prefilling = 0
        self.bound = 0
        "Requests anywhere with a promise per token."
        self._sums = np.zeros((12, 0))
        self._name_rows()

    def _name_rows(self) -> None:
        """Views of the sums, float64[n_slots] each.

        `tokens`, `pairs`: to prefill, of requests without first token. `seats`: requests. `kv`: KV tokens, blocks that
        several hold once. `read_kv`: the same, each request's in full, which a decode step reads. `decode_kv`: that of
        those who decode. `head_*`: of the request that is being prefilled, its tokens, pairs, since when in unix
        seconds, and 1 where there is one. `tightest_s`: the least seconds per token promised, `inf` where none is.
        `promised`: the weights of those promises together.
        """
        self.tokens, self.pairs, self.seats, self.kv, self.decode_kv = self._sums[:5]
        self.head_tokens, self.head_pairs, self.head_since, self.head_is = self._sums[5:9]
        self.read_kv, self.tightest_s, self.promised = self._sums[9:]

    def open(self, slot: int) -> None:
        """Give a new endpoint an empty column."""
        if slot == len(self.prefilling):
            self.prefilling.append({})
            self.decoding.append({})
            self._promises.append([])
            self._sums = np.column_stack([self._sums, np.zeros(len(self._sums))])
            self._name_rows()
            self.tightest_s[slot] = math.inf
        assert not self.prefilling[slot], f"slot {slot} still has prefill on it"
        assert not self.decoding[slot], f"slot {slot} still has decode on it"
        self.pins.open(slot)

    def commit(self, slot: int, request_id: str, line: Line, now: float) -> None:
        """Enter a request at the moment it is chosen."""
        lines = self.prefilling[slot]
        assert request_id not in lines, f"request {request_id!r} is already on slot {slot}"
        lines[request_id] = line
        self._n_prefilling += 1
        if len(lines) == 1:
            self._find_head(slot, now)
        self.tokens[slot] += line.tokens
        self.pairs[slot] += line.pairs
        self.seats[slot] += 1
        shared = len(line.blocks) - self.pins.hold(slot, line.blocks)
        self.kv[slot] += line.kv - shared * BLOCK_TOKENS
        self.read_kv[slot] += line.kv
        if line.tpot_s < math.inf:
            self.bound += 1
            self.promised[slot] += line.weight
            bisect.insort(self._promises[slot], line.tpot_s)
            self.tightest_s[slot] = self._promises[slot][0]

    def first_token(self, slot: int, request_id: str, now: float) -> None:
        """Its prefill is done; it decodes. Saying so twice does no harm."""
        line = self._end_prefill(slot, request_id, now)
        if line is not None:
            self.decoding[slot][request_id] = line
            self.decode_kv[slot] += line.kv

    def release(self, slot: int, request_id: str, now: float) -> None:
        """It has left the endpoint, wherever it stood."""
        line = self._end_prefill(slot, request_id, now)
        if line is None:
            line = self.decoding[slot].pop(request_id)
            self.decode_kv[slot] -= line.kv
        self.seats[slot] -= 1
        shared = len(line.blocks) - self.pins.drop(slot, line.blocks)
        self.kv[slot] -= line.kv - shared * BLOCK_TOKENS
        self.read_kv[slot] -= line.kv
        if line.tpot_s < math.inf:
            self.bound -= 1
            promises = self._promises[slot]
            del promises[bisect.bisect_left(promises, line.tpot_s)]
            # Weights are any numbers: what their differences leave is taken away with the last.
            self.promised[slot] = self.promised[slot] - line.weight if promises else 0.0
            self.tightest_s[slot] = promises[0] if promises else math.inf

    def load(self, slot: int) -> tuple[float, float]:
        """How many requests are there, and the KV tokens that they read."""
        return self.seats.item(slot), self.read_kv.item(slot)

    def backlog(self, rates: Rates, now: float) -> Backlog:
        """What stands before a newcomer, dead-reckoned from the predictions and the last first tokens seen."""
        if not self._n_prefilling:
            return Backlog(tokens=np.zeros(len(self.tokens)), pairs=np.zeros(len(self.pairs)))
        tokens, pairs = self.head_tokens, self.head_pairs
        head_s = tokens * rates.token_s + pairs * rates.pair_s
        age_s = self.head_is * (now - self.head_since)
        passed = age_s / np.maximum(head_s, HEAD_MIN_S)
        done = np.minimum(passed, PROGRESS_MAX)
        overdue_s = None
        if passed[passed.argmax()] > OVERDUE_FACTOR:  # in a third of the time of numpy's reductions
            late_s = age_s - OVERDUE_FACTOR * (head_s + rates.overhead_s) - OVERDUE_GRACE_S
            overdue_s = np.maximum(0.0, late_s)
        return Backlog(
            tokens=self.tokens - done * tokens,
            pairs=self.pairs - done * pairs,
            overdue_s=overdue_s,
        )

    def unbegun(self, step_s: Floats, now: float) -> Floats:
        """How many on each slot are still to begin, whom whoever comes now would keep waiting; float64[n_slots].

        An engine begins whatever has come when a step ends, and when that is nobody here knows: who could begin now is
        surely still to begin, and a step, `step_s`, later surely not. In between it counts in part.
        """
        found = np.zeros(len(step_s))
        if self._n_prefilling:
            for slot, lines in enumerate(self.prefilling):
                longest_s = max(step_s.item(slot), LEAST_S)
                for line in lines.values():
                    left_s = line.begins_at + longest_s - now
                    if left_s > 0:
                        found[slot] += min(1.0, left_s / longest_s)
        return found

    def _find_head(self, slot: int, now: float) -> None:
        head = next(iter(self.prefilling[slot].values()), None)
        self.head_tokens[slot] = 0.0 if head is None else head.tokens
        self.head_pairs[slot] = 0.0 if head is None else head.pairs
        self.head_since[slot] = now
        self.head_is[slot] = head is not None

    def _end_prefill(self, slot: int, request_id: str, now: float) -> Line | None:
        lines = self.prefilling[slot]
        if request_id not in lines:
            return None
        was_head = next(iter(lines)) == request_id
        line = lines.pop(request_id)
        self._n_prefilling -= 1
        if was_head:
            self._find_head(slot, now)
        self.tokens[slot] -= line.tokens
        self.pairs[slot] -= line.pairs
        return line


def asked_kv(ticket: Ticket, answer_part: float) -> float:
    """KV tokens that a request asks for: its prompt and this part of its expected answer, in whole tokens."""
    return float(max(1, ticket.prompt_tokens) + math.ceil(answer_part * ticket.output_tokens))


def uncached(ticket: Ticket, *, answer_part: float, kv_max: float) -> Line:
    """A request's account where nothing is known of the cache: as if all of its leg were to be computed."""
    prompt = float(max(1, ticket.prompt_tokens))
    tokens = 0.0 if ticket.leg == "decode" else prompt
    kv = prompt + 1.0 if ticket.leg == "prefill" else asked_kv(ticket, answer_part)
    return Line(tokens=tokens, pairs=cost.pairs(tokens, prompt), kv=min(kv, kv_max))


def chain(blocks: tuple[str, ...], kv: float) -> tuple[str, ...]:
    """The blocks of a prefix chain that so many KV tokens can hold."""
    return blocks[: int(kv / BLOCK_TOKENS)]
