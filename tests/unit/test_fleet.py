"""What a fleet's servers are told, and the arithmetic that runs inside vLLM."""

import importlib.util
import json

import numpy as np
import pytest

from scheduler.errors import SettingsError
from scheduler.sim import profile
from workers.fleet import pod
from workers.fleet.pod import PodSettings


def inside(name):
    """A module that runs in vLLM's environment."""
    spec = importlib.util.spec_from_file_location(name, pod.INSIDE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


steps = inside("headgate_steps")


@pytest.fixture
def settings(tmp_path):
    """Where a model is made, and no vLLM."""
    model = tmp_path / "models" / "nano"
    model.mkdir(parents=True)
    (model / "headgate.json").write_text('{"words": [3], "eos": 1, "kv_bytes_per_token": 128}')
    return PodSettings(directory=tmp_path, venv=tmp_path / "none", seed=3, jitter=0.3)


class TestClock:
    @pytest.mark.parametrize("name", profile.ALIASES)
    def test_both_clocks_show_the_same_time(self, settings, name):
        """The law inside vLLM is the profile's own, for prefills, decodes and both together."""
        told = steps.Told(pod.clock(settings, name, 2))
        specimen = profile.load(name).jittered(np.random.default_rng(5), 0.3)

        for asked in [(1, 1, 0, 4000), (1, 2048, 2_000_000, 0), (33, 544, 200_000, 64_000)]:
            assert steps.step_ms(told, *asked) == pytest.approx(1e3 * specimen.step_s(*asked))


class TestSaid:
    def test_a_text_taken_up_elsewhere_comes_out_the_same(self):
        """What follows depends on the text before it alone."""
        words = list(range(100, 900))
        whole = steps.Said([7, 8, 9], ends_after=0)
        tokens = [whole.say(words, 1) for _ in range(20)]

        rest = steps.Said([7, 8, 9, *tokens[:12]], ends_after=0)

        assert [rest.say(words, 1) for _ in range(8)] == tokens[12:]

    def test_the_hidden_length_ends_it(self):
        """With the end token, which counts."""
        said = steps.Said([7], ends_after=3)

        assert [said.say([5], 1) for _ in range(3)] == [5, 5, 1]


class TestPod:
    def test_it_holds_what_the_gpu_would(self, settings):
        """The KV cache is the profile's and a block that vLLM keeps, in the bytes of the small model."""
        words = pod.arguments(settings, "l40s", [8000])

        held = int(words[words.index("--kv-cache-memory-bytes") + 1])
        assert held == 128 * (profile.load("l40s").kv_tokens + settings.block_size)
        assert words[words.index("--worker-cls") + 1] == "headgate_clock.ClockWorker"

    def test_settings_of_other_servers_do_not_leak_in(self, settings, monkeypatch):
        """Neither their variables nor our Python's."""
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
        monkeypatch.setenv("PYTHONHOME", "/elsewhere")

        environ = pod.environment(settings, "a100", 0)

        assert not {"VLLM_CPU_KVCACHE_SPACE", "PYTHONHOME"} & environ.keys()
        assert environ["PYTHONPATH"] == str(pod.INSIDE)
        assert json.loads(environ["HEADGATE_CLOCK"])["seed"] == 3

    def test_without_vllm_it_says_what_makes_one(self, settings):
        """The path and the remedy."""
        with pytest.raises(SettingsError, match=r"none' has no vllm|has no vllm; deploy/vllm"):
            pod.program(settings, "vllm")
