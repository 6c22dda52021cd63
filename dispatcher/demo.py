"""A workload played against a running pool, and what came of it.

Two clocks: the workload's own (trace seconds, in which promises and results are quoted) and the wall's, on which it
runs `time_scale` times as fast. Emulated engines run by the same factor, so the dynamics are those of the trace.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from msgspec import structs

from dispatcher import glance
from dispatcher.client import Client, Handle
from dispatcher.client.wishes import Wishes
from scheduler import codec
from scheduler.errors import StreamError
from scheduler.sim import body as bodies
from scheduler.sim.profile import Profile
from scheduler.sim.workload import Arrival, Workload, rate, scaled
from scheduler.wire.client import Request
from scheduler.wire.worker import Result, Reward

PATIENCE_S = 35.0
"Wall seconds (a chat answer of 1,000 tokens takes 30 s on a small GPU) after the last arrival; who has not ended then is cancelled, and is told so."

STRETCHES = 12
"Into so many the run is cut to show how the prediction error falls."

CANCEL_S = 10.0
"How long the cancelled may take to their terminal records."

QUANTILES = (0.5, 0.9, 0.99)

BATCH_SEQS = 64
"Sequences that decode together at the load for which capacity is estimated: far from empty and from full."

PROMPTS_BUILT = 2000
"The most rows of one demo: prompts are built before the clock starts."

COLD = 50
"After so many completions the predictors have seen every endpoint a few times."


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """A duration over many requests, seconds of the workload's clock."""

    mean: float
    p50: float
    p90: float
    p99: float


