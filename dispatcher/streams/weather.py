"""What can go wrong with a server, as the one `StreamError` that everybody else knows."""

import asyncio
from typing import Any, TypeGuard

import redis.exceptions

from scheduler.errors import StreamError


class Weather:
    """Turns what redis-py raises into `StreamError`, and keeps a cancellation that it swallows.

    redis-py sends under `asyncio.wait_for`, which before Python 3.12 loses a cancellation that comes in the same
    turn of the loop as the end of the send: the task would then go on as if nobody had asked it to end.
    """

    def __init__(self, shown: str) -> None:
        self._shown = shown
        self._asked = 0

    def __enter__(self) -> None:
        self._asked = _times_cancelled()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if _times_cancelled() > self._asked and not isinstance(error, asyncio.CancelledError):
            raise asyncio.CancelledError from error
        # redis-py's errors of a Cluster are a family of their own.
        if _is_closed(error) or isinstance(
            error,
            redis.exceptions.RedisError
            | redis.exceptions.RedisClusterException
            | TimeoutError
            | OSError,
        ):
            raise StreamError(f"redis at {self._shown}: {_said(error)}") from error


class Trouble:
    """Turns what a pipe raises into `StreamError`; one serves a whole connection."""

    def __init__(self, shown: str) -> None:
        self._shown = shown

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, redis.exceptions.RedisError | OSError):
            raise StreamError(f"redis at {self._shown}: {error or type(error)}") from error


HINTS = {
    "HELLO must be called with": "wanted a user and password, HEADGATE_REDIS_USERNAME and HEADGATE_REDIS_PASSWORD",
    "Function not found": "wanted a dispatcher that has connected once since this server began: it loads them",
    "read only replica": "wanted its master",
    "used memory > 'maxmemory'": "it is full, see docs/DEPLOYMENT.md, Memory",
}
"What a server says that is asked for something it cannot give, and what it wants."

WRITES = ("writelines", "drain")
"What redis-py asks of a connection's writer."


def _is_closed(error: object) -> TypeGuard[RuntimeError | AttributeError]:
    """Whether redis-py wrote to a connection that was lost meanwhile: neither uvloop nor it has an error of its own for that.

    Of a Cluster a task may close what another is about to write to; its writer is then None.
    """
    if isinstance(error, AttributeError):
        return error.obj is None and error.name in WRITES
    return isinstance(error, RuntimeError) and "the handler is closed" in str(error)


def _explained(said: str) -> str:
    return next((f"{said} ({hint})" for words, hint in HINTS.items() if words in said), said)


def is_complaint(error: Exception) -> bool:
    """Whether a server said so itself, and not its client, which then had no answer."""
    return isinstance(error, redis.exceptions.ResponseError)


def is_unknown_function(reply: Any) -> bool:
    """Whether the server was restarted without our functions."""
    return isinstance(reply, redis.exceptions.ResponseError) and "Function not found" in str(reply)


def as_stream_error(reply: Any, shown: str) -> Any:
    """A complaint as our own error; any other reply as it is."""
    if isinstance(reply, Exception):
        return StreamError(f"redis at {shown}: {_explained(str(reply))}")
    return reply


def _said(error: BaseException) -> str:
    """What an error says, without the clients that redis-py prints where sentinels do not answer."""
    said, _, silent = (str(error) or type(error).__name__).partition(" : <redis")
    return f"{said}: not every sentinel answers" if silent else _explained(said)


def _times_cancelled() -> int:
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0
