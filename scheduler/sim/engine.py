"""vLLM's v1 engine, one step at a time, without the model.

A step takes one token from every decoding sequence, then fills what is left of the token
budget with chunks of prompts: first of those that run, then of those that wait. Its time
comes from a `Profile`.

Two deviations from vLLM, both invisible unless prompts under
`long_prefill_token_threshold` exhaust a budget: decodes take their token before running
prefills whatever their place in the list, and what a preempted sequence had already been
given in the same step is not handed to another until the next.

Half a request, as vLLM's KV connectors do it: a sequence that `hands_over` leaves its blocks held when it has ended;
one that `is_remote` takes all blocks of its prompt when it is admitted, waits until its KV has come, and then
computes the last token. Preempted, it is computed here from the start.
"""

import numpy as np

from scheduler.sim import refusal
from scheduler.sim.arguments import EngineSettings
from scheduler.sim.decodes import Decodes
from scheduler.sim.durations import Durations
from scheduler.sim.holdings import Holdings
from scheduler.sim.kv import BlockPool
from scheduler.sim.noise import Noise
from scheduler.sim.profile import Profile
from scheduler.sim.sequence import Line, Sequence, Status
from scheduler.sim.step import Counters, Step


class Engine:
    """A protocol object: facts go in with their time, steps come out with theirs.

    1. `add` puts a sequence in the waiting line, or refuses it.
    2. `step` admits it when a slot and blocks are free, and computes its prompt in chunks.
    3. Its last chunk yields the first token; it joins the decodes.
    4. `step` yields one token each until it ends, or preempts it back to 2.
    5. `abort` ends it at any time and frees what it held.

    With KV handed over: `take_loading` tells whose KV is to be fetched, `loaded` that it has come; `forget` frees
    what an ended sequence left for another engine.

    Call `step` again at the `ended_at` of the last one; None means there is nothing to do
    until the next `add` or `resume`.
    """

    def __init__(
        self,
        profile: Profile,
        settings: EngineSettings,
        rng: np.random.Generator | None = None,
    ) -> None:
        self.settings = settings
        kv_tokens = profile.kv_tokens if settings.kv_tokens is None else settings.kv_tokens
        self.kv = BlockPool(kv_tokens // settings.block_size)
        self.holdings = Holdings(self.kv, settings)
        noise = Noise(
            rng,
            sigma=settings.step_noise,
            stall_probability=settings.stall_probability,
            stall_s=settings.stall_s,
        )
        self.durations = Durations(profile, noise)
        self.counters = Counters()
        self._line = Line(by_priority=settings.scheduling_policy == "priority")
        self._all: dict[str, Sequence] = {}
        self._running: dict[str, Sequence] = {}
        self._prefill: dict[str, Sequence] = {}
        self._loading: list[Sequence] = []
        # Loaded, and waiting for a seat only: behind one that waits for their blocks they would wait for ever.
        self._ready: list[Sequence] = []
        self._decodes = Decodes(settings.block_size)
        # 1 between giving the decodes the blocks of a step and advancing the clock over it.
        self._fed_ahead = 0
        self._is_admitting = True
        self._is_frozen = False
        # The head of the line cannot enter before something is freed.
        self._is_blocked = False

    # What can be asked.

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        return self._line.count

    @property
    def kv_usage(self) -> float:
        return self.kv.used / self.kv.capacity

    @property
    def kv_tokens(self) -> int:
        return self.kv.capacity * self.settings.block_size

    @property
    def decode_context(self) -> int:
        """KV tokens that the decodes read in their next step."""
        return self._decodes.context

    def __contains__(self, sequence_id: str) -> bool:
        return sequence_id in self._all

    def produced(self, sequence: Sequence) -> int:
        """Output tokens of a sequence so far; its own count stands still while it decodes."""
        return sequence.output_tokens + self._decodes.gained(sequence)

    def prefill_left(self) -> tuple[int, int]:
        """Prompt tokens to compute before a newcomer's, and their (query, key) pairs of attention."""
        tokens = pairs = 0
        for sequence in [*self._prefill.values(), *self._ready, *self._line]:
            is_waiting = sequence.status is Status.WAITING and not sequence.is_loaded
            done = (
                self.holdings.hits(sequence) * self.settings.block_size
                if is_waiting
                else sequence.computed
            )
            left = sequence.total_tokens - done
            tokens += left
            pairs += left * done + left * left // 2
        return tokens, pairs

    def quiet_s(self) -> float | None:
        """Mean seconds until a decode ends if nothing is added; None when a step may do more.

        While it lasts a caller may let the engine be, and `step` with `until` when it has news.
        """
        if self._is_frozen or self._can_admit() or self._prefill or not self._decodes:
            return None
        decodes = self._decodes
        return self.durations.quiet_s(decodes.next_end, len(decodes), decodes.context)

    # What can be told.

    def add(self, sequence: Sequence) -> None:
        """Put a request in the waiting line.

        Raises:
            QueueFullError: a limit on waiting requests or tokens is reached.
            ValueError: the id is taken, or the request could never fit the KV cache.
        """
        if sequence.id in self._all:
            raise ValueError(f"sequence {sequence.id!r} is already in the engine")
        refusal.check_size(sequence, self.settings, self.kv_tokens)
        self.check_admission()
        self._all[sequence.id] = sequence
        self._line.push(sequence)
        self._is_blocked = False

    def check_admission(self) -> None:
        """Whether a newcomer would be taken in.

        Raises:
            QueueFullError: a limit on requests or on prompt tokens is reached.
        """
        refusal.check_limits(self.settings, self._all.values())

    def abort(self, sequence_id: str) -> Sequence | None:
        """End a request now and free all it held; None if the engine does not have it."""
        sequence = self._all.get(sequence_id)
        if sequence is None:
            return None
        if sequence in self._ready:
            self._ready.remove(sequence)
        elif sequence.status is Status.WAITING:
            self._line.forget()
        if sequence.status in (Status.PREFILL, Status.DECODE):
            self._leave(sequence)
        elif sequence.held:
            self._let_go(sequence)
        sequence.finish_reason = "abort"
        self._retire(sequence)
        return sequence

    def abort_all(self) -> list[Sequence]:
        """End every request, oldest first."""
        aborted = [self.abort(sequence_id) for sequence_id in list(self._all)]
        return [sequence for sequence in aborted if sequence is not None]

    def pause(self, *, freeze: bool) -> None:
        """Admit nobody; with `freeze` the running ones stand still too."""
        self._is_admitting = False
        self._is_frozen = freeze

    def resume(self) -> None:
        self._is_admitting = True
        self._is_frozen = False
        self._is_blocked = False

    def take_loading(self) -> list[Sequence]:
        """Who has been given blocks for KV that another engine has, since it was last asked."""
        loading, self._loading = self._loading, []
        return loading

    def loaded(self, sequence_id: str) -> bool:
        """A prompt's KV has come over the link; False: nobody waits for it any more."""
        sequence = self._all.get(sequence_id)
        if sequence is None or sequence.status is not Status.LOADING:
            return False
        sequence.computed = sequence.prompt_tokens - 1
        self.holdings.seal(sequence, sequence.computed)
        sequence.is_loaded = True
        sequence.status = Status.WAITING
        self._ready.append(sequence)
        self._is_blocked = False
        return True

    def forget(self, sequence_id: str) -> None:
        """Free what an ended sequence left, if that has not happened yet."""
        if self.holdings.forget(sequence_id):
            self._is_blocked = False

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing done, while any block is held."""
        return self.kv.reset()

    def step(self, now: float, until: float | None = None) -> Step | None:
        """Run one step from `now`; None when there is nothing to run.

        With `until`, a stretch in which nothing but decoding happens is run in one call:
        up to the first sequence that ends, or the first step that ends at or after `until`.
        `until` is the next moment at which the caller will `add` or `abort`.
        """
        if self._is_frozen:
            return None
        can_admit = self._can_admit()
        if not (can_admit or self._running):
            return None
        if until is not None and self._decodes and not (can_admit or self._prefill):
            step = self._leap(now, until)
            if step is not None:
                return step
        return self._turn(now)

    def _can_admit(self) -> bool:
        if not self._is_admitting:
            return False
        has_seat = len(self._running) < self.settings.max_num_seqs
        return bool(self._ready and has_seat) or (not self._is_blocked and self._line.count > 0)

    # One step.

    def _turn(self, now: float) -> Step | None:
        step = Step(started_at=now)
        self._feed_decodes(step)
        chunks = self._feed_prefills(step)
        if not (self._decodes or chunks):
            return self._turn_again(step)
        ended_at = now + self._duration_s(chunks, step)
        step.ends.append(ended_at)
        self._advance_decodes(1, ended_at, step)
        self._advance_prefills(chunks, ended_at, step)
        self.counters.steps += 1
        return step

    def _turn_again(self, step: Step) -> Step | None:
        """Everybody who ran was preempted: start over with all blocks free, in the same moment."""
        self._fed_ahead = 0
        if not step.preempted:
            return None
        is_loading = any(s.status is Status.LOADING for s in self._all.values())
        if (self.holdings.n_kept or is_loading) and not self._ready:
            # What is short is held for others, and comes free by their doing.
            self._is_blocked = True
            return None
        again = self._turn(step.started_at)
        if again is not None:
            again.preempted[:0] = step.preempted
        return again

    def _feed_decodes(self, step: Step) -> None:
        """Give every decode that crosses a block's edge its next block, preempting for it."""
        while (n_blocks := self._decodes.blocks(1)) > self.kv.free:
            self._preempt(self._victim(), step)
        self.kv.take(n_blocks)
        self._fed_ahead = 1

    def _feed_prefills(self, step: Step) -> list[tuple[Sequence, int]]:
        """Who computes how many prompt tokens: the running first, then from the line."""
        budget = self.settings.max_num_batched_tokens - len(self._decodes)
        chunks: list[tuple[Sequence, int]] = []
        for sequence in list(self._prefill.values()):
            if budget == 0:
                break
            chunk = self._chunk(sequence.total_tokens - sequence.computed, budget)
            n_blocks = self.holdings.blocks(sequence.computed + chunk) - len(sequence.held)
            if sequence.status is Status.PREFILL and self._make_room(sequence, n_blocks, step):
                self._extend(sequence, chunk, n_blocks)
                chunks.append((sequence, chunk))
                budget -= chunk
        if step.preempted:
            return [pair for pair in chunks if pair[0].status is Status.PREFILL]
        if self._is_admitting:
            budget = self._seat(budget, chunks)
            if not self._is_blocked:
                self._admit(budget, chunks, step)
        return chunks

    def _admit(self, budget: int, chunks: list[tuple[Sequence, int]], step: Step) -> None:
        """Take from the head of the line while slots, tokens and blocks last."""
        while budget > 0 and (sequence := self._line.peek()) is not None:
            if len(self._running) >= self.settings.max_num_seqs:
                self._is_blocked = True
                return
            n_hits = self.holdings.hits(sequence)
            cached = n_hits * self.settings.block_size
            if sequence.is_remote:
                if not self.holdings.fits(sequence, n_hits, sequence.prompt_tokens):
                    self._is_blocked = True
                    return
                self._line.pop()
                self._load(sequence, n_hits, step)
                continue
            wanted = sequence.total_tokens - cached
            if not self.settings.chunked_prefill and wanted > budget:
                return
            chunk = self._chunk(wanted, budget)
            if not self.holdings.fits(sequence, n_hits, cached + chunk):
                self._is_blocked = True
                return
            self._line.pop()
            self._start(sequence, n_hits, step)
            self._extend(sequence, chunk, self.holdings.blocks(cached + chunk) - n_hits)
            chunks.append((sequence, chunk))
            budget -= chunk

    def _seat(self, budget: int, chunks: list[tuple[Sequence, int]]) -> int:
        """Let those go on whose KV has come: each computes one token. What is left of the budget."""
        while self._ready and budget > 0 and len(self._running) < self.settings.max_num_seqs:
            sequence = self._ready.pop(0)
            self._join(sequence)
            chunks.append((sequence, 1))
            budget -= 1
        return budget

    def _load(self, sequence: Sequence, n_hits: int, step: Step) -> None:
        """Take blocks for all of a prompt whose KV is to come."""
        self._begin(sequence, n_hits, step)
        self.holdings.take(sequence, self.holdings.blocks(sequence.prompt_tokens) - n_hits)
        sequence.status = Status.LOADING
        self._loading.append(sequence)

    def _start(self, sequence: Sequence, n_hits: int, step: Step) -> None:
        self._begin(sequence, n_hits, step)
        self._join(sequence)

    def _join(self, sequence: Sequence) -> None:
        sequence.status = Status.PREFILL
        self._running[sequence.id] = sequence
        self._prefill[sequence.id] = sequence

    def _begin(self, sequence: Sequence, n_hits: int, step: Step) -> None:
        """Hold what is cached; the first time, say so."""
        self.holdings.begin(sequence, n_hits)
        if sequence.scheduled_at is None:
            sequence.scheduled_at = step.started_at
            sequence.cached_tokens = sequence.computed
            self.counters.prompt_tokens += sequence.prompt_tokens
            if self.settings.prefix_caching:
                self.counters.prefix_queries += sequence.prompt_tokens
                self.counters.prefix_hits += sequence.computed
        step.scheduled.append(sequence)

    def _extend(self, sequence: Sequence, chunk: int, n_blocks: int) -> None:
        """Hold the blocks of the next chunk, and let others share those it fills."""
        self.holdings.take(sequence, n_blocks)
        self.holdings.seal(sequence, sequence.computed + chunk)

    def _duration_s(self, chunks: list[tuple[Sequence, int]], step: Step) -> float:
        n_decodes = len(self._decodes)
        new_tokens = n_decodes + sum(chunk for _, chunk in chunks)
        attention = sum(
            chunk * sequence.computed + chunk * chunk // 2 + 1 for sequence, chunk in chunks
        )
        step.new_tokens = new_tokens
        return self.durations.step_s(
            n_decodes + len(chunks), new_tokens, attention, self._decodes.context
        )

    def _advance_decodes(self, n_steps: int, ended_at: float, step: Step) -> None:
        self._fed_ahead = 0
        if not self._decodes:
            return
        step.decoded = list(self._decodes.members.values())
        self.counters.generation_tokens += n_steps * len(step.decoded)
        for sequence in self._decodes.advance(n_steps):
            self._leave(sequence)
            self._finish(sequence, ended_at, step)

    def _advance_prefills(
        self, chunks: list[tuple[Sequence, int]], ended_at: float, step: Step
    ) -> None:
        for sequence, chunk in chunks:
            sequence.computed += chunk
            if sequence.computed < sequence.total_tokens:
                continue
            sequence.output_tokens += 1
            self.counters.generation_tokens += 1
            if sequence.first_token_at is None:
                sequence.first_token_at = ended_at
            step.prefilled.append(sequence)
            if sequence.output_tokens >= sequence.stop_after:
                self._leave(sequence, keeps=sequence.hands_over)
                self._finish(sequence, ended_at, step)
            else:
                del self._prefill[sequence.id]
                self._decodes.join(sequence)
        # Prefills seal blocks that the head of the line may share: ask it again.
        if chunks:
            self._is_blocked = False

    # Many steps at once.

    def _leap(self, now: float, until: float) -> Step | None:
        """Decode until somebody ends or a step reaches `until`; None if blocks may run short."""
        decodes = self._decodes
        ends = self.durations.quiet_ends(
            now, until, decodes.next_end, len(decodes), decodes.context
        )
        n_blocks = decodes.blocks(len(ends))
        if n_blocks > self.kv.free:
            return None
        self.kv.take(n_blocks)
        step = Step(started_at=now, ends=ends, new_tokens=len(decodes))
        self._advance_decodes(len(ends), ends[-1], step)
        self.counters.steps += len(ends)
        return step

    # Joining and leaving.

    def _leave(self, sequence: Sequence, *, keeps: bool = False) -> None:
        """Out of the running ones: settle what it computed and free its blocks, or keep them for another engine."""
        del self._running[sequence.id]
        n_owned = len(sequence.held)
        if sequence.status is Status.DECODE:
            self._decodes.leave(sequence)
            n_owned = max(n_owned, self.holdings.blocks(sequence.computed + self._fed_ahead))
        else:
            del self._prefill[sequence.id]
        self.holdings.own(sequence, n_owned)
        self.holdings.seal(sequence, sequence.computed)
        self._let_go(sequence, keeps=keeps)

    def _let_go(self, sequence: Sequence, *, keeps: bool = False) -> None:
        self.holdings.let_go(sequence, keeps=keeps)
        self._is_blocked = False

    def _finish(self, sequence: Sequence, ended_at: float, step: Step) -> None:
        sequence.finished_at = ended_at
        step.finished.append(sequence)
        self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        sequence.status = Status.FINISHED
        del self._all[sequence.id]

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        """Free all it holds; its tokens are recomputed when it is admitted again."""
        self._leave(sequence)
        sequence.status = Status.WAITING
        sequence.computed = 0
        sequence.is_remote = sequence.is_loaded = False
        sequence.preemptions += 1
        self.counters.preemptions += 1
        self._line.push_front(sequence)
        step.preempted.append(sequence)

    def _victim(self) -> Sequence:
        if self.settings.scheduling_policy == "priority":
            return max(self._running.values(), key=lambda s: (s.priority, s.arrived_at, s.ticket))
        return next(reversed(self._running.values()))

    def _make_room(self, sequence: Sequence, n_blocks: int, step: Step) -> bool:
        while self.kv.free < n_blocks:
            victim = self._victim()
            self._preempt(victim, step)
            if victim is sequence:
                return False
        return True

    def _chunk(self, wanted: int, budget: int) -> int:
        threshold = self.settings.long_prefill_token_threshold
        if 0 < threshold < wanted:
            wanted = threshold
        return min(wanted, budget)
