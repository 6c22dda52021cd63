"""What the endpoints can still take in one step: time, seats, KV, and slower tokens. Every choice makes it smaller."""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from scheduler.fleet import Capacities, Eligible
from scheduler.ledger import Backlog, Line, Rates, asked_kv
from scheduler.pace import WHOLE, Load
from scheduler.pins import Pins
from scheduler.pressure import pressed
from scheduler.state import Bools, Floats, Ticket


class Decodes:
    """Who decodes where, and what they were promised per token.

    Most steps ask nothing of it, where nobody was promised a pace: `load` is made when first asked for.
    """

    def __init__(
        self,
        make_load: Callable[[], Load],
        *,
        tightest_s: Floats,
        promised: Floats,
        is_bound: bool,
    ) -> None:
        """Start from the ledger, which is not changed.

        Args:
            make_load: what decoding costs now.
            tightest_s: float64[n_slots], the shortest seconds per token promised to somebody there.
            promised: float64[n_slots], what the promises per token made there are worth together.
            is_bound: whether anybody anywhere was promised a pace.
        """
        self._make_load = make_load
        self._load: Load | None = None
        self._taken: list[tuple[int, float]] = []
        "Slot and KV tokens of each one more that will decode there,"
        self._added: list[tuple[int, float]] = []
        "and by how many seconds per token it slows all; of the last ones not reckoned yet."
        self.tightest_s = tightest_s
        self.began_s = tightest_s
        "The same when the step began."
        self.promised = promised
        self.is_bound = is_bound
        self._is_own = False

    @property
    def load(self) -> Load:
        """What decoding cost when the step began."""
        if self._load is None:
            self._load = self._make_load()
        return self._load

    def pace_s(self, kv: Floats) -> Floats:
        """Seconds per token with one sequence more that reads so many KV tokens; float64[n_slots] both."""
        return self.joined_s(self.load.token_s * kv)

    def joined_s(self, read_s: Floats) -> Floats:
        """The same, where reading them takes so long; float64[n_slots] both."""
        load = self.load
        pace_s: Floats = load.joined_s + read_s
        for slot, taken_kv in self._taken[len(self._added) :]:
            token_s = load.token_s.item(slot)
            self._added.append((slot, load.sequence_s.item(slot) + token_s * taken_kv))
        for slot, added_s in self._added:
            pace_s[slot] += added_s
        return pace_s

    def expect(self, slot: int, kv: float) -> None:
        """One more will decode there, and read so much."""
        self._taken.append((slot, kv))

    def take(self, slot: int, line: Line) -> None:
        """One more decodes there."""
        self.expect(slot, line.kv)
        if line.tpot_s < math.inf:
            if not self._is_own:
                self.tightest_s, self.promised = self.tightest_s.copy(), self.promised.copy()
                self._is_own = True
            self.tightest_s[slot] = min(self.tightest_s[slot], line.tpot_s)
            self.promised[slot] += line.weight
            self.is_bound = True


