"""What an endpoint's beats say, and how often they name what is in hand."""

import pytest
from attempts import held

from scheduler.keys import Keys
from scheduler.settings import EngineAddress, WorkerSettings
from workers import telling as tellings
from workers.engine import Engine
from workers.features import Features
from workers.hands import Hands
from workers.health import Health
from workers.holdings import SAID_MAX
from workers.inbox import Inbox
from workers.kv_cache import KvCache
from workers.metrics import Gaps
from workers.rhythm import Rhythm
from workers.scrape import Load
from workers.telling import Telling

ADDRESS = EngineAddress(
    name="e0",
    url="http://127.0.0.1:1",
    hardware="a100",
    roles=("decode",),
    link_gbps=400.0,
    kv_token_bytes=9,
    max_num_seqs=64,
)

BEAT_S = 8.0


class Told:
    """One endpoint's telling, what it tells of, and its clock."""

    def __init__(self):
        engine = Engine(ADDRESS, connect_s=1.0)
        self.health = Health(engine, ADDRESS, WorkerSettings(), clock=lambda: 0.0)
        self.rhythm, self.hands = Rhythm("a100", Gaps()), Hands(1000)
        self.inbox = Inbox(None, Keys(), "e0", "w0")
        self.tick = 100.0
        self._telling = Telling(
            ADDRESS,
            worker="w0",
            beat_s=BEAT_S,
            health=self.health,
            rhythm=self.rhythm,
            hands=self.hands,
            inbox=self.inbox,
            kv=KvCache(engine, "e0"),
        )

    def has(self, *request_ids):
        for one in map(held, request_ids):
            self.hands.take(one)
            self.hands.hold(one)

    def beat(self, *, after_s=BEAT_S, state="ready", reason="", started=(), first_tokens=()):
        self.tick += after_s
        return self._telling.beat(3, state, reason, started, first_tokens)


@pytest.fixture
def told(monkeypatch):
    made = Told()
    monkeypatch.setattr(tellings, "perf_counter", lambda: made.tick)
    return made


def test_it_says_what_the_endpoint_is_and_how_it_fares(told):
    """The settings' word, the engine's own where it was asked, and what the worker sees."""
    told.health.load = Load(
        running=2,
        queued=1,
        kv_usage=0.5,
        kv_tokens=999,
        block_tokens=16,
        no_prefix_cache=True,
    )
    told.health.load_at, told.health.models, told.health.max_model_len = 7.0, ("m",), 4096
    told.health.features = Features(version="0.11", names=("pause",))
    told.rhythm.step_s = 0.03
    told.has("r1", "r2")
    told.hands.start(told.hands.held["r1"])

    beat = told.beat(state="away", reason="why", started=("a:1",), first_tokens=("a:1:5.0",))

    assert (beat.endpoint, beat.epoch, beat.worker) == ("e0", 3, "w0")
    assert (beat.state, beat.reason) == ("away", "why")
    assert (beat.roles, beat.hardware, beat.link_gbps) == (("decode",), "a100", 400.0)
    assert (beat.max_num_seqs, beat.kv_token_bytes) == (64, 9)
    assert (beat.models, beat.max_model_len) == (("m",), 4096)
    assert (beat.kv_tokens, beat.block_tokens, beat.no_prefix_cache) == (999, 16, True)
    assert (beat.running, beat.queued, beat.kv_usage, beat.scraped_at) == (2, 1, 0.5, 7.0)
    assert (beat.held, beat.step_s) == (1, 0.03)
    assert (beat.engine, beat.features) == ("0.11", ("pause",))
    assert (beat.started, beat.first_tokens) == (("a:1",), ("a:1:5.0",))
    assert (beat.kv_epoch, beat.kv_stored) == (0, ()), "its cache is not followed"


def test_until_all_was_read_nothing_is_said_of_what_is_held(told):
    """Whatever is missing there would be thought lost."""
    told.has("r1")

    beat = told.beat()

    assert (beat.read_at, beat.holds) == (None, ())


def test_what_is_in_hand_is_named_once_a_beat(told):
    """However many come between for the sake of news: those say nothing of it."""
    told.has("r2", "r1")
    told.inbox.read_at = 50.0
    first = told.beat()
    assert (first.read_at, first.holds) == (50.0, ("r1:1", "r2:1"))
    assert (first.holds_after, first.holds_to) == ("", "")

    news = told.beat(after_s=7.0)
    assert (news.read_at, news.holds) == (None, ())

    assert told.beat(after_s=0.25).read_at == 50.0, "a beat that comes a little early"


def test_what_is_much_is_named_over_several_beats(told):
    """A beat stays short: each goes on behind the last, news between them or not."""
    told.has(*(f"r{n:03}" for n in range(SAID_MAX + 1)))
    told.inbox.read_at = 50.0

    first, _, second, third = (told.beat(after_s=s) for s in (8.0, 1.0, 7.0, 8.0))

    assert len(first.holds) == SAID_MAX
    assert (second.holds_after, second.holds) == (first.holds_to, (f"r{SAID_MAX:03}:1",))
    assert second.holds_to == ""
    assert third.holds == first.holds
