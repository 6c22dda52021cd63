"""The instrument measures what the textbook, the profiles and the arithmetic say it must."""

import math
import subprocess
import sys

import numpy as np
import pytest
from msgspec import structs

from scheduler.sim import fleet, policy, profile
from scheduler.sim.arguments import EngineSettings
from scheduler.sim.fleet import CERTAIN, NO_DELAYS, Delays, EndpointSpec, Fault, Fleet, machines
from scheduler.sim.lab import Lab
from scheduler.sim.promise import Promised
from scheduler.sim.workload import Arrival

# One sequence at a time, and a prompt whole in a step: then an endpoint is one server with one queue.
SINGLE = EngineSettings(max_num_seqs=1, max_num_batched_tokens=32_768, prefix_caching=False)


def one_a100(engine=SINGLE, **fields):
    spec = EndpointSpec(profile="a100", engine=engine)
    return Fleet(name="one", endpoints=(spec,), chance=CERTAIN, delays=NO_DELAYS, **fields)


def lab(found, arrivals, **fields):
    return Lab(fleet=found, work=Promised(tuple(arrivals)), trace="test", **fields)


def poisson(prompts, rate, seed):
    """Arrivals with these prompts and one token of output each, Poisson at this rate."""
    at_s = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, len(prompts)))
    return [
        Arrival(at_s=float(at), prompt_tokens=int(prompt), output_tokens=1)
        for at, prompt in zip(at_s, prompts, strict=True)
    ]


