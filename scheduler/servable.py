"""What no dispatcher could serve, whatever its fleet: refused by the client before it is written, and again when read."""

from scheduler.errors import WireError
from scheduler.wire.client import Request
from scheduler.wire.words import BLOCKS_MAX, ID_PATTERN, PATHS, PRIORITY_MAX

NAME_CHARS = 256
"The longest model, tenant, session, objective or reply name that is read."

TOKENS_MAX = 100_000_000
"The longest prompt or answer that is believed."

SECONDS_MAX = 1e15
"What is longer is no promise: thirty million years."


def check(request: Request, *, body_bytes: int, reply_root: str) -> None:
    """Refuse what no dispatcher could serve, whatever its fleet.

    Args:
        request: as decoded, with its id filled in.
        body_bytes: the longest body allowed.
        reply_root: what a `reply_to` must begin with.

    Raises:
        WireError: names the field, the value found and the value wanted.
    """
    if not ID_PATTERN.fullmatch(request.id):
        _refuse(
            "id",
            request.id,
            "1 to 128 letters, digits or . _ : @ -, beginning with a letter or digit",
        )
    if request.path not in PATHS:
        _refuse("path", request.path, " or ".join(PATHS))
    if len(request.body) > body_bytes:
        _refuse_long("body", f"{len(request.body)} bytes", body_bytes)
    if request.reply_to and not request.reply_to.startswith(reply_root):
        _refuse("reply_to", request.reply_to, f"a stream that begins with {reply_root}")
    for name in ("model", "objective", "tenant", "session", "reply_to", "traceparent"):
        if len(getattr(request, name)) > NAME_CHARS:
            _refuse_long(name, f"{len(getattr(request, name))} characters", NAME_CHARS)
    if len(request.blocks) > BLOCKS_MAX:
        _refuse_long("blocks", f"{len(request.blocks)} hashes", BLOCKS_MAX)
    _check_numbers(request)


def _check_numbers(request: Request) -> None:
    for name in ("ttft_s", "tpot_s", "deadline_s", "max_queue_s"):
        value = getattr(request, name)
        if value is not None and not 0 < value < SECONDS_MAX:  # also refuses nan
            _refuse(name.removesuffix("_s") + "_ms", f"{value * 1e3:g}", "more than 0 and finite")
    at = request.deadline_at
    if at is not None and not -SECONDS_MAX < at < SECONDS_MAX:
        _refuse("deadline_at", f"{at * 1e3:g}", "unix milliseconds, a finite number")
    if request.max_attempts is not None and not 1 <= request.max_attempts <= 100:
        _refuse("max_attempts", str(request.max_attempts), "1 to 100")
    for name, least in (("prompt_tokens", 0), ("expected_tokens", 1)):
        tokens = getattr(request, name)
        if tokens is not None and not least <= tokens <= TOKENS_MAX:
            _refuse(name, str(tokens), f"{least} to {TOKENS_MAX}")
    if request.priority is not None and abs(request.priority) > PRIORITY_MAX:
        _refuse("priority", str(request.priority), f"{-PRIORITY_MAX} to {PRIORITY_MAX}")


def _refuse(field: str, found: str, wanted: str) -> None:
    raise WireError(f"field {field!r} is {found[:60]!r}, wanted {wanted}")


def _refuse_long(field: str, length: str, most: int) -> None:
    raise WireError(f"field {field!r} is {length} long, wanted at most {most}")
