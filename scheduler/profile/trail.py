"""What was handed over where of late: all that a profile remembers, so that its parts need remember nothing."""

from collections.abc import Sequence

import numpy as np

from scheduler.state import Floats

SESSIONS_MAX = 100_000
"Sessions whose endpoint is known; the one that was quiet longest is forgotten."

MODELS_MAX = 1000
"Models whose last uses are known; likewise."


class Trail:
    """Moments by slot, and sessions by the endpoint's name: a slot may get another endpoint."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._slots: dict[str, int] = {}
        self.given_at: Floats = np.zeros(0)
        self.cold_at: Floats = np.zeros(0)
        self._models: dict[str, Floats] = {}
        self._sessions: dict[str, str] = {}

    def meet(self, names: Sequence[str]) -> None:
        """These endpoints stand on the slots now; where one is new, nothing was handed over yet."""
        if names == self._names:
            return
        old = {name: slot for slot, name in enumerate(self._names) if name}
        self._names = list(names)
        self._slots = {name: slot for slot, name in enumerate(names) if name}
        came_from = [old.get(name, -1) for name in names]
        self.given_at = _moved(self.given_at, came_from)
        self.cold_at = _moved(self.cold_at, came_from)
        self._models = {model: _moved(at, came_from) for model, at in self._models.items()}

    def session_slot(self, session: str) -> int:
        """Where it was served last; -1: nowhere that is still there."""
        return self._slots.get(self._sessions.get(session, ""), -1)

    def model_at(self, model: str) -> Floats:
        """When each was last given a request for this model."""
        found = self._models.get(model)
        return np.full(len(self._names), -np.inf) if found is None else found

    def add(self, slot: int, *, model: str, session: str, is_cold: bool, now: float) -> None:
        """A request was handed over."""
        self.given_at[slot] = now
        if is_cold:
            self.cold_at[slot] = now
        at = self._models.pop(model, None)
        self._models[model] = np.full(len(self._names), -np.inf) if at is None else at
        self._models[model][slot] = now
        if len(self._models) > MODELS_MAX:
            del self._models[next(iter(self._models))]
        if session:
            self._sessions.pop(session, None)
            self._sessions[session] = self._names[slot]
            if len(self._sessions) > SESSIONS_MAX:
                del self._sessions[next(iter(self._sessions))]


def _moved(values: Floats, came_from: Sequence[int]) -> Floats:
    """By new slots; `-inf` for who is new (-1)."""
    return np.append(values, -np.inf)[list(came_from)]
