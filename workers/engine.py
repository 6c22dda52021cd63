"""The client of one vLLM over HTTP: post and stream, probe, and read its load."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
from msgspec import Meta

from dispatcher.streams.where import without_password
from scheduler.errors import UNREADABLE, EngineError, SettingsError
from scheduler.settings import EngineAddress
from workers.answer import REASON_CHARS, Answer, fault_in, refusal
from workers.body import Body, Post
from workers.parked import Parked
from workers.posts import ERROR_BYTES, Heard, Posts, Reply
from workers.scrape import Load, parse

SCRAPE_BYTES = 8 * 2**20
"The longest /metrics that is read; vLLM's is some 50 KB."


TOKENIZED = (
    *("model", "prompt", "messages", "tools", "add_special_tokens", "add_generation_prompt"),
    *("continue_final_message", "chat_template", "chat_template_kwargs"),
)
"What of a body makes its prompt."


CARDS_MAX = 4096
"Models and adapters of one engine; every beat names them."

PAUSED = "paused"
"Why an engine takes no work that a person has paused."


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Paused(msgspec.Struct):
    is_paused: bool


class Card(msgspec.Struct):
    """A model as /v1/models shows it."""

    id: Annotated[str, Meta(max_length=512)]
    max_model_len: Annotated[int, Meta(ge=0, le=10**8)] | None = None


class Cards(msgspec.Struct):
    data: Annotated[list[Card], Meta(max_length=CARDS_MAX)] = []


class Engine:
    """One engine at one URL. Every failure of its leaves as an `EngineError`."""

    def __init__(self, address: EngineAddress, *, connect_s: float) -> None:
        self._root = checked(address.url, address.name)
        self._headers = _authorization(address)
        self._probe_timeout = aiohttp.ClientTimeout(total=connect_s)
        # Silence of a stream is watched from outside: a timer a token would cost more than the token.
        self._posts = Posts(self._root, self._headers, connect_s=connect_s)
        self._session: aiohttp.ClientSession | None = None
        self._pauses = True

    async def open(self) -> None:
        """Make the connections' pool; inside the loop that will use it."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0),
            headers=self._headers,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        """Close every connection."""
        self._posts.close()
        if self._session is not None:
            await self._session.close()

    def begin(self, post: Post, answer: Answer, heard: Callable[[bool], None]) -> Reply | None:
        """Post now, before any other task has its turn; then wait for the `reply`. None: no connection is kept."""
        return self._posts.begin(post.path, post.data, post.headers, _feeding(answer, heard))

    async def reply(self, begun: Reply) -> None:
        """What was begun, to its end; as `ask`."""
        _check(await begun)

    async def ask(self, post: Post, answer: Answer, heard: Callable[[bool], None]) -> None:
        """Stream the engine's answer into `answer`; `heard` after every arrival, True where it brought tokens.

        Cancelling this closes the connection, which makes the engine give up the request.

        Raises:
            EngineError: refused, broken off, or not what it should be.
        """
        feed = _feeding(answer, heard)
        _check(await self._posts.send(post.path, post.data, post.headers, feed))

    async def prefill(self, post: Post, answer: Answer) -> bytes:
        """Have a prompt computed and its KV kept; where it is, for whoever decodes. `answer` is told what it cost.

        Cancelling this closes the connection, which makes the engine give up the request.

        Raises:
            EngineError: refused, broken off, or not what it should be.
        """
        parked = Parked()
        _check(await self._posts.send(post.path, post.data, post.headers, parked.feed))
        return parked.told(answer)

    async def probe(self) -> str:
        """Why the engine cannot serve now; empty where nothing speaks against it.

        /health alone lies: it answers 200 while the engine is paused or drains.
        """
        try:
            status, _ = await self._get("/health")
            if status != 200:
                return f"/health says {status}"
            if self._pauses:
                status, body = await self._get("/is_paused")
                is_paused = _is_paused(body) if status == 200 else None
                self._pauses = is_paused is not None  # a development endpoint; most engines lack it
                if is_paused:
                    return PAUSED
        except EngineError as error:
            return str(error)
        return ""

    async def models(self) -> list[Card]:
        """What it serves.

        Raises:
            EngineError: no answer, or none that can be read.
        """
        status, body = await self._get("/v1/models")
        if status != 200:
            raise EngineError(f"/v1/models says {status}", status=status)
        try:
            return msgspec.json.decode(body, type=Cards).data
        except UNREADABLE as error:
            raise EngineError(f"/v1/models cannot be read: {error}") from None

    async def load(self) -> Load:
        """What /metrics says, as far as it says it.

        Raises:
            EngineError: no answer.
        """
        status, body = await self._get("/metrics")
        return parse(body) if status == 200 else Load()

    async def try_one(self, model: str) -> str:
        """Let it make one token: the only proof that it can. Why it could not; empty on success."""
        try:
            await self.one_token(model)
        except EngineError as error:
            # An engine without a completions face has refused sanely; that must do.
            return "" if error.status in (400, 404, 405) else str(error)
        return ""

    async def one_token(self, model: str) -> Answer:
        """The smallest answer there is.

        Raises:
            EngineError: it did not come.
        """
        fields = {"model": model, "prompt": "1", "max_tokens": 1, "stream": True}
        fields["stream_options"] = {"include_usage": True}
        post = Post(
            "/v1/completions", msgspec.json.encode(fields), {"Content-Type": "application/json"}, 1
        )
        answer = Answer()
        try:
            async with asyncio.timeout(self._probe_timeout.total):
                await self.ask(post, answer, lambda _: None)
        except TimeoutError:
            raise EngineError(f"no token within {self._probe_timeout.total:g} s") from None
        answer.check()
        return answer

    async def tokens(self, body: Body) -> list[int]:
        """What the engine's tokenizer makes of a prompt.

        Raises:
            EngineError: it has no tokenizer, or will not take this prompt.
        """
        asked = {key: body[key] for key in TOKENIZED if key in body}
        try:
            async with self._http.post(
                self._root + "/tokenize",
                data=msgspec.json.encode(asked),
                headers={"Content-Type": "application/json"},
                timeout=self._probe_timeout,
            ) as response:
                found = await _read(response, SCRAPE_BYTES)
                if response.status != 200:
                    raise refusal(response.status, fault_in(found[:ERROR_BYTES]))
                return msgspec.json.decode(found, type=_Tokens).tokens
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _weather(error) from error
        except UNREADABLE as error:
            raise EngineError(f"/tokenize is no JSON of tokens: {error}") from None

    async def page(self, path: str) -> bytes:
        """What the engine shows there; empty where it has no such page.

        Raises:
            EngineError: no answer.
        """
        status, body = await self._get(path)
        return body if status == 200 else b""

    async def _get(self, path: str) -> tuple[int, bytes]:
        try:
            async with self._http.get(self._root + path, timeout=self._probe_timeout) as response:
                return response.status, await _read(response, SCRAPE_BYTES)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _weather(error) from error

    @property
    def _http(self) -> Any:
        assert self._session is not None, "the engine's client is not open"
        return self._session


