"""What a step on the emulated clock costs, and what a request says next; the arithmetic of headgate_clock.

Apart from it so that it can be tried where there is no vLLM.
"""

import json
import zlib


class Told:
    """What HEADGATE_CLOCK says."""

    def __init__(self, raw):
        told = json.loads(raw)
        self.coef = told["coef"]
        self.k = told["k"]
        self.extra_ms_per_step = told["extra_ms_per_step"]
        self.time_scale = told.get("time_scale", 1.0)
        "Times faster than the wall clock."
        self.slowdown = told.get("slowdown", 1.0)
        self.step_noise = told.get("step_noise", 0.0)
        self.seed = told.get("seed", 0)


def step_ms(told, n_seqs, new_tokens, prefill_attention, decode_context):
    """`Profile.step_s` of scheduler/sim/profile.py, in milliseconds; a test holds the two together."""
    c = told.coef
    products = (c["w"] ** told.k + (c["g"] * new_tokens / 1e3) ** told.k) ** (1 / told.k)
    attention = c["ap"] * prefill_attention / 1e6
    reading = c["ad"] * decode_context / 1e3 * (c["mx"] if prefill_attention > 0 else 1.0)
    return c["t0"] + told.extra_ms_per_step + c["r"] * n_seqs + products + attention + reading


class Said:
    """One request in the engine: how long its text is, and a checksum of it."""

    __slots__ = ("ends_after", "n_said", "n_tokens", "state")

    def __init__(self, prompt_ids, ends_after):
        self.n_tokens = len(prompt_ids)
        self.n_said = 0
        self.ends_after = ends_after
        # Over ids, so that a text broken off here and continued elsewhere comes out the same.
        self.state = 0
        for token in prompt_ids:
            self.note(token)

    def note(self, token):
        self.state = zlib.crc32(token.to_bytes(4, "little"), self.state)

    def say(self, words, eos):
        """The next token."""
        self.n_said += 1
        self.n_tokens += 1
        token = eos if self.n_said == self.ends_after else words[self.state % len(words)]
        self.note(token)
        return token
