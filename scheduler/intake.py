"""From a client's request to a ticket in line, or to the reason why not."""

from collections.abc import Callable

from scheduler import slo
from scheduler.book import Book
from scheduler.errors import WireError
from scheduler.events import Arrived, Recovered
from scheduler.outbox import Ending
from scheduler.policies import Policy
from scheduler.predict import Predictor
from scheduler.slo import Objective
from scheduler.state import Ticket
from scheduler.wire.client import Request

RETRY_MIN_S, RETRY_MAX_S = 1.0, 60.0
"When a rejected request may come back: the backlog's seconds, between these."


def ticket(
    event: Arrived | Recovered,
    *,
    objectives: dict[str, Objective],
    policy: Policy,
    predictor: Predictor,
    token_s: float,
    max_attempts: int,
) -> Ticket | Ending:
    """The request with its promise made out and its place in line, or how it ends where its objective is unknown."""
    request = event.request
    try:
        promise = slo.promise(request, event.enqueued_at, objectives)
    except WireError as error:
        return Ending(outcome="invalid", reason=str(error))
    prompt_tokens = slo.prompt_tokens(request, predictor.lengths.prompt(request.model))
    usual_tokens, pace_s = predictor.lengths.answer(request.model)
    output_tokens = request.expected_tokens or usual_tokens
    due_at = slo.due_at(promise, event.enqueued_at, output_tokens * pace_s)
    return Ticket(
        request=request,
        entry=event.entry,
        enqueued_at=event.enqueued_at,
        promise=promise,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        due_at=due_at,
        rank=policy.rank(
            enqueued_at=event.enqueued_at,
            due_at=due_at,
            priority=promise.priority,
            work_s=prompt_tokens * token_s,
        ),
        max_attempts=request.max_attempts or max_attempts,
    )


def obstacle(
    newcomer: Ticket, book: Book, *, waiting_max: int, backlog_s: Callable[[], float], now: float
) -> Ending | None:
    """Why it may not stand in line; None: it is welcome. Rejected is only who would be but for the others."""
    deadline_at = newcomer.promise.deadline_at
    if deadline_at is not None and deadline_at <= now:
        return Ending(
            outcome="expired", reason=f"its deadline passed {now - deadline_at:.3f} s ago"
        )
    ending = too_long(newcomer, book)
    if ending is None and len(book.lines) >= waiting_max:
        reason = f"{len(book.lines)} requests wait, the limit is {waiting_max}"
        return Ending(outcome="rejected", reason=reason, retry_after_s=retry_after_s(backlog_s()))
    return ending


def shed(whose: str, count: int, *, backlog_s: float) -> Ending:
    """How one ends that makes room in a full line."""
    return Ending(
        outcome="rejected",
        reason=f"shed {whose}: {count} requests wait",
        retry_after_s=retry_after_s(backlog_s),
    )


def too_long(asked: Ticket, book: Book) -> Ending | None:
    """How it ends where no endpoint can ever hold a prompt of the length its client counted."""
    longest = book.fleet.longest(asked.request.model)
    if _is_guessed(asked.request) or longest is None or asked.prompt_tokens <= longest:
        return None
    return Ending(
        outcome="invalid",
        reason=f"field 'prompt_tokens' is {asked.prompt_tokens}, wanted at most {longest:.0f}, "
        "the longest context served",
    )


def believed(asked: Ticket, book: Book) -> int:
    """Its prompt's length; of a guess no more than anybody serves, or it would wait for ever to be judged."""
    longest = book.fleet.longest(asked.request.model)
    if not _is_guessed(asked.request) or longest is None or asked.prompt_tokens <= longest:
        return asked.prompt_tokens
    return int(longest)


def _is_guessed(request: Request) -> bool:
    return request.prompt_tokens is None or request.prompt_estimated


def out_of_time(late: Ticket, *, backlog_s: float, now: float) -> Ending:
    """How a waiting request ends whose deadline or longest queue has passed."""
    deadline_at = late.promise.deadline_at
    if deadline_at is not None and deadline_at <= now:
        return Ending(
            outcome="expired",
            reason=f"its deadline passed while it waited, {now - late.enqueued_at:.3f} s after it came",
        )
    return Ending(
        outcome="rejected",
        reason=f"no endpoint within {now - late.enqueued_at:.3f} s, the longest it may wait",
        retry_after_s=retry_after_s(backlog_s),
    )


def unknown_model(model: str, served: list[str]) -> Ending:
    """How a request ends whose model nobody serves or ever served."""
    known = ", ".join(sorted(served)) or "none"
    return Ending(
        outcome="invalid", reason=f"field 'model' is {model!r}, wanted one served here: {known}"
    )


def retry_after_s(backlog_s: float) -> float:
    """When to come back: once what waits now has been served."""
    return min(RETRY_MAX_S, max(RETRY_MIN_S, backlog_s))
