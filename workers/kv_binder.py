"""Which of the engine's blocks a prompt of text became: asked of the engine's own tokenizer, aside and seldom.

A prompt of token ids needs no asking. For others the engine is asked after the answer, one at a time, and only where a
prompt has blocks that are not known yet: of a long conversation that is its newest turn.
"""

import asyncio
from collections import deque

import msgspec
import structlog

from scheduler.errors import EngineError
from scheduler.wire.dispatcher import Job
from workers.body import Body, is_ids
from workers.engine import Engine
from workers.kv_mirror import Mirror

WAITING_MAX = 64
"Prompts that wait to be asked about; of more the oldest are let go."

log = structlog.get_logger()


class _Prompt(msgspec.Struct, frozen=True):
    job: Job
    body: Body


class Binder:
    """Asks for what the mirror cannot know by itself. `run` is its task."""

    def __init__(self, engine: Engine, mirror: Mirror) -> None:
        """Ask this engine, tell this mirror."""
        self._engine, self._mirror = engine, mirror
        self._waiting: deque[_Prompt] = deque(maxlen=WAITING_MAX)
        self._news = asyncio.Event()

    def computed(self, job: Job, body: Body) -> None:
        """The engine has this prompt in its cache."""
        if job.blocks and not is_ids(body.get("prompt")) and not self._mirror.knows(job.blocks):
            self._waiting.append(_Prompt(job, body))
            self._news.set()

    async def run(self) -> None:
        """Ask for ever."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                await self._ask(self._waiting.pop())  # the newest: the oldest may be gone

    async def _ask(self, prompt: _Prompt) -> None:
        job = prompt.job
        try:
            tokens = await self._engine.tokens(prompt.body)
        except EngineError as error:
            log.debug("not_tokenized", request_id=job.id, reason=str(error))
            return
        self._mirror.bind(job.blocks, tokens, prompt_tokens=job.prompt_tokens)