def _is_paused(page: bytes) -> bool | None:
    """None: this is no such page. Some gateways show one of their own whatever they are asked for."""
    try:
        return msgspec.json.decode(page, type=_Paused).is_paused
    except UNREADABLE:
        return None


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    parts, size = [], 0
    async for data in response.content.iter_any():
        parts.append(data)
        size += len(data)
        if size > limit:
            raise EngineError(f"{response.url.path} is longer than {limit} bytes")
    return b"".join(parts)


def _check(reply: tuple[int, bytes]) -> None:
    status, error = reply
    if status != 200:
        raise refusal(status, fault_in(error))


def _feeding(answer: Answer, heard: Callable[[bool], None]) -> Heard:
    return lambda data: heard(answer.feed(data))


def _weather(error: BaseException) -> EngineError:
    if isinstance(error, TimeoutError):
        return EngineError("no answer in time")
    if isinstance(error, aiohttp.ClientPayloadError):
        return EngineError("the connection broke off in the middle of the answer")
    # A header's bytes that are no UTF-8 come as half characters, which neither a log nor a beat can hold.
    said = str(error).encode(errors="replace").decode()[:REASON_CHARS]
    return EngineError(f"connection: {said or type(error).__name__}")


def checked(url: str, name: str) -> str:
    """An engine's URL without a slash at its end.

    Raises:
        SettingsError: it is none.
    """
    wanted = "wanted http://host:port"
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise SettingsError(f"url of engine {name!r} is {url!r} ({error}), {wanted}") from None
    if not is_good:
        raise SettingsError(f"url of engine {name!r} is {without_password(url)!r}, {wanted}")
    return url.rstrip("/")


def _authorization(address: EngineAddress) -> dict[str, str]:
    if not address.api_key_file:
        return {}
    try:
        key = Path(address.api_key_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"api_key_file of engine {address.name!r} is {address.api_key_file!r}: {error}"
        ) from None
    return {"Authorization": f"Bearer {key}"}
