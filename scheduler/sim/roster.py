"""Who waits for an engine, who runs, and what each computes in the next step: vLLM's scheduler, without its time.

Two deviations from vLLM, both invisible unless prompts under `long_prefill_token_threshold` exhaust a budget: decodes
take their token before running prefills whatever their place in the list, and what a preempted sequence had already
been given in the same step is not handed to another until the next.
"""

from scheduler.sim.arguments import EngineSettings
from scheduler.sim.decodes import Decodes
from scheduler.sim.holdings import Holdings
from scheduler.sim.sequence import Line, Sequence, Status
from scheduler.sim.step import Counters, Step

Chunk = tuple[Sequence, int]
"Who computes how many prompt tokens in a step."


class Roster:
    """A sequence's way through it.

    1. `wait` puts it in line; where another engine has its KV it takes blocks, is told in `take_loading`, and `come`
       puts it beside the line, where it needs nothing but a seat.
    2. `feed` seats it when there is room, and gives it chunks of its prompt.
    3. `decode` when the last is computed; from then on `feed` gives it a token a step, and blocks for it.
    4. `leave` at its end, or back to 1 when `feed` preempts it.
    """

    def __init__(self, settings: EngineSettings, holdings: Holdings, counters: Counters) -> None:
        self.running: dict[str, Sequence] = {}
        self.prefill: dict[str, Sequence] = {}
        "Of the running, those whose prompt is not computed."
        self.decodes = Decodes(settings.block_size)
        "The other running ones."
        self.is_admitting = True
        self._settings = settings
        self._holdings = holdings
        self._pool = holdings.pool
        self._counters = counters
        self._line = Line(by_priority=settings.scheduling_policy == "priority")
        self._loading: list[Sequence] = []
        # Loaded, and waiting for a seat only: behind one that waits for their blocks they would wait for ever.
        self._ready: list[Sequence] = []
        # 1 between giving the decodes the blocks of a step and advancing the clock over it.
        self._fed_ahead = 0
        # The head of the line cannot enter before something is freed.
        self._is_blocked = False

    @property
    def n_waiting(self) -> int:
        """In line; not those whose KV is coming or has come."""
        return self._line.count

    @property
    def can_admit(self) -> bool:
        """Whether the next step may seat somebody."""
        if not self.is_admitting:
            return False
        has_seat = len(self.running) < self._settings.max_num_seqs
        return bool(self._ready and has_seat) or (not self._is_blocked and self._line.count > 0)

    @property
    def has_ready(self) -> bool:
        """Whether somebody needs nothing but a seat."""
        return bool(self._ready)

    def before_newcomers(self) -> list[Sequence]:
        """All whose prompts are to be computed before that of one who comes now."""
        return [*self.prefill.values(), *self._ready, *self._line]

    # Coming and going.

    def wait(self, sequence: Sequence) -> None:
        """It has come: last in line."""
        self._line.push(sequence)
        self._is_blocked = False

    def take_loading(self) -> list[Sequence]:
        """Who has been given blocks for KV that another engine has, since it was last asked."""
        loading, self._loading = self._loading, []
        return loading

    def come(self, sequence: Sequence) -> None:
        """Its KV is here, but for the last token of its prompt."""
        sequence.computed = sequence.prompt_tokens - 1
        self._holdings.seal(sequence, sequence.computed)
        sequence.is_loaded = True
        sequence.status = Status.WAITING
        self._ready.append(sequence)
        self._is_blocked = False

    def stir(self) -> None:
        """Something was freed, or may be shared: ask the head of the line again."""
        self._is_blocked = False

    def block(self) -> None:
        """Ask it no more until something is."""
        self._is_blocked = True

    def drop(self, sequence: Sequence) -> None:
        """Out of wherever it stands, with all it holds freed."""
        if sequence in self._ready:
            self._ready.remove(sequence)
        elif sequence.status is Status.WAITING:
            self._line.forget()
        if sequence.status in (Status.PREFILL, Status.DECODE):
            self.leave(sequence)
        elif sequence.held:
            self._holdings.let_go(sequence)
            self._is_blocked = False

    def decode(self, sequence: Sequence) -> None:
        """Its prompt is computed."""
        del self.prefill[sequence.id]
        self.decodes.join(sequence)

    def leave(self, sequence: Sequence, *, keeps: bool = False) -> None:
        """Out of the running ones: settle what it computed and free its blocks, or keep them for another engine."""
        del self.running[sequence.id]
        n_owned = len(sequence.held)
        if sequence.status is Status.DECODE:
            self.decodes.leave(sequence)
            n_owned = max(n_owned, self._holdings.blocks(sequence.computed + self._fed_ahead))
        else:
            del self.prefill[sequence.id]
        self._holdings.own(sequence, n_owned)
        self._holdings.seal(sequence, sequence.computed)
        self._holdings.let_go(sequence, keeps=keeps)
        self._is_blocked = False

    # A step.

    def feed(self, step: Step) -> list[Chunk]:
        """Give everybody tokens and blocks for this step; who computes how much of a prompt."""
        self._feed_decodes(step)
        return self._feed_prefills(step)

    def feed_decodes(self, n_steps: int) -> bool:
        """Give the decodes blocks for so many steps at once; False, and none given, where they run short."""
        n_blocks = self.decodes.blocks(n_steps)
        if n_blocks > self._pool.free:
            return False
        self._pool.take(n_blocks)
        return True

    def unfeed(self) -> None:
        """The step that was fed is not taken."""
        self._fed_ahead = 0

    def advance(self, n_steps: int) -> list[Sequence]:
        """Let the decodes take their steps; those that have reached their end, still to leave."""
        self._fed_ahead = 0
        return self.decodes.advance(n_steps)

    def _feed_decodes(self, step: Step) -> None:
        """Give every decode that crosses a block's edge its next block, preempting for it."""
        while (n_blocks := self.decodes.blocks(1)) > self._pool.free:
            self._preempt(self._victim(), step)
        self._pool.take(n_blocks)
        self._fed_ahead = 1

    def _feed_prefills(self, step: Step) -> list[Chunk]:
        """Who computes how many prompt tokens: the running first, then from the line."""
        budget = self._settings.max_num_batched_tokens - len(self.decodes)
        chunks: list[Chunk] = []
        for sequence in list(self.prefill.values()):
            if budget == 0:
                break
            chunk = self._chunk(sequence.total_tokens - sequence.computed, budget)
            n_blocks = self._holdings.blocks(sequence.computed + chunk) - len(sequence.held)
            if sequence.status is Status.PREFILL and self._make_room(sequence, n_blocks, step):
                self._extend(sequence, chunk, n_blocks)
                chunks.append((sequence, chunk))
                budget -= chunk
        if step.preempted:
            return [pair for pair in chunks if pair[0].status is Status.PREFILL]
        if self.is_admitting:
            budget = self._seat(budget, chunks)
            if not self._is_blocked:
                self._admit(budget, chunks, step)
        return chunks

    def _admit(self, budget: int, chunks: list[Chunk], step: Step) -> None:
        """Take from the head of the line while slots, tokens and blocks last."""
        while budget > 0 and (sequence := self._line.peek()) is not None:
            if len(self.running) >= self._settings.max_num_seqs:
                self._is_blocked = True
                return
            n_hits = self._holdings.hits(sequence)
            cached = n_hits * self._settings.block_size
            if sequence.is_remote:
                if not self._holdings.fits(sequence, n_hits, sequence.prompt_tokens):
                    self._is_blocked = True
                    return
                self._line.pop()
                self._load(sequence, n_hits, step)
                continue
            wanted = sequence.total_tokens - cached
            if not self._settings.chunked_prefill and wanted > budget:
                return
            chunk = self._chunk(wanted, budget)
            if not self._holdings.fits(sequence, n_hits, cached + chunk):
                self._is_blocked = True
                return
            self._line.pop()
            self._start(sequence, n_hits, step)
            self._extend(sequence, chunk, self._holdings.blocks(cached + chunk) - n_hits)
            chunks.append((sequence, chunk))
            budget -= chunk

    def _seat(self, budget: int, chunks: list[Chunk]) -> int:
        """Let those go on whose KV has come: each computes one token. What is left of the budget."""
        while self._ready and budget > 0 and len(self.running) < self._settings.max_num_seqs:
            sequence = self._ready.pop(0)
            self._join(sequence)
            chunks.append((sequence, 1))
            budget -= 1
        return budget

    def _load(self, sequence: Sequence, n_hits: int, step: Step) -> None:
        """Take blocks for all of a prompt whose KV is to come."""
        self._begin(sequence, n_hits, step)
        self._holdings.take(sequence, self._holdings.blocks(sequence.prompt_tokens) - n_hits)
        sequence.status = Status.LOADING
        self._loading.append(sequence)

    def _start(self, sequence: Sequence, n_hits: int, step: Step) -> None:
        self._begin(sequence, n_hits, step)
        self._join(sequence)

    def _join(self, sequence: Sequence) -> None:
        sequence.status = Status.PREFILL
        self.running[sequence.id] = sequence
        self.prefill[sequence.id] = sequence

    def _begin(self, sequence: Sequence, n_hits: int, step: Step) -> None:
        """Hold what is cached; the first time, say so."""
        self._holdings.begin(sequence, n_hits)
        if sequence.scheduled_at is None:
            sequence.scheduled_at = step.started_at
            sequence.cached_tokens = sequence.computed
            self._counters.prompt_tokens += sequence.prompt_tokens
            if self._settings.prefix_caching:
                self._counters.prefix_queries += sequence.prompt_tokens
                self._counters.prefix_hits += sequence.computed
        step.scheduled.append(sequence)

    def _extend(self, sequence: Sequence, chunk: int, n_blocks: int) -> None:
        """Hold the blocks of the next chunk, and let others share those it fills."""
        self._holdings.take(sequence, n_blocks)
        self._holdings.seal(sequence, sequence.computed + chunk)

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        """Free all it holds; its tokens are recomputed when it is admitted again."""
        self.leave(sequence)
        sequence.status = Status.WAITING
        sequence.computed = 0
        sequence.is_remote = sequence.is_loaded = False
        sequence.preemptions += 1
        self._counters.preemptions += 1
        self._line.push_front(sequence)
        step.preempted.append(sequence)

    def _victim(self) -> Sequence:
        if self._settings.scheduling_policy == "priority":
            return max(self.running.values(), key=lambda s: (s.priority, s.arrived_at, s.ticket))
        return next(reversed(self.running.values()))

    def _make_room(self, sequence: Sequence, n_blocks: int, step: Step) -> bool:
        while self._pool.free < n_blocks:
            victim = self._victim()
            self._preempt(victim, step)
            if victim is sequence:
                return False
        return True

    def _chunk(self, wanted: int, budget: int) -> int:
        threshold = self._settings.long_prefill_token_threshold
        if 0 < threshold < wanted:
            wanted = threshold
        return min(wanted, budget)