class ClassReport(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of work."""

    name: str
    promise: str
    sent: int
    ended: int
    on_time: float | None
    """Share of those that were promised something whose every promise was kept.

    Of all that were sent when the demo is over, so that who has not ended has missed; before, of those that ended.
    """

    ttft: Spread | None
    tpot: Spread | None


class EndpointReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one endpoint served."""

    name: str
    served: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    prediction_error: float | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A demo so far, or at its end."""

    at_s: float
    "Seconds of the workload's clock since its start."

    sent: int
    total: int
    outcomes: dict[str, int]
    unended: int
    "Sent and without a terminal record."

    classes: list[ClassReport]
    ttft: Spread | None
    tpot: Spread | None
    endpoints: list[EndpointReport]
    errors: list[float | None]
    "Median relative error of the predicted time to first token, one a stretch of time."

    error_stretch_s: float
    error_cold: float | None
    "The same over the first `COLD` first tokens."

    error_warm: float | None
    "And over all later ones."

    late_s: float
    "99th percentile of how late a request was sent, wall seconds: above a few ms this machine is too slow."

    time_scale: float


class Played(msgspec.Struct):
    """One request of the demo."""

    arrival: Arrival
    request: Request
    sent_late_s: float | None = None
    handle: Handle | None = None
    record: Result | None = None


class Demo:
    """A workload on its way through a pool.

    1. Prompts are built; nothing is measured yet.
    2. Each request is sent at its moment, and its record taken when it comes.
    3. After the last, who still runs has its patience; then it is cancelled.
    """

    def __init__(
        self,
        client: Client,
        arrivals: Workload,
        *,
        model: str,
        time_scale: float,
        vocabulary: int = 0,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Build every request.

        Args:
            client: of the pool.
            arrivals: what is sent, and when.
            model: what the engines serve.
            time_scale: how much faster than their own clock they come.
            vocabulary: of the engines' tokenizer, and prompts are token ids: the only ones whose length a real
                engine sees as it was meant. 0: prompts are text.
            patience_s: wall seconds that the last may take after the last arrival.
        """
        self._patience_s = patience_s
        self._client, self._scale, self._vocabulary = client, time_scale, vocabulary
        self._rows = [
            Played(arrival, self._request(arrival, model, row))
            for row, arrival in enumerate(arrivals)
        ]
        self._duration_s = arrivals[-1].at_s if arrivals else 0.0
        self._stretch_s = max(1.0, self._duration_s / STRETCHES)
        self._began_at = 0.0
        self._rewards: list[Reward] = []
        self._ended = asyncio.Event()
        self._unended = 0
        self._is_over = False

    async def run(self) -> Report:
        """Play it to its end."""
        self._began_at = self._client.connection.now()
        learning = asyncio.create_task(self._listen())
        try:
            await self._send()
            if not await self._all_ended(self._patience_s):
                await self._cancel_rest()
                await self._all_ended(CANCEL_S)
            self._is_over = True
        finally:
            learning.cancel()
            await asyncio.gather(learning, return_exceptions=True)
        return self.report()

    @property
    def records(self) -> list[Result | None]:
        """The terminal record of each arrival, in their order; None where there is none yet."""
        return [row.record for row in self._rows]

    def report(self) -> Report:
        """What came of it until now."""
        sent = [row for row in self._rows if row.handle is not None]
        records = [row.record for row in sent if row.record is not None]
        lates = [row.sent_late_s for row in sent if row.sent_late_s is not None]
        begun = sorted(
            (reward for reward in self._rewards if reward.first_token_at is not None),
            key=lambda reward: reward.first_token_at or 0.0,
        )
        return Report(
            at_s=(self._client.connection.now() - self._began_at) * self._scale,
            sent=len(sent),
            total=len(self._rows),
            outcomes=dict(Counter(record.outcome for record in records).most_common()),
            unended=len(sent) - len(records),
            classes=self._classes(sent),
            ttft=self._spread([record.ttft_s for record in records]),
            tpot=self._spread([record.tpot_s for record in records]),
            endpoints=self._endpoints(records),
            errors=self._errors(),
            error_cold=glance.error(begun[:COLD]),
            error_warm=glance.error(begun[COLD:]),
            error_stretch_s=self._stretch_s,
            late_s=float(np.quantile(lates, 0.99)) if lates else 0.0,
            time_scale=self._scale,
        )

    def _request(self, arrival: Arrival, model: str, row: int) -> Request:
        def wall(promise_s: float | None) -> float | None:
            return None if promise_s is None else promise_s / self._scale

        wishes = Wishes(
            path=bodies.PATHS["completions"],
            ttft_s=wall(arrival.ttft_s),
            tpot_s=wall(arrival.tpot_s),
            deadline_s=wall(arrival.deadline_s),
            priority=arrival.priority,
            tenant=arrival.tenant,
            session="" if arrival.session is None else str(arrival.session),
        )
        if self._vocabulary:
            body = bodies.body(arrival, model, "tokens", row=row, vocabulary=self._vocabulary)
        else:
            body = bodies.body(arrival, model, row=row)
        return self._client.request(body, **wishes)

    async def _send(self) -> None:
        began_at = time.monotonic()
        for row in self._rows:
            due_at = began_at + row.arrival.at_s / self._scale
            await asyncio.sleep(max(0.0, due_at - time.monotonic()))
            row.sent_late_s = time.monotonic() - due_at
            [row.handle] = await self._client.submit_many([row.request])
            self._unended += 1
            self._ended.clear()
            row.handle.when_done(self._taker(row))

    def _taker(self, row: Played) -> Callable[[Handle], None]:
        def take(handle: Handle) -> None:
            row.record = handle.known
            self._unended -= 1
            if not self._unended:
                self._ended.set()

        return take

    async def _all_ended(self, limit_s: float) -> bool:
        try:
            async with asyncio.timeout(limit_s):
                await self._ended.wait()
        except TimeoutError:
            return False
        return True

    async def _cancel_rest(self) -> None:
        for row in self._rows:
            if row.handle is not None and row.record is None:
                await row.handle.cancel("the demo is over")

    async def _listen(self) -> None:
        """Take the rewards as they come: what was predicted and what was."""
        keys = self._client.keys
        after = f"{int(self._began_at * 1e3)}-0"
        while True:
            try:
                came = await self._client.connection.read(
                    {keys.rewards: after}, count=256, block_s=1.0
                )
            except StreamError:
                await asyncio.sleep(1.0)
                continue
            for entry, fields in came.get(keys.rewards, []):
                after = entry
                self._rewards.append(codec.decode(Reward, fields))

    def _classes(self, sent: Sequence[Played]) -> list[ClassReport]:
        names = sorted({row.arrival.client or "trace" for row in self._rows})
        return [self._class(name, sent) for name in names]

    def _class(self, name: str, sent: Sequence[Played]) -> ClassReport:
        own = [row for row in sent if (row.arrival.client or "trace") == name]
        records = [row.record for row in own if row.record is not None]
        promised = [
            row
            for row in own
            if (row.arrival.ttft_s or row.arrival.deadline_s)
            and (self._is_over or row.record is not None)
        ]
        kept = sum(row.record is not None and row.record.on_time is True for row in promised)
        return ClassReport(
            name=name,
            promise=_promise(own[0].arrival) if own else "",
            sent=len(own),
            ended=len(records),
            on_time=kept / len(promised) if promised else None,
            ttft=self._spread([record.ttft_s for record in records]),
            tpot=self._spread([record.tpot_s for record in records]),
        )

    def _endpoints(self, records: Sequence[Result]) -> list[EndpointReport]:
        found = []
        for name in sorted({record.endpoint for record in records if record.endpoint}):
            own = [record for record in records if record.endpoint == name]
            found.append(
                EndpointReport(
                    name=name,
                    served=len(own),
                    prompt_tokens=sum(record.prompt_tokens for record in own),
                    cached_tokens=sum(record.cached_tokens for record in own),
                    output_tokens=sum(record.output_tokens for record in own),
                    prediction_error=glance.error([r for r in self._rewards if r.endpoint == name]),
                )
            )
        return found

    def _errors(self) -> list[float | None]:
        cut: dict[int, list[Reward]] = {}
        for reward in self._rewards:
            if reward.first_token_at is not None:
                passed_s = (reward.first_token_at - self._began_at) * self._scale
                cut.setdefault(int(passed_s // self._stretch_s), []).append(reward)
        return [glance.error(cut.get(n, [])) for n in range(max(cut, default=-1) + 1)]

    def _spread(self, durations: Sequence[float | None]) -> Spread | None:
        known = [duration * self._scale for duration in durations if duration is not None]
        if not known:
            return None
        p50, p90, p99 = (float(q) for q in np.quantile(known, QUANTILES))
        return Spread(mean=float(np.mean(known)), p50=p50, p90=p90, p99=p99)


def capacity(profiles: Sequence[Profile], arrivals: Workload) -> float:
    """About how many of these requests a second the fleet could serve, in the workload's time.

    A rough one, from the profiles' own step times at a usual batch: it sets the demo's load, no policy reads it.
    """
    if not arrivals:
        return 0.0
    prompt = int(np.mean([a.prompt_tokens for a in arrivals]))
    output = int(np.mean([a.output_tokens for a in arrivals]))
    total = 0.0
    for profile in profiles:
        context = prompt + output // 2
        seqs = max(1, min(BATCH_SEQS, profile.kv_tokens // (2 * context)))
        prefill_s = profile.step_s(1, prompt, prefill_attention=prompt * prompt // 2)
        decode_s = profile.step_s(seqs, seqs, decode_context=seqs * context) / seqs
        total += 1 / (prefill_s + output * decode_s)
    return total


def fitted(arrivals: Workload, *, rate_per_s: float, duration_s: float) -> Workload:
    """The first rows that fill so long a time at this rate, at most PROMPTS_BUILT.

    They are cut first and scaled then: the beginning of a day is not its mean. Sessions lose their tail.
    """
    rows = arrivals[: min(PROMPTS_BUILT, max(2, round(rate_per_s * duration_s)))]
    if rate(rows):
        first_s = rows[0].at_s
        rows = tuple(structs.replace(a, at_s=a.at_s - first_s) for a in rows)
        rows = scaled(rows, rate_per_s=rate_per_s)
    return tuple(structs.replace(a, parent=None) for a in rows)


def _promise(arrival: Arrival) -> str:
    parts = {"ttft": arrival.ttft_s, "tpot": arrival.tpot_s, "deadline": arrival.deadline_s}
    return ", ".join(f"{name} {value:g} s" for name, value in parts.items() if value is not None)
