"""What was asked of a recorded pool, as arrivals with their promises.

Lengths are the engine's own, from the rewards; what a dispatcher is told of them stays what the client said.
"""

from collections.abc import Iterable

import numpy as np
from msgspec import structs

from scheduler import slo
from scheduler.errors import WireError
from scheduler.sim.alike import Alike
from scheduler.sim.promise import Promised
from scheduler.sim.story import Asked, Story
from scheduler.sim.workload import Arrival
from scheduler.slo import Objective, Promise
from scheduler.wire.client import Request

OUTPUT_TOKENS = 128
"The answer of a request in a recording where nobody finished."


def work(found: Story, objectives: dict[str, Objective], start_at: float) -> Promised:
    """All that was asked and could be, in order of time, the first at 0.

    Args:
        found: the recording.
        objectives: of its settings.
        start_at: when the first came, unix seconds.
    """
    lengths, alike = _Lengths(found), Alike(found)
    sessions: dict[str, int] = {}
    rows: list[Arrival] = []
    asked: list[Request] = []
    weights: list[float] = []
    cancels_s: list[float | None] = []
    for one in sorted(found.requests.values(), key=lambda one: one.enqueued_at):
        try:
            promise = slo.promise(one.request, one.enqueued_at, objectives)
        except WireError:
            continue  # it ended as invalid, and would again
        prompt_tokens, output_tokens = lengths.of(one.request)
        blocks = alike.blocks(one.request, prompt_tokens)
        row = Arrival(
            at_s=one.enqueued_at - start_at,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            session=sessions.setdefault(one.request.session, len(sessions))
            if one.request.session
            else None,
            blocks=blocks,
            block_tokens=alike.block_tokens if blocks else 0,
            ttft_s=promise.ttft_s,
            tpot_s=promise.tpot_s,
            deadline_s=_left_s(promise.deadline_at, one.enqueued_at),
            priority=promise.priority,
            tenant=one.request.tenant,
            expected_tokens=one.request.expected_tokens,
        )
        rows.append(row)
        asked.append(_said(one, promise, prompt_tokens))
        weights.append(promise.weight)
        cancels_s.append(_left_s(found.cancelled.get(one.request.id), one.enqueued_at))
    names = ["" if weight == 1.0 else f"weight-{weight:g}" for weight in weights]
    known = {
        name: Objective(weight=weight) for name, weight in zip(names, weights, strict=True) if name
    }
    return Promised(
        tuple(rows),
        tuple(weights),
        tuple(names),
        known,
        asked=tuple(asked),
        cancels_s=tuple(cancels_s),
    )


class _Lengths:
    """True lengths; where one never finished, the median of its model, of an answer broken off as much again."""

    def __init__(self, found: Story) -> None:
        self._rewards, self._broken_off = found.rewards, found.broken_off
        ended = [(request.model, reward) for request, reward in found.ended]
        models = {request.request.model for request in found.requests.values()}
        self._prompt = {
            model: _middle([end.prompt_tokens for whose, end in ended if whose == model]) or 1
            for model in sorted(models)
        }
        self._output = {
            model: _middle([end.output_tokens for whose, end in ended if whose == model])
            or OUTPUT_TOKENS
            for model in sorted(models)
        }

    def of(self, request: Request) -> tuple[int, int]:
        """Of its prompt and its answer, in tokens."""
        reward = self._rewards.get(request.id)
        cut = self._broken_off.get(request.id)
        found = reward or cut
        prompt_tokens = found.prompt_tokens if found else 0
        output_tokens = reward.output_tokens if reward else 0
        said = cut.output_tokens if cut else 0
        usual = self._prompt[request.model]
        return (
            prompt_tokens or max(1, slo.prompt_tokens(request, usual)),
            output_tokens or said + self._output[request.model],
        )


def _said(one: Asked, promise: Promise, prompt_tokens: int) -> Request:
    """The request as a dispatcher of the lab reads it; where it said nothing of its prompt, as if guessed right."""
    request = one.request
    guessed = {"prompt_tokens": prompt_tokens, "prompt_estimated": True}
    return structs.replace(
        request,
        deadline_at=None,
        max_queue_s=_left_s(promise.refuse_at, one.enqueued_at),
        **(guessed if request.prompt_tokens is None else {}),
    )


def _middle(lengths: Iterable[int]) -> int:
    known = [length for length in lengths if length > 0]
    return int(np.median(known)) if known else 0


def _left_s(at: float | None, enqueued_at: float) -> float | None:
    return None if at is None else at - enqueued_at
