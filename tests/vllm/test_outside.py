"""The outside judges at a door before real vLLM servers: the `openai` client, and vLLM's own load generator."""

import json
import os
import subprocess

import pytest
from fleets import ROOT
from outside import MODEL, Facts

pytestmark = pytest.mark.timeout(300)

SEATS = 8
FLEET = ("2", "--profiles", "h100", "--max-num-seqs", str(SEATS))
PROMPTS = 40


class TestOpenAI(Facts):
    """Every fact of `outside`."""


class TestBench:
    @pytest.mark.parametrize("backend", ["openai", "openai-chat"])
    def test_vllm_bench_serve(self, system, fleet_home, tmp_path, backend):
        """Every prompt is answered, none too short, and the generator has its figures."""
        tokenizer = next((fleet_home / "models").iterdir())  # all models have the same
        path = "/v1/completions" if backend == "openai" else "/v1/chat/completions"
        words = {
            "backend": backend,
            "base-url": system["door"],
            "endpoint": path,
            "model": MODEL,
            "tokenizer": tokenizer,
            "dataset-name": "random",
            "random-input-len": 200,
            "random-output-len": 40,
            "num-prompts": PROMPTS,
            "request-rate": 10,
            "result-dir": tmp_path,
            "result-filename": "result.json",
        }
        options = [part for name, value in words.items() for part in (f"--{name}", str(value))]
        flags = ["--save-result", "--ignore-eos"]
        done = subprocess.run(
            [ROOT / ".venv-vllm/bin/vllm", "bench", "serve", *options, *flags],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

        assert done.returncode == 0, done.stderr[-4000:]
        result = json.loads((tmp_path / "result.json").read_text())
        print(  # noqa: T201  seen with -s, for docs/VLLM.md
            f"\nvllm bench serve --backend {backend}: {result['completed']} of {PROMPTS}, "
            f"TTFT p50 {result['median_ttft_ms']:.0f} ms, p99 {result['p99_ttft_ms']:.0f} ms, "
            f"TPOT p50 {result['median_tpot_ms']:.1f} ms, {result['output_throughput']:.0f} tokens/s"
        )
        assert (result["completed"], result["failed"]) == (PROMPTS, 0)
        assert result["total_output_tokens"] == PROMPTS * 40
        assert result["median_ttft_ms"] > 0 < result["median_tpot_ms"]
