"""One endpoint in virtual time: an engine, and beside it the worker that admits jobs to it and reports.

The worker is the live one's in all that decides anything: `batching.admit` with the same members, candidates, limits
and step-time law, learned from the same gaps. What differs is only that its hands are not HTTP and Redis.
"""

import math
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush

from msgspec import structs

from scheduler.prefix import Account
from scheduler.sim import declared, truth
from scheduler.sim.admission import Admission
from scheduler.sim.attempt import Attempt
from scheduler.sim.course import Course
from scheduler.sim.fate import Fate
from scheduler.sim.fleet import Delays, Machine
from scheduler.sim.handover import Handover, Party
from scheduler.sim.leases import Leases
from scheduler.sim.mirror import Mirror, Text
from scheduler.sim.news import News
from scheduler.sim.sequence import Sequence
from scheduler.sim.step import Step
from scheduler.sim.tempo import Tempo
from scheduler.wire.dispatcher import Job
from scheduler.wire.worker import Beat, Reward

TEND_S = 0.1
"How often a worker looks at those it holds though nothing has happened."

Report = Callable[[float, Beat | Reward], None]
"Called with a moment and a fact that leaves the worker then."


class Endpoint(Party):
    """Driven by `World`: whatever it is told, it says in `next_at` when it wants a `turn`.

    1. `receive` a job: it is held
    2. admitted: at once where `is_open`, else when the batch's promises allow it
    3. after the front end's time the engine has it; steps end, tokens come
    4. first tokens and ends are reported, at the age at which a dispatcher would hear of them

    Of a `prefill` leg, which says nothing to its client, the KV stays here under a lease until it has been fetched; a
    `decode` leg claims it, waits for it, and is handed back where it is gone. See `handover`.
    """

    def __init__(
        self,
        machine: Machine,
        delays: Delays,
        *,
        is_open: bool,
        report: Report,
        fence: Callable[[str, int], bool],
        models: tuple[str, ...],
        kv_lease_s: float = math.inf,
        text_of: Callable[[str], Text] | None = None,
    ) -> None:
        """Start empty.

        Args:
            machine: what it is.
            delays: of its worker.
            is_open: no admission: every job goes to the engine as it comes.
            report: takes what the worker says.
            fence: whether an id's attempt is still the one that counts.
            models: what it serves.
            kv_lease_s: how long it keeps KV that nobody claims.
            text_of: every prompt by its id, where the engine publishes what it caches; absent: it does not.
        """
        self.machine = machine
        self.name = machine.name
        self.engine = machine.engine()
        self.epoch = 1
        self.is_dead = False
        self.is_frozen = False
        self.is_draining = False
        "Takes nothing new, and says so."
        self._delays = delays
        self._report = report
        self._fence = fence
        self._text_of = text_of
        self._mirror = self._listening()
        self._declared = declared.beat(machine, models, publishes=text_of is not None)
        self.handover: Handover | None = None
        "Set by the world, where KV is handed over."
        self._frontend_s = machine.actual.frontend_s
        self._admission = Admission(machine, is_open=is_open)
        self._leases = Leases(kv_lease_s)
        self._clear()

    def _clear(self) -> None:
        self._held: dict[str, Attempt] = {}
        self._running: dict[str, Attempt] = {}
        "Admitted; by request id, as all tables here."
        self._entering: deque[tuple[float, Attempt]] = deque()
        self._deadlines: list[tuple[float, str, int]] = []
        self._course = Course(self.engine, self._fetch)
        self._news = News(self._delays.news_s)
        self._tend_at = math.inf
        self._unread: list[tuple[str, int]] = []
        "Words to abort, not read while it was frozen."
        self._leases.clear()
        self._admission.restart()
        self._tempo = Tempo()
        self._has_changed = False
        "Since the last look at the held: who may enter can only differ by it, or by time."

    # What the world tells.

    def receive(self, job: Job, sequence: Sequence, fate: Fate, now: float) -> None:
        """A job has come down the stream."""
        if self.is_dead or job.epoch != self.epoch:
            return
        older = self._held.get(job.id) or self._running.get(job.id)
        if older is not None:  # it was taken from us and has come back
            self._drop(older, now)
        if job.leg == "prefill":
            self.release(job.id, self._leases.attempt(job.id), now)
        expected_tokens = max(job.expected_tokens or self._admission.answers.usual_tokens, 1.0)
        attempt = Attempt(job, sequence, fate, pulled_at=now, expected_tokens=expected_tokens)
        self._held[job.id] = attempt
        self._has_changed = True
        if job.deadline_at is not None:
            heappush(self._deadlines, (job.deadline_at, job.id, job.attempt))
        self.turn(now)

    def visit(self, sequence: Sequence, now: float) -> None:
        """Somebody else's request reaches the engine, past the worker."""
        if not (self.is_dead or self.is_frozen):
            self._catch_up(now)
            sequence.arrived_at = now
            self.engine.add(sequence)
            self.turn(now)

    def abort(self, request_id: str, attempt: int, now: float) -> None:
        """Its client gave up: end this attempt, if it is here."""
        if self.is_frozen:
            self._unread.append((request_id, attempt))
            return
        self.turn(now)  # it may have ended meanwhile
        found = self._held.get(request_id) or self._running.get(request_id)
        if found is not None and found.job.attempt == attempt:
            self._drop(found, now)
            found.fate.end = "cancelled"
            self._report(now, self._reward(found, "cancelled", now))
            self.turn(now)

    def slow(self, factor: float, now: float) -> None:
        self.turn(now)
        self.engine.durations.slowdown = factor

    def freeze(self, now: float) -> None:
        """Engine and worker stand still; what comes meanwhile waits in the stream."""
        self.turn(now)
        self.is_frozen = True
        self.engine.pause(freeze=True)

    def thaw(self, now: float) -> None:
        """Go on; whatever was given to others meanwhile is dropped."""
        self.is_frozen = False
        self.engine.resume()
        for attempt in [*self._held.values(), *self._running.values()]:
            if not self._fence(attempt.job.id, attempt.job.attempt):
                self._drop(attempt, now)
        unread, self._unread = self._unread, []
        for request_id, number in unread:
            self.abort(request_id, number, now)
        self.turn(now)

    def die(self) -> None:
        """Lose everything."""
        for attempt in self._running.values():
            attempt.fate.wasted_tokens += self._computed(attempt)
        self.is_dead = True
        self._clear()

    def join(self) -> None:
        """Begin a new life, with an empty engine."""
        self.engine = self.machine.engine()
        self._mirror = self._listening()
        self.epoch += 1
        self.is_dead = self.is_frozen = False
        self._clear()

    # Time.

    def next_at(self) -> float:
        """When `turn` would do something; `inf`: not before it is told something."""
        if self.is_dead or self.is_frozen:
            return math.inf
        at = min(self._news.at, self._tend_at, self._leases.next_at(), self._course.next_at())
        if self._entering:
            at = min(at, self._entering[0][0])
        if self._deadlines:
            at = min(at, self._deadlines[0][0])
        return at

    def turn(self, now: float) -> None:
        """Bring it up to this moment."""
        if self.is_dead or self.is_frozen:
            return
        self._catch_up(now)
        if self._deadlines and self._deadlines[0][0] <= now:
            self._end_the_late(now)
        for request_id in self._leases.ended(now):
            self._forget(request_id)
        if self._held and (self._has_changed or now >= self._tend_at):
            self._admit(now)
        while self._entering and self._entering[0][0] <= now:
            self._enter(self._entering.popleft()[1], now)
        self._course.begin(now)
        if self._news.at <= now:
            self._report(now, self.beat(now))

    def _catch_up(self, now: float) -> None:
        """Run and settle what is over by now."""
        for step in self._course.over(now):
            self._settle(step)

    def _fetch(self, at: float) -> None:
        """Fetch the KV of whoever got room for it in the step that started at this moment."""
        if self.handover is None:
            return
        for sequence in self.engine.take_loading():
            attempt = self._running[sequence.id]
            tokens = sequence.prompt_tokens - sequence.cached_tokens
            size = float(tokens * self.machine.nominal.kv_bytes_per_token)
            self.handover.begin(self.name, attempt.job, size, at)

    # Admitting.

    def _admit(self, now: float) -> None:
        self._has_changed = False
        held = list(self._held.values())
        chosen = self._admission.chosen(self._running.values(), held, self.engine.produced, now)
        for index in chosen:
            self._start(held[index], now)
        self._tend_at = now + TEND_S if self._held else math.inf

    def _start(self, attempt: Attempt, now: float) -> None:
        del self._held[attempt.job.id]
        self._running[attempt.job.id] = attempt
        attempt.admitted_at = now
        self._entering.append((now + self._frontend_s, attempt))
        self._news.start(attempt, now)

    def _enter(self, attempt: Attempt, now: float) -> None:
        if self._running.get(attempt.job.id) is not attempt:
            return
        if attempt.job.leg == "decode" and not (self.handover and self.handover.claim(attempt.job)):
            self.lose_kv(attempt.job.id, attempt.job.attempt, now)
            return
        attempt.sequence.arrived_at = now
        self.engine.add(attempt.sequence)

    # What other endpoints ask.

    def claim(self, request_id: str, attempt: int) -> bool:
        """Whether it still has this KV; if so, it keeps it until told otherwise."""
        return not self.is_dead and self._leases.claim(request_id, attempt)

    def release(self, request_id: str, attempt: int, now: float) -> None:
        """It has been fetched, or is not wanted any more."""
        if self._leases.end(request_id, attempt):
            self._forget(request_id)
            self.turn(now)

    def loaded(self, request_id: str, attempt: int, now: float) -> None:
        """The KV that a decode leg waited for has come."""
        found = self._running.get(request_id)
        if found is not None and found.job.attempt == attempt:
            if not self.is_frozen:
                self._catch_up(now)
            self.engine.loaded(request_id)
            self.turn(now)

    def lose_kv(self, request_id: str, attempt: int, now: float) -> None:
        """The KV that a decode leg wanted is gone: hand it back, its prompt must be computed again."""
        found = self._running.get(request_id)
        if found is not None and found.job.attempt == attempt and found.first_at is None:
            self._drop(found, now)
            self._report(now, self._reward(found, "returned", now))

    def _forget(self, request_id: str) -> None:
        self.engine.forget(request_id)
        self._has_changed = True

    def first_token_s(self, prompt_tokens: int, keys: list[int], now: float) -> float:
        """The truth, for the oracle: seconds to a prompt's first token were it admitted now."""
        self.turn(now)
        steps_s = truth.prefill_s(
            self.engine,
            self.machine,
            prompt_tokens=prompt_tokens,
            keys=keys,
            entering=[attempt.sequence for _, attempt in self._entering],
            n_decodes=len(self._running),
        )
        return self._frontend_s + self._course.left_s(now) + steps_s

    # What steps bring.

    def _settle(self, step: Step) -> None:
        now = step.ended_at
        self._tempo.note(step)
        self._admission.learn(step, kv_tokens=self.engine.decode_context)
        # Whoever was dropped while this step was under way is in it still, and is nobody's any more.
        for sequence in step.preempted:
            if sequence.id in self._running:
                self._running[sequence.id].fate.wasted_tokens += sequence.total_tokens
        for sequence in step.prefilled:
            attempt = self._running.get(sequence.id)
            if attempt is not None and attempt.first_at is None:
                self._first_token(attempt, now)
        for sequence in step.finished:
            attempt = self._running.get(sequence.id)
            if attempt is not None:
                self._finish(attempt, now)
            else:
                self._tempo.forget(sequence.id)

    def _first_token(self, attempt: Attempt, now: float) -> None:
        attempt.first_at = now
        self._has_changed = True
        if attempt.job.leg == "prefill":
            return  # its token is for nobody
        if attempt.fate.first_token_at is None:
            attempt.fate.first_token_at = now
        self._news.first_token(attempt, now)

    def _finish(self, attempt: Attempt, now: float) -> None:
        del self._running[attempt.job.id]
        self._has_changed = True
        fate, sequence = attempt.fate, attempt.sequence
        if attempt.job.leg == "prefill":
            self._keep(attempt, now)
            return
        fate.end = "completed"
        fate.finished_at = now
        fate.endpoint = self.name
        fate.output_tokens = sequence.output_tokens
        if attempt.job.leg == "whole":
            fate.cached_tokens = sequence.cached_tokens
        fate.tell(self._tempo.taken(sequence.id))
        self._admission.ended(sequence.output_tokens)
        self._report(now, self._reward(attempt, "completed", now))

    def _keep(self, attempt: Attempt, now: float) -> None:
        """A prompt is computed: keep its KV for whoever will decode."""
        job = attempt.job
        attempt.fate.cached_tokens = attempt.sequence.cached_tokens
        self._tempo.forget(attempt.sequence.id)
        self._leases.keep(job.id, job.attempt, now)
        self._report(now, self._reward(attempt, "prefilled", now))

    def _end_the_late(self, now: float) -> None:
        """Stop what is past its deadline."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id, number = heappop(self._deadlines)
            attempt = self._held.get(request_id) or self._running.get(request_id)
            if attempt is not None and attempt.job.attempt == number:
                self._drop(attempt, now)
                attempt.fate.end = "expired"
                self._report(now, self._reward(attempt, "expired", now))

    def _drop(self, attempt: Attempt, now: float) -> None:
        """Out of the worker's hands and out of the engine."""
        self._has_changed = True
        if self._held.get(attempt.job.id) is attempt:
            del self._held[attempt.job.id]
            return
        if not self.is_frozen:
            self._catch_up(now)
        if self._running.get(attempt.job.id) is not attempt:
            return
        del self._running[attempt.job.id]
        attempt.fate.wasted_tokens += self._computed(attempt)
        self.engine.abort(attempt.sequence.id)
        if self.handover is not None and attempt.job.leg == "decode":
            self.handover.give_up(attempt.job, self.name, now)
        self._tempo.forget(attempt.sequence.id)

    def _computed(self, attempt: Attempt) -> int:
        sequence = attempt.sequence
        return max(0, sequence.computed - sequence.cached_tokens) + self.engine.produced(sequence)

    # What it says.

    def beat(self, now: float) -> Beat:
        """A heartbeat, with the news so far."""
        started, first_tokens = self._news.take()
        engine = self.engine
        kv = self._mirror.account() if self._mirror else Account(epoch=0, seq=0)
        return structs.replace(
            self._declared,
            epoch=self.epoch,
            state="draining" if self.is_draining else "ready",
            running=engine.n_running,
            queued=engine.n_waiting,
            held=len(self._held),
            kv_usage=engine.kv_usage,
            scraped_at=now,
            started=started,
            first_tokens=first_tokens,
            kv_epoch=kv.epoch,
            kv_seq=kv.seq,
            kv_stored=kv.stored,
            kv_removed=kv.removed,
            kv_rest=kv.rest,
            kv_was_empty=kv.was_empty,
        )

    def _listening(self) -> Mirror | None:
        return None if self._text_of is None else Mirror(self.engine, self._text_of)

    def _reward(self, attempt: Attempt, outcome: str, now: float) -> Reward:
        return attempt.reward(self.machine, self.epoch, outcome, now)
