"""An engine's cache, its worker's mirror and the dispatcher's index, with a channel between them that loses things."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from scheduler import accounts
from scheduler.prefix import BLOCK_TOKENS, Account, Index, blocks
from workers.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from workers.kv_mirror import Mirror

SIZE = BLOCK_TOKENS // 2
"Tokens of an engine's block: two make one of the wire's."

PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=8)
"Which of two continuations a text takes at every engine block."


def tokens(path):
    """The token ids of a text."""
    return [token for step in path for token in [step + 7] * SIZE]


def chain(path):
    """Its blocks on the wire."""
    return blocks(tokens(path))


class Machine(RuleBasedStateMachine):
    """Texts come into the engine and leave it, tails first; accounts are lost, said twice and out of order."""

    def __init__(self):
        super().__init__()
        self.cached = {}
        "What the engine holds: paths, and the names it has for them."
        self.count = 0
        self.mirror = Mirror()
        self.seen: set[tuple[int, ...]] = set()
        self.index, self.unasked = Index(), Index()
        "The second hears the same and has no beliefs of its own."
        for index in (self.index, self.unasked):
            index.open(0, 0)
            index.open(1, 0)
        self.channel: list[Account] = []
        self.past: list[Account] = []
        accounts.TOLD_MAX = 3

    def teardown(self):
        accounts.TOLD_MAX = 512

    # The engine

    @rule(path=PATHS)
    def store(self, path):
        """All of a text's blocks, those that are new in one event."""
        known = max(n for n in range(len(path) + 1) if n == 0 or tuple(path[:n]) in self.cached)
        names = []
        for n in range(known + 1, len(path) + 1):
            self.count += 1
            self.cached[tuple(path[:n])] = self.count
            self.seen.add(tuple(path[:n]))
            names.append(self.count)
        if names:
            parent = self.cached[tuple(path[:known])] if known else None
            event = BlockStored(tuple(names), parent, tuple(tokens(path[known:])), SIZE)
            self.mirror.hear([event])

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def evict(self, data):
        """A block that nothing follows."""
        leaves = [
            path
            for path in self.cached
            if not any(other[:-1] == path for other in self.cached if other)
        ]
        path = data.draw(st.sampled_from(sorted(leaves)))
        self.mirror.hear([BlockRemoved((self.cached.pop(path),))])

    @rule()
    def reset(self):
        """The engine forgets everything."""
        self.cached.clear()
        self.mirror.hear([AllBlocksCleared()])

    # The channel

    @rule()
    def beat(self):
        """The worker's next account is under way; a lost reply makes it come again."""
        account = self.mirror.teller.account()
        if account.epoch:
            self.channel.append(account)

    @rule(is_heard=st.booleans())
    def confirm(self, is_heard):
        """Redis says that it has the last one."""
        if self.channel and is_heard:
            self.mirror.teller.told(self.channel[-1].epoch, self.channel[-1].seq)

    @precondition(lambda self: self.channel)
    @rule(data=st.data(), fate=st.sampled_from(["heard", "heard", "heard", "lost", "late"]))
    def deliver(self, data, fate):
        """In order as a rule; sometimes never, sometimes late."""
        at = 0 if fate != "late" else data.draw(st.integers(0, len(self.channel) - 1))
        account = self.channel.pop(at)
        if fate != "lost":
            self.hear(account)
            self.past.append(account)

    @precondition(lambda self: self.past)
    @rule(data=st.data())
    def repeat(self, data):
        """What was heard long ago is heard again."""
        self.hear(data.draw(st.sampled_from(self.past)))

    @rule(path=PATHS)
    def believe(self, path):
        """The dispatcher sends a text there."""
        self.index.insert(0, chain(path))

    # What must hold

    @rule()
    def listed(self):
        """Once all is told anew and nothing of that is lost, the index holds what the engine holds, and no more."""
        self.channel.clear()
        self.mirror.teller.list_anew()
        while True:
            account = self.mirror.teller.account()
            self.hear(account)
            self.hear(account)
            self.mirror.teller.told(account.epoch, account.seq)
            if not account.rest:
                break
        for path in self.seen:
            held = sum(path[:n] in self.cached for n in range(1, len(path) + 1)) // 2
            assert self.unasked.match(chain(path)).get(0, 0) == held
            assert self.index.match(chain(path)).get(0, 0) >= held

    @invariant()
    def mirror_is_true(self):
        """The worker's own picture is the engine's at every moment."""
        assert self.mirror.teller.blocks == self.truth()

    @invariant()
    def others_are_not_touched(self):
        """One endpoint's news are not another's."""
        assert all(1 not in self.index.match(chain(path)) for path in self.cached)

    def hear(self, account):
        self.index.hear(0, account)
        self.unasked.hear(0, account)

    def truth(self):
        """The wire's blocks that the engine holds, from its own list."""
        return {chain(path)[-1] for path in self.cached if len(path) % 2 == 0}


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestAccounts = Machine.TestCase


def test_without_losses_every_account_is_followed():
    """Removed on the engine is removed in the index as soon as it was said."""
    mirror, index = Mirror(), Index()
    index.open(0, 0)

    def say():
        account = mirror.teller.account()
        index.hear(0, account)
        mirror.teller.told(account.epoch, account.seq)

    mirror.hear([BlockStored((1, 2, 3, 4), None, tuple(tokens([0, 1, 0, 1])), SIZE)])
    say()
    assert index.match(chain([0, 1, 0, 1])) == {0: 2}

    mirror.hear([BlockRemoved((4,))])
    say()
    assert index.match(chain([0, 1, 0, 1])) == {0: 1}

    mirror.hear([AllBlocksCleared()])
    index.insert(0, chain([1, 1]))
    say()
    assert index.match(chain([0, 1, 0, 1])) == {}
    assert index.match(chain([1, 1])) == {}, "what was only believed is void too"


def test_an_account_that_was_missed_stops_the_next_ones():
    """A gap: nothing more is taken in before the next listing, which mends it."""
    index = Index()
    index.open(0, 0)
    index.hear(0, Account(epoch=1, seq=1, stored=("a", "b")))
    index.hear(0, Account(epoch=1, seq=3, removed=("b",)))

    assert index.match(("a", "b")) == {0: 2}
    index.hear(0, Account(epoch=1, seq=4, removed=("a",)))
    assert index.match(("a", "b")) == {0: 2}

    index.hear(0, Account(epoch=2, seq=1, stored=("c",), rest=1))
    assert index.match(("a", "b")) == {0: 2}, "the listing is not over"
    index.hear(0, Account(epoch=2, seq=2, stored=("d",)))
    assert index.match(("a", "b")) == {}
    assert index.match(("c", "d")) == {0: 2}
