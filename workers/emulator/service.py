"""The emulated server without its HTTP: requests in, answers out, pauses, drains and deaths.

It owns the engine, the pacer and every answer under way; `server.py` puts routes on it.
"""

import asyncio
import contextlib
from typing import Literal

import numpy as np

from scheduler.sim import profile
from scheduler.sim.engine import Engine
from scheduler.sim.refusal import QueueFullError
from scheduler.sim.sequence import Sequence
from scheduler.sim.step import Step
from workers.emulator.answer import Answer
from workers.emulator.faults import Crash, Die, EngineFault, FaultLine, Freeze, Slow, Thaw
from workers.emulator.kv_connector import KvConnector
from workers.emulator.kv_publisher import KvPublisher
from workers.emulator.metrics import Metrics
from workers.emulator.pacer import Pacer
from workers.emulator.protocol import Ask
from workers.emulator.settings import EmulatorSettings

PauseMode = Literal["abort", "wait", "keep"]
Life = Literal["serving", "draining", "dead"]


class Service:
    """One emulated engine and the requests in it.

    Its life is `serving`; `draining` once a shutdown lets running requests finish, and then
    every new one is answered without tokens; `dead` when the engine has crashed.
    """

    def __init__(self, settings: EmulatorSettings) -> None:
        self.settings = settings
        rng = np.random.default_rng(settings.seed)
        self.profile = profile.load(settings.profile).jittered(rng, settings.jitter)
        self.engine = Engine(self.profile, settings.engine, rng)
        self.engine.durations.slowdown = settings.slowdown
        self.pacer = Pacer(
            self.engine,
            time_scale=settings.time_scale,
            deliver=self._deliver,
            flush=self._flush,
        )
        self.metrics = Metrics()
        self.faults = FaultLine()
        self.life: Life = "serving"
        self.is_paused = False
        self.sleep_level: int | None = None
        "None: awake."
        self.idle = asyncio.Event()
        "Set while no request is in the engine."
        self.idle.set()
        self.quiet = asyncio.Event()
        "Set while none is running; some may wait."
        self.quiet.set()
        self.crashed = asyncio.Event()
        self.died = asyncio.Event()
        self._pause_mode: PauseMode | None = None
        self._is_frozen_by_fault = False
        self._answers: dict[str, Answer] = {}
        self._touched: dict[str, Answer] = {}
        self._n_received = 0
        self.kv_connector = self._connector()
        self.kv_events = KvPublisher(settings.engine.block_size) if settings.kv_events else None
        if self.kv_events is not None:
            self.kv_events.open(settings.host)
            self.engine.holdings.on_seal = self._publish
            self.engine.kv.on_evict = self.kv_events.removed

    @property
    def max_model_len(self) -> int:
        asked = self.settings.max_model_len
        return self.engine.kv_tokens if asked is None else min(asked, self.engine.kv_tokens)

    def frontend_s(self) -> float:
        """Wall seconds a request spends before it reaches the engine."""
        if not self.settings.frontend:
            return 0.0
        own_s = self.settings.frontend_s
        return self.pacer.wall_s(self.profile.frontend_s if own_s is None else own_s)

    def open(self, ask: Ask, external_id: str, *, created: int) -> Answer:
        """An answer to a request that has just come in; not yet in the engine."""
        words, ends_itself = ask.words()
        return Answer(
            ask,
            external_id=external_id,
            model=self.settings.model,
            created=created,
            words=words,
            ends_itself=ends_itself,
            received_at=self.pacer.now(),
            has_details=self.settings.enable_prompt_tokens_details,
        )

    def submit(self, answer: Answer) -> None:
        """Hand a request to the engine.

        Raises:
            QueueFullError: the engine's waiting line is full.
        """
        self._enter(answer, self._sequence(answer))

    def _enter(self, answer: Answer, sequence: Sequence) -> None:
        self.pacer.add(sequence)
        answer.sequence = sequence
        self._answers[sequence.id] = answer
        if sequence.is_remote and self.kv_connector is not None:
            self.kv_connector.fetch(answer, sequence)
        self.idle.clear()
        self.quiet.clear()

    def abort(self, answer: Answer) -> None:
        """End it now: the slot and the blocks are free for the next step. As in vLLM, nobody counts it."""
        sequence = answer.sequence
        if sequence is not None and sequence.id in self._answers:
            self._leave(sequence)
            self._note_load()
            self.pacer.kick()
        answer.end("abort")

    def _leave(self, sequence: Sequence) -> None:
        self.engine.abort(sequence.id)
        self.engine.forget(sequence.id)  # in the step that is not over yet it may have ended
        del self._answers[sequence.id]
        if self.kv_connector is not None:
            self.kv_connector.drop(sequence)

    def _lost(self, answer: Answer) -> None:
        """The KV that it waited for is not to be had."""
        sequence = answer.sequence
        assert sequence is not None
        assert self.settings.kv_transfer is not None
        if sequence.id not in self._answers:
            return
        self._leave(sequence)
        if self.settings.kv_transfer.kv_load_failure_policy == "recompute":
            with contextlib.suppress(QueueFullError):
                self._enter(answer, self._sequence(answer, is_local=True))
                return
        self.metrics.finished["error"] += 1
        self._note_load()
        self.pacer.kick()
        answer.end("error")

    def abort_ids(self, external_ids: list[str]) -> None:
        """As `abort_requests` does: exact ids only, unknown ones are ignored."""
        wanted = set(external_ids)
        for answer in list(self._answers.values()):
            if answer.external_id in wanted:
                self.abort(answer)

    def abort_all(self) -> None:
        for answer in list(self._answers.values()):
            self.abort(answer)

    async def pause(self, mode: PauseMode) -> None:
        """Hold new work; `wait` returns when the running work is done."""
        self.is_paused = True
        self._pause_mode = mode
        self._apply_pauses()
        if mode == "abort":
            self.abort_all()
        elif mode == "wait":
            self._note_load()
            await self.quiet.wait()

    def resume(self) -> None:
        self.is_paused = False
        self._pause_mode = None
        self._apply_pauses()

    def sleep(self, level: int) -> None:
        self.sleep_level = level
        self.is_paused = True
        self._apply_pauses()

    def wake_up(self) -> None:
        self.sleep_level = None
        self.resume()

    async def drain(self, timeout_s: float) -> None:
        """Let the running requests finish, but no longer than that; then abort the rest."""
        self.life = "draining"
        try:
            await asyncio.wait_for(self.idle.wait(), timeout_s)
        except TimeoutError:
            self.abort_all()

    def crash(self) -> None:
        """The engine is gone: every request in it ends in an error."""
        if self.life == "dead":
            return
        self.life = "dead"
        self.pacer.stop()
        if self.kv_connector is not None:
            self.kv_connector.close()
        answers, self._answers = list(self._answers.values()), {}
        for answer in answers:
            self.metrics.finished["error"] += 1
            answer.end("error")
        self.idle.set()
        self.quiet.set()
        self.crashed.set()

    def strike(self, fault: EngineFault) -> None:
        """Let a fault of the engine happen now."""
        match fault:
            case Slow(factor=factor):
                self.engine.durations.slowdown = self.settings.slowdown * factor
            case Freeze() | Thaw():
                self._is_frozen_by_fault = isinstance(fault, Freeze)
                self._apply_pauses()
            case Crash():
                self.crash()
            case Die():
                self.died.set()
            case _:
                self.faults.clear()

    def close(self) -> None:
        self.pacer.stop()
        if self.kv_connector is not None:
            self.kv_connector.close()
        if self.kv_events is not None:
            self.kv_events.close()

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, and nothing done, while any block is held."""
        is_done = self.engine.reset_prefix_cache()
        if is_done and self.kv_events is not None:
            self.kv_events.cleared()
        return is_done

    def _publish(self, sequence: Sequence, start: int, stop: int) -> None:
        answer = self._answers.get(sequence.id)
        assert self.kv_events is not None
        # A salted text has hashes of its own, which no reader could use.
        if answer is not None and not answer.ask.salt:
            data = answer.ask.context.data(answer.words)
            self.kv_events.stored(sequence.keys, data, start, stop)

    def _connector(self) -> KvConnector | None:
        if self.settings.kv_transfer is None:
            return None
        connector = KvConnector(
            self.settings.kv_transfer,
            self.engine,
            kv_token_bytes=self.profile.kv_bytes_per_token,
            time_scale=self.settings.time_scale,
            kick=self.pacer.kick,
            lost=self._lost,
        )
        self.pacer.stepped = connector.grant
        return connector

    def _sequence(self, answer: Answer, *, is_local: bool = False) -> Sequence:
        """Its prompt and its answer for the engine; `is_local`: the prompt is computed here whatever was asked."""
        ask, words = answer.ask, answer.words
        is_parted = self.kv_connector is not None and not is_local
        settings = self.settings.engine
        self._n_received += 1
        return Sequence(
            # Clients may repeat an id, the engine needs its own.
            f"{answer.external_id}-{self._n_received}",
            prompt_tokens=ask.context.n_tokens,
            output_tokens=len(words) + (not answer.ends_itself),
            max_tokens=len(words),
            keys=ask.context.keys(words, settings.block_size, ask.salt)
            if settings.prefix_caching
            else (),
            priority=ask.priority,
            arrived_at=self.pacer.now(),
            hands_over=is_parted and ask.transfer.do_remote_decode,
            is_remote=is_parted and ask.transfer.do_remote_prefill,
        )

    def _deliver(self, step: Step) -> None:
        """Tokens of a step that is over: note them, write nothing yet."""
        answers, touched = self._answers, self._touched
        self.metrics.note_step(step)
        for sequence in step.decoded:
            answer = answers.get(sequence.id)
            if answer is not None:
                answer.feed(1)
                touched[sequence.id] = answer
        for sequence in step.prefilled:
            answer = answers.get(sequence.id)
            if answer is not None:
                answer.feed(1)
                touched[sequence.id] = answer
                if sequence.preemptions == 0:
                    self.metrics.note_first_token(sequence, answer.received_at)
        for sequence in step.finished:
            answer = answers.pop(sequence.id, None)
            if answer is not None:
                self._note_finished(sequence, answer)
        if step.finished:
            self._note_load()

    def _flush(self) -> None:
        if self.kv_events is not None:
            self.kv_events.flush()
        touched, self._touched = self._touched, {}
        for answer in touched.values():
            answer.flush()

    def _note_finished(self, sequence: Sequence, answer: Answer) -> None:
        self.metrics.note_finished(sequence, answer.received_at)
        if sequence.hands_over and self.kv_connector is not None:
            answer.kv_params = self.kv_connector.park(answer, sequence)
        if self.settings.enable_per_request_metrics:
            answer.metrics = request_metrics(sequence)

    def _note_load(self) -> None:
        if not self._answers:
            self.idle.set()
        if self.engine.n_running == 0:
            self.quiet.set()

    def _apply_pauses(self) -> None:
        is_frozen = (
            self.sleep_level is not None or self._is_frozen_by_fault or self._pause_mode == "keep"
        )
        if is_frozen or self.is_paused:
            self.engine.pause(freeze=is_frozen)
            return
        self.engine.resume()
        self.pacer.kick()


def request_metrics(sequence: Sequence) -> dict[str, float]:
    """What `--enable-per-request-metrics` shows; its TTFT does not include the queue."""
    assert sequence.scheduled_at is not None
    assert sequence.first_token_at is not None
    assert sequence.finished_at is not None
    generation_s = sequence.finished_at - sequence.first_token_at
    n_gaps = sequence.output_tokens - 1
    inference_s = sequence.finished_at - sequence.scheduled_at
    return {
        "time_to_first_token_ms": (sequence.first_token_at - sequence.scheduled_at) * 1e3,
        "generation_time_ms": generation_s * 1e3,
        "queue_time_ms": (sequence.scheduled_at - sequence.arrived_at) * 1e3,
        "mean_itl_ms": generation_s / n_gaps * 1e3 if n_gaps else 0.0,
        "tokens_per_second": sequence.output_tokens / inference_s,
    }
