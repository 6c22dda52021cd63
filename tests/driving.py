"""A core driven by hypothesis: what it was told and what it said, who holds what and who has ended, kept by hand."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from scheduler import recording
from scheduler.core import CoreSettings, Scheduler
from scheduler.events import Assign, Command, Event


class Driven(RuleBasedStateMachine):
    """The driver's side; what it does with a command, and what happens besides, a test's own class says."""

    def __init__(self, settings: CoreSettings) -> None:
        super().__init__()
        self.begin(settings)
        self.now = 1000.0
        self.count = 0
        self.held: dict[str, Assign] = {}
        self.terminal: dict[str, str] = {}

    def begin(self, settings: CoreSettings) -> None:
        """A core that was told nothing."""
        self.core = Scheduler(settings, np.random.default_rng(0))
        self.log: list[tuple[float, Event | None]] = []
        self.sent: list[list[Command]] = []

    def tell(self, event: Event) -> None:
        self.log.append((self.now, event))
        self.core.receive(event, self.now)

    def end(self, request_id: str, outcome: str) -> None:
        assert request_id not in self.terminal, f"I2: {request_id} ended twice"
        self.terminal[request_id] = outcome

    def carry_out(self, command: Command) -> None:
        raise NotImplementedError

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.3, 1.0, 4.0]))
    def pass_time(self, seconds):
        self.now += seconds

    @rule()
    def decide(self):
        self.log.append((self.now, None))
        commands = self.core.decide(self.now)
        self.sent.append(commands)
        for command in commands:
            self.carry_out(command)
        wakeup_at = self.core.wakeup_at()
        assert wakeup_at is None or wakeup_at >= self.now

    @rule()
    def settle(self):
        """Not in the log: done now or with the next call, nobody sees a difference."""
        self.core.settle()

    @invariant()
    def keeps_capacity(self):
        """I3: no endpoint over its seats or its KV, and no account below zero."""
        ledger, fleet = self.core._memory.book.ledger, self.core._memory.book.fleet
        for endpoint in fleet.endpoints.values():
            slot = endpoint.slot
            assert ledger.seats[slot] == len(endpoint.held) <= fleet.seats_max[slot]
            assert 0 <= ledger.kv[slot] <= fleet.kv_max[slot]
            assert ledger.decode_kv[slot] >= 0
            assert ledger.tokens[slot] == sum(x.tokens for x in ledger.prefilling[slot].values())

    def replays(self) -> None:
        """I5: a fresh core says the same to the same log."""
        again = Scheduler(self.core.settings, np.random.default_rng(0))
        for now, event in self.log:
            if event is None:
                # As recordings have them, each reason made out only now.
                sent = recording.plain(self.sent.pop(0))
                found = recording.plain(again.decide(now))
                assert found == sent, "I5: the log's replay says otherwise"
            else:
                again.receive(event, now)