def service_s(prompt):
    """Seconds of a whole prompt in one step of the bare profile."""
    found = profile.load("a100")
    return found.step_s(1, prompt, prompt * prompt // 2 + 1)


def run(stage, name, seed=0, **fields):
    arrivals = stage.work.arrivals
    span_s = arrivals[-1].at_s - arrivals[0].at_s
    rate = (len(arrivals) - 1) / span_s
    return stage.run(policy.named(name), label=name, seed=seed, rate_rps=rate, **fields)


class TestQueues:
    @pytest.mark.parametrize("load", [0.5, 0.8])
    def test_md1(self, load):
        """M/D/1: the mean wait is load * service / (2 * (1 - load)), within five standard errors."""
        service = service_s(2000)
        arrivals = poisson([2000] * 4000, load / service, seed=3)

        _, world = run(lab(one_a100(), arrivals), "round-robin")

        self.check(world, service_s(2000), load * service / (2 * (1 - load)))

    def test_mg1(self):
        """M/G/1: the mean wait is rate * E[S^2] / (2 * (1 - load)) (Pollaczek and Khinchine)."""
        rng = np.random.default_rng(5)
        prompts = rng.choice([500, 2000, 6000], size=4000, p=[0.6, 0.3, 0.1])
        services = np.array([service_s(int(prompt)) for prompt in prompts])
        rate = 0.6 / services.mean()
        arrivals = poisson(prompts, rate, seed=4)

        _, world = run(lab(one_a100(), arrivals), "round-robin")

        wait = rate * (services**2).mean() / (2 * (1 - 0.6))
        self.check(world, services.mean(), wait)

    @staticmethod
    def check(world, service, wait):
        ttft = np.array([fate.ttft_s for fate in world.fates[200:]])
        frontend_s = profile.load("a100").frontend_s
        measured = ttft.mean() - frontend_s - service
        # Waits of neighbours hang together: the error is taken from means of batches.
        error = np.std([part.mean() for part in np.array_split(ttft, 20)]) / math.sqrt(20)
        assert abs(measured - wait) < 5 * error
        assert abs(measured - wait) < 0.25 * wait


class TestAlone:
    @pytest.mark.parametrize("name", ["h100", "a100", "l40s", "a30", "v100"])
    def test_batch_one_is_the_profile(self, name):
        """A request alone takes its front end, its prefill and its decode steps, within 2 %."""
        found, prompt, output = profile.load(name), 1500, 200
        one = Fleet(
            name="one",
            endpoints=(EndpointSpec(profile=name),),
            chance=CERTAIN,
            delays=NO_DELAYS,
        )
        arrivals = [
            Arrival(at_s=60.0 * at, prompt_tokens=prompt, output_tokens=output) for at in range(3)
        ]

        _, world = run(lab(one, arrivals), "plan")

        prefill_s = found.frontend_s + found.step_s(1, prompt, prompt * prompt // 2 + 1)
        decode_s = sum(found.step_s(1, 1, decode_context=prompt + at) for at in range(1, output))
        for fate in world.fates:
            assert fate.ttft_s == pytest.approx(prefill_s, rel=0.02)
            assert fate.tpot_s == pytest.approx(decode_s / (output - 1), rel=0.02)


def crowd(n=150, seed=1, **promise):
    """More than two A30 can serve, with shared prefixes and long answers."""
    rng = np.random.default_rng(seed)
    at_s = np.sort(rng.uniform(0, 15, n))
    return [
        Arrival(
            at_s=float(at),
            prompt_tokens=int(rng.integers(100, 4000)),
            output_tokens=int(rng.integers(1, 300)),
            blocks=(0, 1 + row % 7, 100 + row),
            block_tokens=1500,
            **promise,
        )
        for row, at in enumerate(at_s)
    ]


PAIR = Fleet(name="pair", endpoints=(EndpointSpec(profile="a30", count=2),))
CHEAP = list(policy.BY_NAME)


class TestConservation:
    @pytest.mark.parametrize("name", CHEAP)
    def test_every_request_ends_once(self, name):
        """I1, I2: whatever the policy, each request ends, and the KV cache is given back whole."""
        found, world = run(lab(PAIR, crowd(60, ttft_s=4.0)), name)

        assert found.n == found.n_completed + found.n_expired + found.n_rejected + found.n_failed
        assert all(
            fate.output_tokens == fate.arrival.output_tokens
            for fate in world.fates
            if fate.end == "completed"
        )
        for endpoint in world.endpoints.values():
            assert endpoint.engine.kv.used == 0
            assert endpoint.engine.n_running == endpoint.engine.n_waiting == 0

    @pytest.mark.parametrize("name", ["plan", "fcfs", "least-request"])
    @pytest.mark.parametrize("kind", ["die", "freeze"])
    def test_a_lost_endpoint_loses_nobody(self, name, kind):
        """What a dead or frozen endpoint held is served by the other, and once."""
        again = "join" if kind == "die" else "thaw"
        faults = (
            Fault(at_s=5.0, endpoint="a30-0", kind=kind),
            Fault(at_s=12.0, endpoint="a30-0", kind=again),
        )

        found, world = run(lab(structs.replace(PAIR, faults=faults), crowd()), name)

        assert found.n_completed == found.n
        assert found.wasted_tokens > 0
        assert any(fate.attempts > 1 for fate in world.fates)

    def test_an_endpoint_that_joins_late_is_used(self):
        """A first fault `join` means that it was not there before."""
        faults = (Fault(at_s=5.0, endpoint="a30-1", kind="join"),)

        _, world = run(lab(structs.replace(PAIR, faults=faults), crowd()), "plan")

        begun = {fate.endpoint: fate.first_token_at for fate in reversed(world.fates)}
        assert begun["a30-0"] < 5.0 < begun["a30-1"]

    def test_a_deadline_ends_in_the_worker_too(self):
        """A request past its deadline expires wherever it stands, and is counted as missed."""
        found, world = run(lab(PAIR, crowd(deadline_s=6.0)), "plan")

        assert found.n_expired > 0
        assert found.on_time == found.n_completed / found.n
        assert all(fate.e2e_s <= 6.0 for fate in world.fates if fate.end == "completed")


class TestSame:
    @pytest.mark.parametrize("name", ["round-robin", "fcfs", "plan"])
    def test_quiet_stretches_change_nothing(self, name, monkeypatch):
        """Sleeping through pure decoding gives tokens and news their times, whoever acts on them."""
        still = structs.replace(PAIR, chance=CERTAIN)
        _, fast = run(lab(still, crowd(60)), name)
        monkeypatch.setattr("scheduler.sim.course.QUIET_LEAST_S", math.inf)
        _, slow = run(lab(still, crowd(60)), name)

        assert [fate.finished_at for fate in fast.fates] == pytest.approx(
            [fate.finished_at for fate in slow.fates], rel=1e-9
        )

    def test_i6_same_seed_same_bytes(self):
        """I6: two processes with different hash seeds write the same bytes."""
        code = (
            "import sys; sys.path.insert(0, 'tests/sim')\n"
            "import msgspec, test_instrument as t\n"
            "for name in ('plan', 'moore-hodgson', 'lodestar', 'power-of-two'):\n"
            "    found, _ = t.run(t.lab(t.PAIR, t.crowd(60, ttft_s=3.0)), name, seed=7)\n"
            "    print(msgspec.json.encode(found).decode())\n"
        )
        runs = [
            subprocess.run(
                [sys.executable, "-c", code],
                env={"PYTHONHASHSEED": seed},
                capture_output=True,
                check=True,
            ).stdout
            for seed in ("1", "2")
        ]

        assert runs[0] == runs[1]
        assert runs[0].count(b"\n") == 4

    def test_machines_are_the_same_for_every_policy(self):
        """A seed makes the machines, not the policy: results are paired."""
        assert machines(PAIR, 3) == machines(PAIR, 3) != machines(PAIR, 4)


class TestDelays:
    def test_a_slower_stream_is_seen(self):
        """Each hop of the stream is paid: enqueue to dispatcher, dispatcher to worker."""
        slow = structs.replace(one_a100(), delays=Delays(hop_s=0.5, turn_s=0.0))
        arrivals = poisson([100] * 3, 0.1, seed=1)

        _, near = run(lab(one_a100(), arrivals), "round-robin")
        _, far = run(lab(slow, arrivals), "round-robin")

        for one, other in zip(near.fates, far.fates, strict=True):
            assert other.ttft_s == pytest.approx(one.ttft_s + 1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("key", "more"),
    [
        ("kv_tokens", "[endpoints.engine]\nkv_tokens = 1"),
        ("stall_probability", "[endpoints.engine]\nstall_probability = 7"),
        ("max_num_queued_reqs", "[endpoints.engine]\nmax_num_queued_reqs = -1"),
        ("jitter", "[chance]\njitter = 2.0"),
        ("jitter", "[chance]\njitter = nan"),
        ("hop_s", "[delays]\nhop_s = -1"),
        ("beat_s", "[delays]\nbeat_s = 0"),
        ("turn_s", "[delays]\nturn_s = inf"),
        ("at_s", "[[faults]]\nat_s = -1\nendpoint = 'a30-0'\nkind = 'die'"),
        ("factor", "[[faults]]\nat_s = 1\nendpoint = 'a30-0'\nkind = 'slow'\nfactor = 0"),
    ],
)
def test_no_figure_of_a_fleet_is_of_another_world(key, more):
    """It is refused before it runs: such a run hung, crashed, or gave figures."""
    with pytest.raises(fleet.SettingsError, match=key):
        fleet.parse(f'[[endpoints]]\nprofile = "a30"\n{more}', "f.toml")


def test_a_fleet_that_cannot_be_says_so():
    """Fleets name what is wrong and what there is."""
    with pytest.raises(fleet.SettingsError, match="profile 'a31' is not one of"):
        fleet.parse('[[endpoints]]\nprofile = "a31"', "f.toml")
    with pytest.raises(
        fleet.SettingsError, match=r"unknown field `profil`.*\[endpoints\]: profile"
    ):
        fleet.parse('[[endpoints]]\nprofil = "a30"', "f.toml")
    with pytest.raises(fleet.SettingsError, match="does not fit"):
        fleet.parse('[[endpoints]]\nprofile = "a30"\n[endpoints.engine]\nkv_tokens = 100', "f.toml")
    text = '[[endpoints]]\nprofile = "a30"\n[[faults]]\nat_s = 1.0\nendpoint = "b-0"\nkind = "die"'
    with pytest.raises(fleet.SettingsError, match="fault on endpoint 'b-0', wanted one of: a30-0"):
        fleet.parse(text, "f.toml")
    text = '[[endpoints]]\nprofile = "h100"\nrole = "prefill"\n[[endpoints]]\nprofile = "h100-70b"\nrole = "decode"'
    with pytest.raises(fleet.SettingsError, match=r"h100 prefills .* and no endpoint decodes it"):
        fleet.parse(text, "f.toml")
