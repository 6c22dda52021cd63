"""The block pool against a model that keeps every physical block in a list."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from scheduler.sim.kv import ANONYMOUS, BlockPool

CAPACITY = 12


class PlainPool:
    """One object a block, one list for the line of free ones: slow, and plain to see."""

    def __init__(self, capacity):
        self.line = [{"key": None, "holders": 0} for _ in range(capacity)]
        self.cached = {}

    def hold(self, keys):
        blocks = [self.cached[key] for key in keys]
        for block in blocks:
            if block["holders"] == 0:
                self.line = [other for other in self.line if other is not block]
            block["holders"] += 1
        return blocks

    def take(self, n_blocks):
        taken, self.line = self.line[:n_blocks], self.line[n_blocks:]
        for block in taken:
            if block["key"] is not None:
                del self.cached[block["key"]]
            block.update(key=None, holders=1)
        return taken

    def seal(self, blocks, keys):
        for block, key in zip(blocks, keys, strict=True):
            if key not in self.cached:
                block["key"] = key
                self.cached[key] = block

    def release(self, blocks):
        for block in reversed(blocks):
            block["holders"] -= 1
            if block["holders"] == 0:
                self.line.append(block)


class PoolMachine(RuleBasedStateMachine):
    """Requests with prompts over a small tree of prefixes come and go."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(CAPACITY)
        self.plain = PlainPool(CAPACITY)
        self.requests = []

    @rule(branch=st.lists(st.integers(0, 1), max_size=5), tail=st.integers(0, 2))
    def start(self, branch, tail):
        """A request shares what is cached and computes the rest, if there is room."""
        keys = [int("1" + "".join(map(str, branch[: i + 1])), 2) for i in range(len(branch))]
        n_hits = self.pool.match(keys, len(keys))
        assert n_hits == self.plain_match(keys)
        n_new = len(keys) - n_hits + tail
        if not n_hits + n_new or n_new + self.pool.idle(keys[:n_hits]) > self.pool.free:
            return
        self.pool.hold(keys[:n_hits])
        self.pool.take(n_new)
        held = keys[:n_hits] + [ANONYMOUS] * n_new
        self.pool.seal(held, keys, n_hits, len(keys))
        blocks = self.plain.hold(keys[:n_hits]) + self.plain.take(n_new)
        self.plain.seal(blocks[n_hits : len(keys)], keys[n_hits:])
        self.requests.append((held, blocks))

    def plain_match(self, keys):
        n_hits = 0
        while n_hits < len(keys) and keys[n_hits] in self.plain.cached:
            n_hits += 1
        return n_hits

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data):
        """Any request may end first."""
        index = data.draw(st.integers(0, len(self.requests) - 1))
        held, blocks = self.requests.pop(index)
        self.pool.release(held)
        self.plain.release(blocks)

    @rule()
    def reset(self):
        """Possible exactly when nothing is held."""
        assert self.pool.reset() == (not self.requests)
        if not self.requests:
            self.plain = PlainPool(CAPACITY)

    @invariant()
    def counts_agree(self):
        assert self.pool.free == len(self.plain.line)
        assert self.pool.used + self.pool.free == CAPACITY
        assert self.pool.cached == len(self.plain.cached)

    @invariant()
    def same_keys_are_cached(self):
        """And so the same ones were evicted, in the same order."""
        for length in range(1, 6):
            for bits in range(2**length):
                key = (1 << length) | bits
                assert (self.pool.match([key], 1) == 1) == (key in self.plain.cached)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30)


def test_a_tail_is_evicted_before_its_prefix():
    """Blocks of one request go back last first, so the shared head lives longest."""
    pool = BlockPool(3)
    held = [ANONYMOUS] * 3
    pool.take(3)
    pool.seal(held, [10, 20, 30], 0, 3)
    pool.release(held)

    pool.take(1)
    assert pool.match([10, 20, 30], 3) == 2

    pool.take(1)
    assert pool.match([10, 20, 30], 3) == 1
