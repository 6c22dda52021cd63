"""Orders of one central line, from which endpoints take their next as late as they can."""

from collections.abc import Callable

import numpy as np

from scheduler.sim.baselines import orders, parted
from scheduler.sim.baselines.binding import Lined, Order, Router
from scheduler.sim.baselines.desk import Desk
from scheduler.sim.baselines.senses import Asked
from scheduler.sim.policies.base import PREFIX_BLOCKS, LabPolicy, Stage
from scheduler.sim.world import Dispatch


class _Lined(LabPolicy, frozen=True):
    """A central line with late binding; the order is all that differs."""

    window_s: float = 0.1
    "An endpoint takes its next when its prefill is predicted to be done within this."

    @property
    def parts(self) -> bool:
        return True

    def order(self, desk: Desk) -> Order:
        raise NotImplementedError

    def second(self, desk: Desk, rng: np.random.Generator) -> Router:
        """Who decodes what is prefilled: whoever holds the fewest KV tokens."""
        return parted.LeastKv(desk.account, rng)

    def dispatch(self, stage: Stage) -> Dispatch:
        desk = Desk(lease_s=stage.delays.lease_s, prefix_blocks=PREFIX_BLOCKS, learns=True)
        first = Lined(desk, self.order(desk), self.window_s)
        if not stage.is_parted:
            return first
        desk.first_legs = parted.PREFILL
        return parted.Parted(desk, first, self.second(desk, stage.rng))


def _service_s(desk: Desk) -> Callable[[Asked], float]:
    """Seconds of the whole prompt on the mean endpoint, as learned so far."""

    def service_s(asked: Asked) -> float:
        cached = [0] * len(desk.beats)
        return float(desk.costs.service_s(asked, cached).mean())

    return service_s


class _Skipping(_Lined, frozen=True):
    """Orders that ask whether a request can still make it, and how sure they want to be."""

    pace: float = 2.0
    "Times its predicted seconds that a request is given: room for noise and stalls. Tuned: 1, 1.5, 2 and 3 were tried."

    def finish_s(self, desk: Desk) -> Callable[[Asked], float]:
        """Seconds until a request's first token if it goes next: what may be before it, and itself."""
        service_s = _service_s(desk)

        def finish_s(asked: Asked) -> float:
            return self.pace * (0.5 * self.window_s + service_s(asked))

        return finish_s


class FirstCome(_Lined, frozen=True, tag="fcfs"):
    """First come, first served."""

    def order(self, desk: Desk) -> Order:  # noqa: ARG002
        return orders.Ranked(lambda asked: asked.enqueued_at)


class ShortestFirst(_Lined, frozen=True, tag="sjf"):
    """Shortest prefill first."""

    def order(self, desk: Desk) -> Order:
        return orders.Ranked(_service_s(desk))


class EarliestDue(_Lined, frozen=True, tag="edf"):
    """Earliest due first, hopeless or not."""

    def order(self, desk: Desk) -> Order:  # noqa: ARG002
        return orders.Ranked(lambda asked: asked.due_at)


class EarliestDueDrop(_Skipping, frozen=True, tag="edf-drop"):
    """Earliest due first; who cannot make it when its turn comes is refused."""

    def order(self, desk: Desk) -> Order:
        return orders.Dropping(self.finish_s(desk))


class LeastSlack(_Skipping, frozen=True, tag="least-slack"):
    """Least slack first: due moment less own work; who cannot make it waits behind all who can."""

    def order(self, desk: Desk) -> Order:
        service_s = _service_s(desk)
        return orders.Relegating(lambda asked: asked.due_at - service_s(asked), self.finish_s(desk))


class MooreHodgson(_Skipping, frozen=True, tag="moore-hodgson"):
    """Moore and Hodgson's set of the most on time, formed anew at each pick (Moore, Management Science 1968)."""

    def order(self, desk: Desk) -> Order:
        return orders.MooreHodgson(
            _service_s(desk), self.finish_s(desk), lambda: float(max(1, len(desk.beats)))
        )


class Niyama(_Skipping, frozen=True, tag="niyama"):
    """Niyama (arXiv 2503.22562): due moment + alpha x own work, one-shot relegation; on a central line."""

    alpha: float = 0.5

    def order(self, desk: Desk) -> Order:
        service_s = _service_s(desk)
        return orders.Relegating(
            lambda asked: asked.due_at + self.alpha * service_s(asked), self.finish_s(desk)
        )


class Kairos(_Skipping, frozen=True, tag="kairos"):
    """Kairos, our reconstruction: urgency-first prefill, slack-guided decode packing."""

    @property
    def is_open(self) -> bool:
        return False

    def order(self, desk: Desk) -> Order:
        return orders.UrgencyFirst(self.finish_s(desk))

    def second(self, desk: Desk, rng: np.random.Generator) -> Router:  # noqa: ARG002
        return parted.Slack(desk)
