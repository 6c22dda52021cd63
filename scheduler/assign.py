"""A choice of the plan as what leaves the core: the job for the worker, the decision for people and replay."""

import math
from collections.abc import Sequence
from functools import partial

from scheduler.events import Assign
from scheduler.picking import nearest
from scheduler.plan import Choice
from scheduler.state import Endpoint, Kept
from scheduler.wire.dispatcher import Decision, Job


def command(
    choice: Choice,
    endpoint: Endpoint,
    *,
    now: float,
    policy: str,
    waiting: int,
    names: Sequence[str],
    features: tuple[str, ...],
    kept: Kept | None = None,
) -> Assign:
    """The command that hands this request over.

    Args:
        choice: as planned; its ticket already counts this attempt.
        endpoint: where to.
        now: unix seconds.
        policy: the policy's name.
        waiting: how many waited at that moment.
        names: the endpoints', by slot; never written to.
        features: what the predictor saw.
        kept: for a decode leg, the KV of its prompt.
    """
    job = _job(choice, endpoint, kept, now, features)
    explain = partial(_decision, choice, job, policy, waiting, names)
    return Assign(endpoint=endpoint.name, job=job, explain=explain)


def _decision(
    choice: Choice, job: Job, policy: str, waiting: int, names: Sequence[str]
) -> Decision:
    endpoint, due_at = names[choice.slot], choice.ticket.due_at
    seconds = choice.everywhere_s.tolist()
    slots = [weighed[0] for weighed in choice.weighed] or nearest(choice.everywhere_s)
    slack_s = None if due_at == math.inf else due_at - job.decided_at - choice.total_s
    return Decision(
        id=job.id,
        kind="assigned",
        at=job.decided_at,
        policy=policy,
        attempt=job.attempt,
        endpoint=endpoint,
        slack_s=slack_s,
        start_s=choice.start_s,
        prefill_s=choice.total_s - choice.start_s,
        cached_tokens=choice.cached_tokens,
        best_cached_tokens=choice.best_cached_tokens,
        waiting=waiting,
        propensity=choice.propensity,
        candidates=tuple(
            [f"{names[slot]}={seconds[slot]:.4g}" for slot in slots if seconds[slot] < math.inf]
        ),
        weighed=tuple(
            [
                f"{names[slot]}={chance:.4g},{start_s:.4g},{cached},{pressed:.3g},{others_s:.4g}"
                for slot, chance, start_s, cached, pressed, others_s in choice.weighed
            ]
        ),
        features=job.features,
        reason=_reason(choice, endpoint, slack_s),
    )


def _job(
    choice: Choice, endpoint: Endpoint, kept: Kept | None, now: float, features: tuple[str, ...]
) -> Job:
    ticket = choice.ticket
    request, promise = ticket.request, ticket.promise
    return Job(
        id=request.id,
        entry=ticket.entry,
        attempt=ticket.attempt,
        epoch=endpoint.epoch,
        leg=choice.leg,
        model=request.model,
        path=request.path,
        body=request.body,
        stream=request.stream,
        enqueued_at=ticket.enqueued_at,
        ttft_s=promise.ttft_s,
        tpot_s=promise.tpot_s,
        deadline_at=promise.deadline_at,
        priority=promise.priority,
        weight=promise.weight,
        tenant=request.tenant,
        session=request.session,
        reply_to=request.reply_to,
        max_attempts=ticket.attempts_allowed,
        prompt_tokens=ticket.prompt_tokens,
        cached_tokens=choice.cached_tokens,
        expected_tokens=request.expected_tokens,
        decided_at=now,
        prefill_s=choice.total_s - choice.onward_s,
        features=features,
        traceparent=request.traceparent,
        blocks=request.blocks if "kv_events" in endpoint.beat.features else (),
        kv_params=b"" if kept is None else kept.params,
        kv_until_at=None if kept is None else kept.until_at,
        kv_cached_tokens=None if kept is None else kept.cached_tokens,
    )


def _reason(choice: Choice, endpoint: str, slack_s: float | None) -> str:
    """One sentence a person understands.

    As in: `earliest first token: on a100-0 in 0.31 s, of which 0.12 s wait; 0.69 s to spare`.
    """
    wait = f", of which {choice.start_s:.2f} s wait" if choice.start_s >= 0.005 else ""
    spare = (
        ""
        if slack_s is None
        else f"; {abs(slack_s):.2f} s " + ("to spare" if slack_s >= 0 else "late")
    )
    part = "" if choice.leg == "whole" else f"{choice.leg} "
    return f"{choice.why}: {part}on {endpoint} in {choice.total_s:.2f} s{wait}{spare}"
