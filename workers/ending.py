"""How an attempt ends in Redis: the one terminal record, and then what it cost; or back to be tried elsewhere.

The record goes alone and first, for somebody waits for it. Until Redis has taken the rest as well the attempt stays in
hand: a beat must not say that it is gone before its reward does.
"""

from collections.abc import Callable
from typing import Literal

import structlog

from dispatcher.streams import sidecar
from scheduler.errors import EngineError
from scheduler.keys import Keys
from scheduler.settings import EngineAddress, WorkerSettings
from scheduler.wire.words import Outcome
from workers.attempt import Attempt, Stop
from workers.metrics import Meter
from workers.writer import Writer

log = structlog.get_logger()


class Ending:
    """The last moves of one endpoint's attempts. `gone` is called once Redis has answered."""

    def __init__(
        self,
        address: EngineAddress,
        *,
        writer: Writer,
        keys: Keys,
        settings: WorkerSettings,
        meter: Meter,
        clock: Callable[[], float],
        gone: Callable[[Attempt], None],
        kv_s: float,
    ) -> None:
        """`kv_s`: how long KV is relied on; where it is must be known for longer, whatever the clocks say."""
        self._address, self._writer, self._keys = address, writer, keys
        self._settings, self._meter, self._clock, self._gone = settings, meter, clock, gone
        self._kv_ttl_s = 2 * kv_s

    def failed(self, attempt: Attempt, error: EngineError) -> None:
        """The engine did not answer as it should: to be tried elsewhere, unless that is of no use."""
        if error.retryable and attempt.job.attempt < attempt.job.max_attempts:
            self.give_back(attempt, str(error))
        else:
            self.finish(attempt, "failed", str(error), status=error.status, is_dead=True)

    def stopped(self, attempt: Attempt, stop: Stop) -> None:
        """It was ended from outside the engine."""
        match stop.kind:
            case "fenced":
                self._gone(attempt)
            case "returned":
                self.give_back(attempt, stop.reason)
            case "cancelled":
                self.finish(attempt, "cancelled", stop.reason or "cancelled")
            case "expired":
                self.finish(attempt, "expired", stop.reason)
            case "silent" | "overrun":
                raise AssertionError(
                    "an engine's silence is its failure, and what it says too much an answer"
                )

    def finish(
        self,
        attempt: Attempt,
        outcome: Outcome,
        reason: str = "",
        *,
        status: int = 0,
        is_dead: bool = False,
    ) -> None:
        """Send the terminal record on its way, and the reward behind it.

        `is_dead` also keeps the request's fields for a requeue.
        """
        attempt.stage = "ending"
        now = self._clock()
        result = attempt.result(outcome, reason, status, now)
        was_ours = False

        def ended(reply: int) -> None:
            nonlocal was_ours
            was_ours = reply != 0

        def settled(_: int) -> None:
            self._gone(attempt)
            if not was_ours:
                self._meter.fenced.inc()
                return
            self._meter.ended(result)
            log.info(
                "outcome",
                request_id=result.id,
                endpoint=result.endpoint,
                attempt=result.attempt,
                outcome=outcome,
                reason=reason,
                ttft_s=result.ttft_s,
                tpot_s=result.tpot_s,
                prompt_tokens=result.prompt_tokens,
                output_tokens=result.output_tokens,
            )

        self._writer.end(
            attempt,
            lambda pieces: sidecar.finish(
                self._keys,
                attempt.held,
                result,
                pieces=pieces,
                ttl_s=self._settings.keep_s,
                is_dead=is_dead,
            ),
            ended,
        )
        # The record is on its way, and Redis busy with it.
        reward = attempt.reward(
            outcome, reason, now, retryable=False, hardware=self._address.hardware
        )
        call = sidecar.settle(self._keys, attempt.held, reward, is_dead=is_dead)
        self._writer.follow(attempt, call, settled)

    def give_back(self, attempt: Attempt, reason: str) -> None:
        """To be tried elsewhere; what it has written stays, the next attempt goes on from there."""
        self._hand_back(attempt, "returned", reason)

    def prefilled(self, attempt: Attempt) -> None:
        """Its prompt is computed: it waits for an endpoint that decodes, and its KV for that one's engine."""
        self._hand_back(attempt, "prefilled")

    def _hand_back(
        self, attempt: Attempt, outcome: Literal["returned", "prefilled"], reason: str = ""
    ) -> None:
        attempt.stage = "ending"
        reward = attempt.reward(
            outcome, reason, self._clock(), retryable=True, hardware=self._address.hardware
        )

        def replied(reply: int) -> None:
            self._gone(attempt)
            if reply == 0:
                self._meter.fenced.inc()
                return
            counter = self._meter.returned if outcome == "returned" else self._meter.prefilled
            counter.labels(reward.endpoint).inc()
            log.info(
                outcome,
                request_id=reward.id,
                endpoint=reward.endpoint,
                attempt=reward.attempt,
                reason=reason,
            )

        self._writer.end(
            attempt,
            lambda _: sidecar.hand_back(
                self._keys,
                attempt.held,
                reward,
                kv_params=attempt.kv_params if outcome == "prefilled" else b"",
                kv_ttl_s=self._kv_ttl_s,
            ),
            replied,
        )
