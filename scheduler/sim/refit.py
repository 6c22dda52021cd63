"""How much slower than its profile an endpoint was, from the rewards of those it served.

Two factors an endpoint: `prefill` on what multiplies and attends over new tokens, `decode` on what every step costs
and reads. Rewards say of each request when it was admitted, had its first token and ended, so also who was prefilled
or decoded beside whom. The factors are moved until all of them together take as long in the model as they really took:
a median would leave out that steps stall now and then, and the mean come out a fifth too good.

Of a request in two legs the first says what prefilling took and the second what decoding did; between them lies the
way of its KV, which is neither.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
from msgspec import structs

from scheduler.sim import bounds
from scheduler.sim.fleet import Machine
from scheduler.sim.profile import Profile
from scheduler.state import Floats
from scheduler.wire.worker import Reward

SAMPLES_MAX = 300
"Rewards of an endpoint that are looked at, spread over the recording; each is held against all others."

SAMPLES_LEAST = 8
"With fewer there is nothing to fit."

ROUNDS = 6
"The factors depend on each other weakly: after four they move by less than a per cent."

FACTOR_MIN, FACTOR_MAX = 0.02, 50.0

WORST = 10.0
"Times the median: what took longer met a frozen engine, say, and no pace."

Took = tuple[float, float]
"Seconds of a span, really and in the model."


class Factors(msgspec.Struct, frozen=True):
    """Times a profile's own."""

    prefill: float = 1.0
    "NaN: too few prompts were computed there to say."
    decode: float = 1.0


class _Spans(msgspec.Struct, frozen=True):
    """When each request was where: float64[n] seconds, and what it brought."""

    admitted: Floats
    first: Floats
    end: Floats
    prompt: Floats
    cached: Floats
    output: Floats
    computed: Floats
    "1 where the prompt was computed here, 0 where its KV was fetched."