class Room:
    """What the endpoints can still take in this step; every choice makes it smaller."""

    def __init__(
        self,
        *,
        rates: Rates,
        backlog: Backlog,
        seats: Floats,
        kv: Floats,
        capacities: Capacities,
        pins: Pins,
        decodes: Decodes,
        eligible: Eligible,
        answer_part: float = 1.0,
        unbegun: Callable[[Floats], Floats] | None = None,
    ) -> None:
        """Start from the ledger; `seats` and `kv` are what is free, `inf` where unknown.

        `eligible` are those who may take something of what waits, at least one. `answer_part` is of `PlanSettings`.
        `unbegun` says how many on each slot are still to begin, by the seconds of its steps; None: nobody.
        """
        self.rates = rates
        self.backlog_s = backlog.seconds(rates)
        "Until each could begin something new when the step began."
        self.queued_s = self.backlog_s
        "The same without the seconds by which a head is late, which are no work."
        if backlog.overdue_s is not None:
            self.queued_s = self.backlog_s - backlog.overdue_s
        self.start_s = self.backlog_s.copy()
        "The same now, with the places kept for the more urgent."
        self.open_s = self.start_s + eligible.barrier_s
        "The same; `inf` where nothing more may go."
        if _least(seats) <= 0:
            self.open_s[seats <= 0] = math.inf
        self.usable = eligible.slots
        "Which may take something of what waits, once there is room; None: all."
        self.count = eligible.count
        "How many those are; at least one."
        self.tokens = backlog.tokens
        self.pairs = backlog.pairs
        self.seats = seats
        self.kv = kv
        self.kv_max = capacities.kv
        self.pins = pins
        self.decodes = decodes
        self.length_max = capacities.length
        self.length_least = capacities.length_least
        self.reserved: dict[int, None] = {}
        "Slots that somebody more urgent waits for."
        self.only_prefills: Bools | None = None
        "Slots that hold the KV of prompts alone; None: nobody does."
        self._answer_part = answer_part
        self.probed: Bools | None = None
        "Slots that were never measured and on which somebody is; None: nobody asks."
        self.version = 0
        "Grows with each change after which fewer requests may start: what was made out of an older one is stale."
        self._kv_least = _least(kv)
        self._is_kv_known = capacities.is_kv_known
        self._used: Floats | None = None
        self._find_unbegun = unbegun
        self._unbegun: Floats | None = None
        self._taken: list[tuple[int, float]] = []
        self._is_new: Bools | None = None

    def probe(self, is_new: Bools, is_held: Bools) -> None:
        """Keep account of `probed`: one request at a time explores an endpoint of which nothing was measured yet."""
        self._is_new = is_new
        self.probed = is_new & is_held

    @property
    def busy_s(self) -> Floats:
        """Until each could begin something new, by what was handed over."""
        busy_s = self.backlog_s.copy()
        for slot, work_s in self._taken:
            busy_s[slot] += work_s
        return busy_s

    @property
    def used(self) -> Floats:
        """The part of its KV that each has given away; 0 where unknown."""
        if self._used is None:
            if self._is_kv_known:
                self._used = WHOLE - self.kv / self.kv_max
            else:
                known = np.isfinite(self.kv_max) & (self.kv_max > 0)
                free = np.divide(self.kv, self.kv_max, out=np.ones(len(self.kv)), where=known)
                self._used = 1.0 - free
        return self._used

    @property
    def unbegun(self) -> Floats:
        """How many each has been handed that it has not begun; who is nearly due to begin counts in part."""
        if self._unbegun is None:
            if self._find_unbegun is None:
                self._unbegun = np.zeros(len(self.kv))
            else:
                self._unbegun = self._find_unbegun(self.decodes.load.joined_s)
            for slot, _ in self._taken:
                self._unbegun[slot] += 1.0
        return self._unbegun

    @functools.cached_property
    def _pace_s(self) -> tuple[float, float]:
        """When the step began: seconds per token in the mean over the slots, and the shortest that anybody was promised."""
        return self.mean(self.decodes.load.joined_s), _least(self.decodes.began_s)

    def pressed(self, tpot_s: float | None) -> float:
        """How near this promise per token, or anybody's, is to breaking; 1 without one, or where prompts are computed apart."""
        if tpot_s is None or self.only_prefills is not None:
            return 1.0
        pace_s, tightest_s = self._pace_s
        return pressed(pace_s, min(tpot_s, tightest_s))

    def mean(self, values: Floats) -> float:
        """Over the slots that may take something; float64[n_slots]."""
        usable = values if self.usable is None else values[self.usable]
        return float(np.add.reduce(usable)) / self.count

    @property
    def earliest_s(self) -> float:
        """No first token can come sooner, however short its prompt."""
        return _least(self.open_s + self.rates.overhead_s)

    def can_start(self, within_s: float) -> bool:
        """Whether any endpoint with a seat could begin something new so soon."""
        return _least(self.open_s) <= within_s

    def asked_kv(self, ticket: Ticket) -> float:
        """KV tokens that a request asks for."""
        return asked_kv(ticket, self._answer_part)

    def asked_by(self, line: Sequence[Ticket]) -> Floats:
        """The same of many, who ask for their prompts alone where some slots only prefill; float64[n_line]."""
        prompts = np.array([ticket.prompt_tokens for ticket in line], dtype=float)
        kv: Floats = np.maximum(prompts, 1.0)
        if self.only_prefills is None:
            answers = np.array([ticket.output_tokens for ticket in line], dtype=float)
            kv += np.ceil(self._answer_part * answers)
        return kv

    def is_tight(self, kv: float) -> bool:
        """Whether so many KV tokens may be too many for somebody."""
        return self._kv_least < kv

    def held_kv(self, prompt: float, kv: float) -> Floats:
        """KV tokens that a request would hold on each slot: no more than there are, and of a prefill leg the prompt's."""
        held: Floats = np.minimum(kv, self.kv_max)
        if self.only_prefills is not None:
            held = np.where(self.only_prefills, np.minimum(held, prompt + 1.0), held)
        return held

    def shut(self, slot: int) -> None:
        """Nothing more may go there."""
        if self.open_s[slot] < math.inf:
            self.open_s[slot] = math.inf
            self.version += 1

    def withhold(self, kv: Floats) -> None:
        """So many KV tokens of each are not to be had after all."""
        self.version += 1
        self.kv = self.kv - kv
        self._kv_least = _least(self.kv)
        self._used = None

    def pledge(self, slot: int, kv: float) -> None:
        """Keep a seat and KV for one that will decode there, whose prompt is computed elsewhere."""
        self.version += 1
        self.kv[slot] -= kv
        self._kv_least = min(self._kv_least, self.kv.item(slot))
        self._used = None
        self.decodes.expect(slot, kv)
        self.seats[slot] -= 1
        if self.seats[slot] <= 0:
            self.shut(slot)

    def reserve(self, slot: int, work_s: float, *, tokens: float, pairs: float) -> None:
        """Keep the place: whoever comes later on this slot starts after it."""
        self.start_s[slot] += work_s
        self.open_s[slot] += work_s
        self.tokens[slot] += tokens
        self.pairs[slot] += pairs
        self.reserved[slot] = None

    def take(self, slot: int, work_s: float, line: Line) -> None:
        """Hand it over: it also takes a seat and its KV."""
        self.version += 1
        self.reserve(slot, work_s, tokens=line.tokens, pairs=line.pairs)
        if self.probed is not None and self._is_new is not None:
            self.probed[slot] = self._is_new[slot]
        self._taken.append((slot, work_s))
        if self._unbegun is not None:
            self._unbegun[slot] += 1.0
        self.kv[slot] -= line.kv
        self._kv_least = min(self._kv_least, self.kv.item(slot))
        if self._used is not None:
            self._used[slot] += line.kv / self.kv_max[slot]
        self.decodes.take(slot, line)
        self.seats[slot] -= 1
        if self.seats[slot] <= 0:
            self.shut(slot)


def _least(values: Floats) -> float:
    """The smallest, of some; in a third of the time of numpy's reductions."""
    return values.item(values.argmin())
