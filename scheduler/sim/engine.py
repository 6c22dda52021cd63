"""vLLM's v1 engine, one step at a time, without the model.

A step takes one token from every decoding sequence, then fills what is left of the token
budget with chunks of prompts: first of those that run, then of those that wait. Its time
comes from a `Profile`.

Half a request, as vLLM's KV connectors do it: a sequence that `hands_over` leaves its blocks held when it has ended;
one that `is_remote` takes all blocks of its prompt when it is admitted, waits until its KV has come, and then
computes the last token. Preempted, it is computed here from the start.
"""

import numpy as np

from scheduler.sim import refusal
from scheduler.sim.arguments import EngineSettings
from scheduler.sim.durations import Durations
from scheduler.sim.holdings import Holdings
from scheduler.sim.kv import BlockPool
from scheduler.sim.noise import Noise
from scheduler.sim.profile import Profile
from scheduler.sim.roster import Chunk, Roster
from scheduler.sim.sequence import Sequence, Status
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
        self._roster = Roster(settings, self.holdings, self.counters)
        self._all: dict[str, Sequence] = {}
        self._is_frozen = False

    # What can be asked.

    @property
    def n_running(self) -> int:
        return len(self._roster.running)

    @property
    def n_waiting(self) -> int:
        return self._roster.n_waiting

    @property
    def kv_usage(self) -> float:
        return self.kv.used / self.kv.capacity

    @property
    def kv_tokens(self) -> int:
        return self.kv.capacity * self.settings.block_size

    @property
    def decode_context(self) -> int:
        """KV tokens that the decodes read in their next step."""
        return self._roster.decodes.context

    def __contains__(self, sequence_id: str) -> bool:
        return sequence_id in self._all

    def produced(self, sequence: Sequence) -> int:
        """Output tokens of a sequence so far; its own count stands still while it decodes."""
        return sequence.output_tokens + self._roster.decodes.gained(sequence)

    def prefill_left(self) -> tuple[int, int]:
        """Prompt tokens to compute before a newcomer's, and their (query, key) pairs of attention."""
        tokens = pairs = 0
        for sequence in self._roster.before_newcomers():
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
        roster, decodes = self._roster, self._roster.decodes
        if self._is_frozen or roster.can_admit or roster.prefill or not decodes:
            return None
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
        self._roster.wait(sequence)

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
        self._roster.drop(sequence)
        sequence.finish_reason = "abort"
        self._retire(sequence)
        return sequence

    def abort_all(self) -> list[Sequence]:
        """End every request, oldest first."""
        aborted = [self.abort(sequence_id) for sequence_id in list(self._all)]
        return [sequence for sequence in aborted if sequence is not None]

    def pause(self, *, freeze: bool) -> None:
        """Admit nobody; with `freeze` the running ones stand still too."""
        self._roster.is_admitting = False
        self._is_frozen = freeze

    def resume(self) -> None:
        self._roster.is_admitting = True
        self._roster.stir()
        self._is_frozen = False

    def take_loading(self) -> list[Sequence]:
        """Who has been given blocks for KV that another engine has, since it was last asked."""
        return self._roster.take_loading()

    def loaded(self, sequence_id: str) -> bool:
        """A prompt's KV has come over the link; False: nobody waits for it any more."""
        sequence = self._all.get(sequence_id)
        if sequence is None or sequence.status is not Status.LOADING:
            return False
        self._roster.come(sequence)
        return True

    def forget(self, sequence_id: str) -> None:
        """Free what an ended sequence left, if that has not happened yet."""
        if self.holdings.forget(sequence_id):
            self._roster.stir()

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
        roster = self._roster
        can_admit = roster.can_admit
        if not (can_admit or roster.running):
            return None
        if until is not None and roster.decodes and not (can_admit or roster.prefill):
            step = self._leap(now, until)
            if step is not None:
                return step
        return self._turn(now)

    # One step.

    def _turn(self, now: float) -> Step | None:
        step = Step(started_at=now)
        chunks = self._roster.feed(step)
        if not (self._roster.decodes or chunks):
            return self._turn_again(step)
        ended_at = now + self._duration_s(chunks, step)
        step.ends.append(ended_at)
        self._advance_decodes(1, ended_at, step)
        self._advance_prefills(chunks, ended_at, step)
        self.counters.steps += 1
        return step

    def _turn_again(self, step: Step) -> Step | None:
        """Everybody who ran was preempted: start over with all blocks free, in the same moment."""
        self._roster.unfeed()
        if not step.preempted:
            return None
        is_loading = any(s.status is Status.LOADING for s in self._all.values())
        if (self.holdings.kept or is_loading) and not self._roster.has_ready:
            # What is short is held for others, and comes free by their doing.
            self._roster.block()
            return None
        again = self._turn(step.started_at)
        if again is not None:
            again.preempted[:0] = step.preempted
        return again

    def _duration_s(self, chunks: list[Chunk], step: Step) -> float:
        decodes = self._roster.decodes
        n_decodes = len(decodes)
        new_tokens = n_decodes + sum(chunk for _, chunk in chunks)
        attention = sum(
            chunk * sequence.computed + chunk * chunk // 2 + 1 for sequence, chunk in chunks
        )
        step.new_tokens = new_tokens
        return self.durations.step_s(
            n_decodes + len(chunks), new_tokens, attention, decodes.context
        )

    def _advance_decodes(self, n_steps: int, ended_at: float, step: Step) -> None:
        step.decoded = list(self._roster.decodes.members.values())
        self.counters.generation_tokens += n_steps * len(step.decoded)
        for sequence in self._roster.advance(n_steps):
            self._roster.leave(sequence)
            self._finish(sequence, ended_at, step)

    def _advance_prefills(self, chunks: list[Chunk], ended_at: float, step: Step) -> None:
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
                self._roster.leave(sequence, keeps=sequence.hands_over)
                self._finish(sequence, ended_at, step)
            else:
                self._roster.decode(sequence)
        # Prefills seal blocks that the head of the line may share: ask it again.
        if chunks:
            self._roster.stir()

    # Many steps at once.

    def _leap(self, now: float, until: float) -> Step | None:
        """Decode until somebody ends or a step reaches `until`; None if blocks may run short."""
        decodes = self._roster.decodes
        ends = self.durations.quiet_ends(
            now, until, decodes.next_end, len(decodes), decodes.context
        )
        if not self._roster.feed_decodes(len(ends)):
            return None
        step = Step(started_at=now, ends=ends, new_tokens=len(decodes))
        self._advance_decodes(len(ends), ends[-1], step)
        self.counters.steps += len(ends)
        return step

    def _finish(self, sequence: Sequence, ended_at: float, step: Step) -> None:
        sequence.finished_at = ended_at
        step.finished.append(sequence)
        self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        sequence.status = Status.FINISHED
        del self._all[sequence.id]
