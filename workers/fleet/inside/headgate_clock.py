"""A vLLM worker whose forward pass takes the time of a modelled GPU, and does nothing else.

API server, scheduler, KV blocks, prefix cache, metrics and admission are vLLM's own; only the model's answer is not
computed: a step sleeps for what `step_ms` says of it, and tokens follow from the text before them by a checksum.

This file runs in vLLM's own environment, where ours is not installed: it imports only vLLM and the standard library,
and is told everything by one environment variable, HEADGATE_CLOCK. `vllm serve --worker-cls headgate_clock.ClockWorker`
"""

import ctypes
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from headgate_steps import Said, Told, step_ms
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.cpu_worker import CPUWorker

ABSORBED_S = 0.05
"""
The engine's own work between two steps that is hidden in the next step's time.

On a GPU the engine schedules while the last step computes. What took longer than this was no scheduling: the machine
stood still, or the engine was paused.
"""


class ClockWorker(CPUWorker):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _die_with_parent()
        self._told = Told(os.environ["HEADGATE_CLOCK"])
        model = json.loads(Path(self.model_config.model, "headgate.json").read_text("utf-8"))
        self._words, self._eos = model["words"], model["eos"]
        self._rng = random.Random(self._told.seed)
        self._all = {}
        self._ended_at = 0.0
        self._was_busy = False

    def execute_model(self, scheduled):
        began_at = time.perf_counter()
        self._take_in(scheduled)
        if not scheduled.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        # A step follows on the one before it, however late this process was to begin it: errors do not add up.
        if self._was_busy and began_at - self._ended_at < ABSORBED_S:
            began_at = self._ended_at
        cost_ms, sampled = self._computed(scheduled)
        self._ended_at = began_at + cost_ms / 1e3
        self._was_busy = True
        left_s = self._ended_at - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)
        ids = list(scheduled.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={name: index for index, name in enumerate(ids)},
            sampled_token_ids=[sampled.get(name, []) for name in ids],
        )

    def _take_in(self, scheduled):
        """Who came and who went."""
        for name in scheduled.finished_req_ids:
            self._all.pop(name, None)
        if not self._all:
            self._was_busy = False
        for new in scheduled.scheduled_new_reqs:
            hidden = getattr(new.sampling_params, "extra_args", None) or {}
            length = int(hidden.get("output_tokens", 0))  # 0: until max_tokens
            least = getattr(new.sampling_params, "min_tokens", 0)
            self._all[new.req_id] = Said(
                new.prompt_token_ids or (), max(length, least) if length else 0
            )

    def _computed(self, scheduled):
        """What the step costs, and the tokens of those whose text is computed to its end."""
        computed = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        known = scheduled.scheduled_cached_reqs
        computed.update(zip(known.req_ids, known.num_computed_tokens))
        attention = context = 0
        sampled = {}
        for name, n_new in scheduled.num_scheduled_tokens.items():
            said, before = self._all[name], computed[name]
            is_decode = n_new == 1 and said.n_said > 0 and before + 1 == said.n_tokens
            if is_decode:
                context += before
            else:
                attention += n_new * before + n_new * n_new // 2 + 1
            if before + n_new >= said.n_tokens:
                sampled[name] = [said.say(self._words, self._eos)]
        told = self._told
        cost_ms = step_ms(
            told,
            len(scheduled.num_scheduled_tokens),
            scheduled.total_num_scheduled_tokens,
            attention,
            context,
        )
        if told.step_noise:
            cost_ms *= self._rng.lognormvariate(0, told.step_noise)
        return cost_ms * told.slowdown / told.time_scale, sampled


def _die_with_parent():
    """An API server that is killed leaves its engine behind; the kernel shall end it too (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
