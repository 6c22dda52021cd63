"""What a request will really cost, learned one completion at a time.

    seconds to first token = speed[endpoint] * (weights . features)

The features are the physics of `cost` in seconds, so untaught weights are one. A Bayesian linear regression shared
by the fleet learns the weights and forgets towards that prior (`regression`); one log-speed an endpoint learns how
that server differs, and learns fast after a drift (`speed`). Both are linear in the tokens, which is why a plan can
add up what stands in line. How far off all this is, is learned too (`spread`).
"""

import math
from collections.abc import Sequence
from operator import mul
from typing import NamedTuple

import numpy as np
from msgspec import structs

from scheduler import cost, forecast, regression
from scheduler.forecast import SECONDS_MAX, SECONDS_MIN, Forecast
from scheduler.guard import Guard
from scheduler.learned import REMEMBERED_MAX, Learned, Life
from scheduler.ledger import Rates
from scheduler.lengths import Lengths
from scheduler.pace import Pace
from scheduler.regression import DecayedRegression
from scheduler.speed import Speed
from scheduler.spread import Spread
from scheduler.state import Bools, Floats
from scheduler.transfer import Transfer
from scheduler.wire.worker import Beat, Reward

PACE_ERRORS = "pace"
"The name of that window."

RATE_FLOOR = 0.02
"Nor does any learned rate fall below this part of the declared one: a plan must not believe in free work."


class _Weighed(NamedTuple):
    """The declared rates times what the whole fleet has taught; float64[n_slots] all."""

    weights: tuple[float, ...]
    "That they were made with: these change with every eighth lesson."
    overhead_s: Floats
    token_s: Floats
    decode: Floats
    "What a second of decoding adds to each first token,"
    decode_token: Floats
    "and to each token that is computed meanwhile."
    floor_s: Floats
    "Seconds per token that nobody is believed to fall below."


class _Sped(NamedTuple):
    """What follows from the endpoints' own speeds; float64[n_slots] both."""

    speed: Floats
    pair_s: Floats


class _Rated(NamedTuple):
    """The rates as last asked for, and what they were made with."""

    sped: _Sped
    "Another one after every lesson."
    decode_kv: bytes
    rates: Rates