def fit(machine: Machine, rewards: Sequence[Reward]) -> Factors | None:
    """The factors of one endpoint; None where too few were served there.

    Args:
        machine: its profile and engine, as declared.
        rewards: of the legs that it completed.
    """
    spans = _spans(rewards)
    if len(spans.first) < SAMPLES_LEAST:
        return None
    chosen = np.arange(0, len(spans.first), max(1, len(spans.first) // SAMPLES_MAX))
    here = chosen[spans.computed[chosen] > 0]
    # Of a short prompt the weights and the front end are most; it says little of prefill.
    uncached = (spans.prompt - spans.cached)[here]
    long = here[uncached >= np.median(uncached)] if len(here) >= SAMPLES_LEAST else here[:0]
    found = Factors()
    for _ in range(ROUNDS):
        model = slowed(machine, found)
        prefill = _ratio([_prefill(model, spans, int(at)) for at in long])
        decode = _ratio([_decode(model, spans, int(at)) for at in chosen])
        found = Factors(
            min(FACTOR_MAX, max(FACTOR_MIN, found.prefill * prefill)),
            min(FACTOR_MAX, max(FACTOR_MIN, found.decode * decode)),
        )
    return found if len(long) else structs.replace(found, prefill=np.nan)


def filled(own: Factors | None, alike: Sequence[Factors]) -> Factors:
    """What was not measured taken from others of its kind; as declared where they do not say either."""
    usual = middle(alike)
    if own is None:
        return usual
    return own if np.isfinite(own.prefill) else structs.replace(own, prefill=usual.prefill)


def slowed(machine: Machine, factors: Factors) -> Machine:
    """The same endpoint, so many times slower than its profile."""
    return structs.replace(machine, actual=_slowed(machine.nominal, factors))


def middle(factors: Sequence[Factors]) -> Factors:
    """The median of each; as declared where there is none."""
    return Factors(
        _middle([one.prefill for one in factors]), _middle([one.decode for one in factors])
    )


def _slowed(nominal: Profile, factors: Factors) -> Profile:
    coef, prefill, decode = nominal.coef, factors.prefill, factors.decode
    changed = structs.replace(
        coef,
        g=coef.g * prefill,
        ap=coef.ap * prefill,
        t0=coef.t0 * decode,
        r=coef.r * decode,
        w=coef.w * decode,
        ad=coef.ad * decode,
    )
    return structs.replace(nominal, coef=changed)


def _prefill(model: Machine, spans: _Spans, at: int) -> Took:
    """Admission to first token, with those who decode in its steps and prefill before it."""
    begun, end = float(spans.admitted[at]), float(spans.first[at])
    batch, context = _company(spans, begun, end)
    budget = max(1, model.settings.max_num_batched_tokens - int(batch))
    done, seconds = int(spans.cached[at]), model.actual.frontend_s
    while done < spans.prompt[at]:
        chunk = min(budget, int(spans.prompt[at]) - done)
        pairs = chunk * done + chunk * chunk // 2 + 1
        seconds += model.actual.step_s(1 + int(batch), chunk + int(batch), pairs, int(context))
        done += chunk
    return end - begun, seconds + _others_s(model, spans, at, begun, end)


def _decode(model: Machine, spans: _Spans, at: int) -> Took:
    """First token to last, with those who decode beside it and prefill among its tokens; zeros where there is none."""
    begun, end = float(spans.first[at]), float(spans.end[at])
    if spans.output[at] < 2 or end <= begun:
        return 0.0, 0.0
    batch, context = _company(spans, begun, end)
    n, coef = max(1, round(batch)), model.actual.coef
    others_s = _others_s(model, spans, at, begun, end)
    # A step that prefills reads the KV of those who decode more slowly.
    mixed = min(1.0, others_s / (end - begun))
    reading_s = mixed * (coef.mx - 1.0) * model.actual.decode_context_s * context
    step_s = model.actual.step_s(n, n, decode_context=int(context)) + reading_s
    return end - begun, float((spans.output[at] - 1) * step_s + others_s)


def _company(spans: _Spans, begun: float, end: float) -> tuple[float, float]:
    """Mean number of those who decode in this span, and the KV tokens that their steps read."""
    shared_s = np.clip(np.minimum(spans.end, end) - np.maximum(spans.first, begun), 0.0, None)
    part = shared_s / max(1e-9, end - begun)
    return float(part.sum()), float((part * (spans.prompt + 0.5 * spans.output)).sum())


def _others_s(model: Machine, spans: _Spans, own: int, begun: float, end: float) -> float:
    """Seconds of the span that went into others' prefills: of each the part that falls into it."""
    shared_s = np.minimum(spans.first, end) - np.maximum(spans.admitted, begun)
    shared_s[own] = 0.0
    seconds = 0.0
    for at in np.flatnonzero(shared_s > 0):
        part = float(shared_s[at] / max(1e-9, spans.first[at] - spans.admitted[at]))
        seconds += part * bounds.work_s(model, int(spans.prompt[at]), int(spans.cached[at]))
    return seconds


def _spans(rewards: Sequence[Reward]) -> _Spans:
    rows = sorted(
        (
            one.admitted_at,
            one.first_token_at,
            one.finished_at,
            one.prompt_tokens,
            one.prompt_tokens - 1
            if one.leg == "decode"
            else min(one.cached_tokens or 0, one.prompt_tokens - 1),
            one.output_tokens,
            one.leg != "decode",
        )
        for one in rewards
        if one.admitted_at is not None
        and one.first_token_at is not None
        and one.finished_at is not None
        and one.prompt_tokens > 0
        and one.first_token_at > one.admitted_at
    )
    return _Spans(*np.array(rows, dtype=np.float64).reshape(-1, 7).T)


def _ratio(took: Sequence[Took]) -> float:
    """What all of them took together over what the model says; 1 where there is nothing to say it by."""
    really, modelled = np.array([one for one in took if one[1] > 0.0]).reshape(-1, 2).T
    if not len(really):
        return 1.0
    most = WORST * np.median(really / modelled) * modelled
    return float(np.minimum(really, most).sum() / modelled.sum())


def _middle(values: Sequence[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.median(known)) if known else 1.0
