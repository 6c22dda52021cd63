"""Half a request, in the words of vLLM's KV connectors (`kv_transfer_params`).

A prefill leg asks for one token, in one piece, which nobody will see, and for the prompt's KV to be kept; the answer
says where it is. A decode leg says that to its own engine, which fetches the KV and begins with the first token. What
is said of the KV is the engines' own affair: an object, of bounded size, and never looked into.
"""

import msgspec

from scheduler.errors import UNREADABLE, EngineError
from scheduler.wire.words import KV_PARAMS_BYTES

PARAMS = "kv_transfer_params"

PARK = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"What a prefill leg says, as vLLM's own proxies do."

NO_KV = b"{}"
"Of a prompt that cannot be computed apart: whoever decodes computes it."

CLAIM = b'{"claim":"kv"}'
"What a reward, and then a job, brings in their place: they lie in a key of their own."


def obstacle(body: dict[str, object]) -> str:
    """Why a prompt cannot be computed apart from its answer; empty where it can."""
    for name in ("n", "best_of"):
        if body.get(name) not in (None, 1):
            return f"the request has {name!r}: {body[name]}"
    if body.get("use_beam_search"):
        return "the request searches in beams"
    if body.get("prompt_logprobs") is not None or (body.get("echo") and body.get("logprobs")):
        return "log probabilities of the prompt are wanted, and come with computing it"
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return "the request has several prompts"
    return ""


def first(ready: dict[str, object]) -> None:
    """Make a body that is ready for an engine a prefill leg's."""
    ready["stream"] = False
    del ready["stream_options"]
    ready["max_tokens"] = ready["min_tokens"] = 1
    if "max_completion_tokens" in ready:
        ready["max_completion_tokens"] = 1
    ready[PARAMS] = PARK


def second(ready: dict[str, object], kv_params: bytes) -> None:
    """Make it a decode leg's, of a prompt whose KV is there.

    Raises:
        EngineError: the parameters are no JSON object.
    """
    if checked(kv_params) != NO_KV:
        ready[PARAMS] = msgspec.Raw(kv_params)


def checked(kv_params: bytes) -> bytes:
    """The parameters, if they can be carried.

    Raises:
        EngineError: they are no JSON object, or too long.
    """
    if len(kv_params) > KV_PARAMS_BYTES:
        raise EngineError(f"{PARAMS} has {len(kv_params)} bytes, wanted at most {KV_PARAMS_BYTES}")
    try:
        kv_params.decode()  # what is not looked into is not seen to be text
        msgspec.json.decode(kv_params, type=dict[str, msgspec.Raw])
    except UNREADABLE:
        raise EngineError(f"{PARAMS} is {kv_params[:40]!r}, wanted a JSON object") from None
    return kv_params