class Predictor:
    """Rates of every endpoint, medians of every model, and how far either can be trusted."""

    def __init__(self) -> None:
        """Untaught: the declared hardware's own rates."""
        self._regression = DecayedRegression(np.ones(len(cost.FEATURES)))
        self._speeds: list[Speed | None] = []
        self._prior: Floats = np.zeros((4, 0))
        self._log_speed: Floats = np.zeros(0)
        self._weighed: _Weighed | None = None
        self._sped: _Sped | None = None
        "Of what has not changed since the last step; None: it has."
        self._rated: _Rated | None = None
        self._spread = Spread()
        self.lengths = Lengths()
        self.pace = Pace()
        self.guard = Guard()
        self.transfer = Transfer()
        self._remembered: dict[str, Life] = {}
        "Endpoints that left, or were known to an earlier leader."

    def open(self, slot: int, beat: Beat) -> None:
        """An endpoint takes this slot. What was learned of its name holds while its hardware is the same."""
        if slot == len(self._speeds):
            self._speeds.append(None)
            self._prior = np.column_stack([self._prior, np.zeros(4)])
            self._log_speed = np.append(self._log_speed, 0.0)
        rates = cost.hardware(beat.hardware)
        self._speeds[slot] = Speed(name=beat.endpoint, declared=beat.hardware, hardware=rates)
        self._log_speed[slot] = 0.0
        self.pace.open(slot, rates)
        self.guard.open(slot)
        self.transfer.open(slot, beat)
        self._prior[:, slot] = rates.overhead_s, rates.token_s, rates.attention_s, rates.kv_s
        self._weighed = None
        self._recall(slot)

    def close(self, slot: int) -> None:
        """Its endpoint is gone; its speed is remembered by name, for its next life."""
        speed = self._at(slot)
        # Its next life is trusted until it is seen otherwise.
        self._remembered[speed.name] = structs.replace(self._life(slot), is_distrusted=False)
        if len(self._remembered) > REMEMBERED_MAX:
            del self._remembered[next(iter(self._remembered))]
        self._speeds[slot] = None

    @property
    def declared_s(self) -> Floats:
        """Seconds per token of a prompt on every slot, as its hardware is declared; float64[n_slots]."""
        declared_s: Floats = self._prior[1]
        return declared_s

    def rates(self, decode_kv: Floats) -> Rates:
        """What prefilling costs on every slot now, given what decodes there; the same object until either changes."""
        weighed, sped = self._believed()
        rated, read = self._rated, decode_kv.tobytes()
        if rated is None or rated.sped is not sped or rated.decode_kv != read:
            rated = self._rated = _Rated(sped, read, self._rates(weighed, sped, decode_kv))
        return rated.rates

    def refresh(self, decode_kv: Floats) -> None:
        """Make out what the last lessons say, as the next who asks would."""
        self.rates(decode_kv)
        self._spread.refresh()

    def features(
        self, slot: int, *, tokens: float, pairs: float, decode_kv: float, start_s: float
    ) -> tuple[str, ...]:
        """What is seen at this decision, as it rides in the job and comes back in the reward."""
        x = cost.features(
            hardware=self._at(slot).hardware, tokens=tokens, pairs=pairs, decode_kv=decode_kv
        )
        return forecast.written(x, start_s, self._spread.ratios(start_s))

    def odds(self, start_s: float, log_ratio: float) -> float:
        """The part of completions behind so many predicted seconds whose log(actual / predicted) is no more."""
        return self._spread.odds(start_s, log_ratio)

    def learn(self, reward: Reward, slot: int, *, is_seen: bool = False) -> None:
        """Learn from one attempt; whatever is no measurement teaches nothing.

        `is_seen`: its first token was heard of when it came, and has taught then.
        """
        self.lengths.learn(reward)
        if reward.leg == "decode":
            self.transfer.learn(reward, slot)
        elif not is_seen:
            seen = forecast.read(reward)
            if seen is not None:
                self.see(seen, slot)

    def see(self, seen: Forecast, slot: int) -> None:
        """Learn from one first token."""
        x, seconds = seen.x, seen.seconds
        speed = self._at(slot)
        own_speed = math.exp(speed.log)
        predicted_s = self._bounded(own_speed, x)
        log_error = math.log(seconds / predicted_s)
        # What plans are made with, which is what was learned unless something went wrong between.
        planned = log_error - (float(self._log_speed[slot]) - speed.log)
        self.guard.judge(slot, learned=planned, prior=math.log(seconds / max(1e-3, sum(x))))
        self._judge(speed, seen, predicted_s)
        weight = regression.weight(log_error, 0.5 * (predicted_s + seconds) / own_speed)
        self._regression.learn_row(x, seconds / own_speed, weight)
        speed.learn(log_error)
        self._log_speed[slot], self._sped = speed.log, None

    def is_young(self, slot: int) -> bool:
        """Whether so little is known of its endpoint that no lesson should wait for an answer's end."""
        return self._at(slot).is_young

    def is_new(self) -> Bools:
        """Slots whose endpoints were never measured, in this life or an earlier one; bool[n_slots].

        One that only decodes is measured by what it fetches.
        """
        return np.array(
            [
                speed is not None and not speed.count and not self.transfer.speeds.counts[slot]
                for slot, speed in enumerate(self._speeds)
            ]
        )

    def speed(self, slot: int) -> float:
        """How many times the declared time it takes."""
        return math.exp(self._at(slot).log)

    def error(self, slot: int) -> float:
        """Moving mean of |log(actual / predicted)|."""
        return self._at(slot).error

    def coverage(self, slot: int) -> float:
        """Moving share of completions within the 90 % bound."""
        return self._at(slot).coverage

    def export(self, models: tuple[str, ...]) -> Learned:
        """All that was learned, as plain numbers."""
        living = {s.name: self._life(at) for at, s in enumerate(self._speeds) if s is not None}
        return Learned(
            prefill=self._regression.export(),
            transfer=self.transfer.export(),
            pace=self.pace.export(),
            endpoints={**self._remembered, **living},
            windows={
                PACE_ERRORS: self.pace.errors,
                **self._spread.export(),
                **self.lengths.export(),
            },
            models=models,
        )

    def restore(self, learned: Learned) -> bool:
        """Take over what was learned elsewhere, before any was learned here; False and untouched if unusable."""
        if not learned.is_sound():
            return False
        self._regression.restore(learned.prefill)
        self.transfer.restore(learned.transfer)
        self.pace.restore(learned.pace, learned.windows.get(PACE_ERRORS, ()))
        self._remembered = dict(learned.endpoints)
        self._spread.restore(learned.windows)
        self.lengths.restore(learned.windows)
        for slot, speed in enumerate(self._speeds):
            if speed is not None and speed.count == 0:
                self._recall(slot)
        return True

    def _recall(self, slot: int) -> None:
        """Go on from the endpoint's earlier life, while its hardware is the same."""
        speed = self._at(slot)
        life = self._remembered.pop(speed.name, None)
        if life is None or life.declared != speed.declared:
            return
        speed.recall(life.log, life.count, life.error, life.coverage)
        self._log_speed[slot], self._sped = speed.log, None
        self.transfer.speeds.recall(slot, *life.link)
        self.pace.speeds.recall(slot, *life.pace)
        self.guard.set(slot, is_distrusted=life.is_distrusted)

    def _life(self, slot: int) -> Life:
        """What is to be remembered of who is here."""
        speed = self._at(slot)
        return Life(
            declared=speed.declared,
            log=speed.log,
            count=float(speed.count),
            error=speed.error,
            coverage=speed.coverage,
            link=self.transfer.speeds.numbers(slot),
            pace=self.pace.speeds.numbers(slot),
            is_distrusted=bool(self.guard.distrusted[slot]),
        )

    def _judge(self, speed: Speed, seen: Forecast, predicted_s: float) -> None:
        """Against what was predicted *then*, where the reward still says it: honest with late feedback."""
        if seen.predicted_s is None:
            seen = structs.replace(seen, predicted_s=predicted_s)
        then_s = seen.predicted_s or predicted_s
        log_ratio, covered = math.log(seen.seconds / then_s), seen.covered
        speed.judge(log_ratio, is_covered=covered[-1])
        self._spread.add(seen.start_s, log_ratio, covered)

    def _believed(self) -> tuple[_Weighed, _Sped]:
        weighed = self._weighed
        if weighed is None or weighed.weights is not self._regression.weights:
            weighed, self._sped = self._weigh(), None
        return weighed, self._sped or self._speed_up(weighed.weights[2])

    def _weigh(self) -> _Weighed:
        overhead_s, token_s, _, _ = self._prior
        weights, even = self._regression.weights, np.ones(len(token_s))
        self._weighed = _Weighed(
            weights=weights,
            overhead_s=weights[0] * overhead_s,
            token_s=weights[1] * token_s,
            decode=weights[3] * even,
            decode_token=weights[4] / cost.CHUNK_TOKENS * even,
            floor_s=RATE_FLOOR * token_s,
        )
        return self._weighed

    def _speed_up(self, pair_weight: float) -> _Sped:
        speed = np.exp(self._log_speed)
        self._sped = _Sped(speed, speed * pair_weight * self._prior[2])
        return self._sped

    def _rates(self, weighed: _Weighed, sped: _Sped, decode_kv: Floats) -> Rates:
        speed, pair_s = sped
        decode_s = self._prior[3] * decode_kv
        rates = Rates(
            overhead_s=speed * (weighed.overhead_s + weighed.decode * decode_s),
            token_s=np.maximum(
                speed * (weighed.token_s + weighed.decode_token * decode_s), weighed.floor_s
            ),
            pair_s=pair_s,
        )
        return self._guarded(rates, decode_s) if self.guard.is_on else rates

    def _guarded(self, rates: Rates, decode_s: Floats) -> Rates:
        """The same, but as declared where what was learned is not to be believed."""
        overhead_s, token_s, pair_s, _ = self._prior
        distrusted = self.guard.distrusted
        return Rates(
            overhead_s=np.where(distrusted, overhead_s + decode_s, rates.overhead_s),
            token_s=np.where(distrusted, token_s + decode_s / cost.CHUNK_TOKENS, rates.token_s),
            pair_s=np.where(distrusted, pair_s, rates.pair_s),
        )

    def _bounded(self, speed: float, x: Sequence[float]) -> float:
        # Python's floats: for five of them numpy's calls would cost three times as much.
        seconds: float = speed * sum(map(mul, x, self._regression.weights))
        return min(SECONDS_MAX, max(SECONDS_MIN, seconds))

    def _at(self, slot: int) -> Speed:
        speed = self._speeds[slot]
        assert speed is not None, f"slot {slot} has no endpoint"
        return speed
