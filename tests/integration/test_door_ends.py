"""The door against servers' parts played by the test: every way to end, and what no healthy system shows."""

import asyncio
import contextlib
import json
import shutil
import ssl
from functools import partial

import aiohttp
import openai
import pytest
from certificates import Authority
from hand import until
from played import ENDPOINT, Played

from dispatcher.client import Client
from dispatcher.door.answer import STILL_HERE
from dispatcher.door.keyring import Keyring
from dispatcher.door.server import Door
from dispatcher.local import Server
from dispatcher.streams import dispatch, sidecar
from scheduler.errors import SettingsError
from scheduler.settings import DoorSettings, LeaseSettings, LimitSettings, RedisSettings, Settings
from scheduler.wire.worker import Beat

COMPLETIONS = "/v1/completions"

WHOLE = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"
"A head, and a request."

HOLD = {"x-headgate-tenant": "hold"}
"Assigned, and kept until the test ends it."


class Front:
    """A door in this process, the parts behind it, and who knocks."""

    def __init__(self, url, session, played, client):
        self.url, self.session, self.played, self.client = url, session, played, client

    def post(self, said=None, **body):
        asked = {"model": "llama", "prompt": "one two three"} | body
        return self.session.post(self.url + COMPLETIONS, json=asked, headers=said)

    async def refused(self, **more):
        """Status, reason, time to come back and message."""
        async with self.post(**more) as answer:
            error = (await answer.json())["error"]
            assert error["code"] == answer.status
            headers = answer.headers
            return (
                answer.status,
                headers["x-headgate-reason"],
                headers.get("Retry-After"),
                error["message"],
            )

    async def figure(self, name):
        async with self.session.get(f"{self.url}/metrics") as page:
            lines = (await page.text()).splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


async def beat(played, **more):
    """The played endpoint says that it lives."""
    do, keys = played.do, played.keys
    if not await played.connection.command("EXISTS", keys.endpoint(ENDPOINT)):
        await do(sidecar.join(keys, ENDPOINT, "w"))
    epoch = int(await played.connection.command("HGET", keys.endpoint(ENDPOINT), "epoch"))
    said = Beat(**({"endpoint": ENDPOINT, "epoch": epoch, "models": ("llama",)} | more))
    await do(sidecar.beat(keys, said, lease_s=60))


@contextlib.asynccontextmanager
async def opened(url, pool, *, keys=None, limits=None, is_alive=True, is_running=True, **door):
    """A front whose endpoint has beaten once and is believed for a minute."""
    settings = Settings(
        pool=pool,
        redis=RedisSettings(url=url),
        limits=limits or LimitSettings(),
        lease=LeaseSettings(worker_s=60),
        door=DoorSettings(**({"port": 0, "drain_s": 0} | door)),
    )
    played = await Played.start(url, pool)
    if is_alive:
        await beat(played)
    running = asyncio.create_task(played.run() if is_running else asyncio.Event().wait())
    try:
        async with (
            Client.from_settings(settings) as client,
            Door(client, settings, Keyring(keys or {})).served() as port,
            aiohttp.ClientSession() as session,
        ):
            yield Front(f"http://127.0.0.1:{port}", session, played, client)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await played.close()


@pytest.fixture
async def front(redis_url, pool):
    async with opened(redis_url, pool) as one:
        yield one


async def says(front, status):
    async with front.post() as answer:
        return answer.status == status


async def is_unready(front):
    async with front.session.get(f"{front.url}/readyz") as ready:
        return ready.status == 503


class TestEnds:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_failed(self, front, stream):
        """502: the engines could not; nothing was said yet, so the status still tells."""
        front.played.finish = partial(front.played.finish, pieces=0)  # no words first

        found = await front.refused(said={"x-headgate-tenant": "fail"}, stream=stream)

        assert found == (502, "failed", None, "as the test wants")

    @pytest.mark.parametrize(
        ("outcome", "expected"),
        [
            ("cancelled", (499, "cancelled", None, "as the test wants")),
            ("expired", (504, "expired", None, "as the test wants")),
            ("rejected", (429, "rejected", "1", "as the test wants")),
            ("invalid", (400, "invalid", None, "as the test wants")),
        ],
    )
    async def test_every_other_end(self, front, outcome, expected):
        """Its status, its word, and for the contended when to come back."""
        asking = asyncio.create_task(front.refused(said=HOLD))
        await front.played.holds(1)

        await front.played.finish(front.played.held[0], outcome)

        assert await asking == expected

    async def test_an_end_in_mid_stream_is_a_chunk(self, front):
        """After the first word the status is spent; the words stay, the error follows, then [DONE]."""
        asking = asyncio.ensure_future(front.post(said=HOLD, stream=True))
        await front.played.holds(1)
        await front.played.say(front.played.held[0], 0, "one ")
        answer = await asking
        assert b'"one "' in await answer.content.readuntil(b"\n\n")

        await front.played.finish(front.played.held[0], "failed", pieces=1)
        rest = (await answer.content.read()).decode().split("\n\n")

        assert json.loads(rest[0][6:])["error"]["type"] == "BadGatewayError"
        assert rest[1:] == ["data: [DONE]", ""]
        assert await front.figure("headgate_door_streams_broken_total") == 1

    async def test_nobody_to_serve_it(self, redis_url, pool):
        """503 while no endpoint lives; 404 only where others serve other models; who has beaten is found at once."""
        async with opened(redis_url, pool, is_alive=False) as front:
            assert (await front.refused())[:3] == (503, "no_endpoint", "1")

            await beat(front.played, models=("other",))
            assert (await front.refused())[:2] == (404, "unknown_model")

            await beat(front.played)
            assert await says(front, 200)

            await beat(front.played, state="draining")
            await until(lambda: says(front, 503))

    async def test_health_is_whether_anybody_would_serve_it(self, redis_url, pool):
        """Ready is a door that takes requests in; healthy one whose pool has a leader and an endpoint."""
        async with opened(redis_url, pool, is_alive=False) as front:
            do, keys = front.played.do, front.played.keys

            async def health():
                async with front.session.get(f"{front.url}/health") as answer:
                    return answer.status, (await answer.text()).strip()

            async def becomes(*wanted):
                async def found():
                    return await health() == wanted

                return await until(found)

            assert await becomes(503, "no endpoint takes work")
            await beat(front.played)
            assert await becomes(200, "ok")
            await front.played.connection.command("HSET", keys.leader, "until", "1")
            assert await becomes(503, "nobody leads the pool")
            assert not await is_unready(front)
            await do(dispatch.lead(keys, "other", ttl_s=60))
            assert await becomes(200, "ok")

    async def test_the_queue_is_full(self, redis_url, pool):
        """429 with a time to come back, and nothing is enqueued."""
        limits = LimitSettings(waiting_max=1)
        async with opened(redis_url, pool, limits=limits, is_running=False) as front:
            waiting = asyncio.create_task(front.refused())
            await until(lambda: front.client.connection.command("ZCARD", front.client.keys.waiting))

            assert (await front.refused())[:3] == (429, "queue_full", "1")
            waiting.cancel()

    async def test_the_door_is_full(self, redis_url, pool):
        """503: bounded, whatever the pool could take."""
        async with opened(redis_url, pool, open_max=1) as front:
            waiting = asyncio.create_task(front.refused(said=HOLD))
            await front.played.holds(1)

            assert (await front.refused())[:3] == (503, "door_full", "1")
            waiting.cancel()

    async def test_redis_is_away(self, tmp_path, pool):
        """503 and not ready; back again when it is."""
        with Server(directory=tmp_path) as server:
            async with opened(server.url, pool, is_running=False) as front:
                server.stop()
                found = await front.refused()
                await until(lambda: is_unready(front))
                server.start()

        assert found[:3] == (503, "redis_away", "1")

    async def test_redis_has_lost_it(self, front):
        """503 where nothing was said yet, a chunk after the first word: nobody waits for what will not come."""
        asked = [
            asyncio.ensure_future(front.post(said=HOLD | {"x-request-id": name}, stream=is_stream))
            for name, is_stream in (("whole", False), ("mute", True), ("begun", True))
        ]
        await front.played.holds(3)
        held = {one.job.id: one for one in front.played.held}
        await front.played.say(held["begun"], 0, "one ")
        begun = await asked[2]

        command = front.played.connection.command
        await command("DEL", *map(front.played.keys.request, held))
        await command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

        async with asyncio.timeout(20):
            for answer in [await one for one in asked[:2]]:
                assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
                assert "has lost request" in await answer.text()
            events = (await begun.text()).split("\n\n")
        assert json.loads(events[1][6:])["error"]["code"] == 503
        assert events[2:] == ["data: [DONE]", ""]

    async def test_too_large_and_too_slow(self, redis_url, pool):
        """413 past the limit; 408 for who never finishes the sentence."""
        limits = LimitSettings(body_bytes=4096)
        async with opened(redis_url, pool, limits=limits, read_s=0.05) as front:
            assert (await front.refused(prompt="x" * 5000))[:2] == (413, "too_large")

            reader, writer = await asyncio.open_connection("127.0.0.1", int(front.url[-5:]))
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 99\r\n\r\n{")
            assert b" 408 " in await reader.readline()
            writer.close()
            await writer.wait_closed()

    @pytest.mark.parametrize(
        "said", [b"", b"GET /healthz HTT", WHOLE + b"GET /healthz HTTP/1.1\r\n"]
    )
    async def test_half_a_head_holds_no_connection(self, redis_url, pool, said):
        """Who says nothing, or half of it, at first or later, is cut off; who has said it all may be idle."""
        async with (
            asyncio.timeout(20),
            opened(redis_url, pool, read_s=0.2) as front,
        ):
            port = int(front.url.rpartition(":")[2])
            idle, idler = await asyncio.open_connection("127.0.0.1", port)
            idler.write(WHOLE)
            await idle.readuntil(b"ok\n")
            reader, writer = await asyncio.open_connection("127.0.0.1", port)

            writer.write(said[: len(WHOLE)])
            if said.startswith(WHOLE):
                await reader.readuntil(b"ok\n")
                writer.write(said[len(WHOLE) :])

            assert await reader.read() == b""
            idler.write(WHOLE)
            assert b" 200 " in await idle.readline()
            for one in (writer, idler):
                one.close()
                await one.wait_closed()

    async def test_what_is_not_served_says_what_is(self, front):
        """405 names the methods that are, as HTTP wants it; and no such path has none."""
        for method, path, allowed in (
            ("GET", COMPLETIONS, "POST"),
            ("OPTIONS", "/v1/models", "GET,HEAD"),
            ("GET", "/nowhere", None),
        ):
            async with front.session.request(method, front.url + path) as answer:
                assert answer.status == (405 if allowed else 404)
                assert answer.headers.get("Allow") == allowed


class TestSilence:
    """Who waits in the queue for long is shown signs of life, which no client takes for words."""

    @pytest.fixture
    async def patient(self, redis_url, pool):
        async with opened(redis_url, pool, keepalive_s=0.02) as one:
            yield one

    async def answer(self, front):
        """The request that is held says its words and ends."""
        [held] = front.played.held
        for index, word in enumerate(("one ", "two ")):
            await front.played.say(held, index, word)
        await front.played.finish(held, pieces=2)

    async def test_comments_before_the_words_and_between_them(self, patient):
        """The status comes with the first comment; after the words only [DONE]."""
        async with patient.post(said=HOLD, stream=True) as response:
            assert (response.status, await response.content.readuntil(b"\n\n")) == (200, STILL_HERE)
            await patient.played.holds(1)
            await patient.played.say(patient.played.held[0], 0, "one ")
            while b'"one "' not in await response.content.readuntil(b"\n\n"):
                pass
            assert await response.content.readuntil(b"\n\n") == STILL_HERE
            await patient.played.finish(patient.played.held[0], pieces=1)
            rest = (await response.content.read()).split(b"\n\n")

        assert rest[-2:] == [b"data: [DONE]", b""]

    async def test_a_refusal_after_them_is_a_chunk(self, patient):
        """The status is spent; the reason is not lost."""
        async with patient.post(said=HOLD, stream=True) as response:
            await response.content.readuntil(b"\n\n")
            await patient.played.holds(1)
            await patient.played.finish(patient.played.held[0], "expired", pieces=0)
            events = (await response.content.read()).split(b"\n\n")

        error, done, _ = [event for event in events if event + b"\n\n" != STILL_HERE]
        assert json.loads(error[6:])["error"]["type"] == "GatewayTimeoutError"
        assert done == b"data: [DONE]"

    @pytest.mark.parametrize("is_async", [True, False])
    async def test_the_official_client_drops_them(self, patient, is_async):
        """Nothing but the words comes out of it."""
        kind = openai.AsyncOpenAI if is_async else openai.OpenAI
        ai = kind(base_url=f"{patient.url}/v1", api_key="none", max_retries=0)
        asked = {"model": "llama", "prompt": "x", "stream": True, "extra_headers": HOLD}
        if is_async:
            stream = await ai.completions.create(**asked)  # the first comment brings the status
            await patient.played.holds(1)
            await self.answer(patient)
            said = [chunk.choices[0].text async for chunk in stream]
            await ai.close()
        else:
            stream = await asyncio.to_thread(ai.completions.create, **asked)
            await patient.played.holds(1)
            await self.answer(patient)
            said = await asyncio.to_thread(lambda: [chunk.choices[0].text for chunk in stream])
            ai.close()

        assert said == ["one ", "two ", ""]

    @pytest.mark.skipif(not shutil.which("curl"), reason="no curl here")
    async def test_curl_shows_them(self, patient):
        """They come at once, through its own buffers."""
        asked = json.dumps({"model": "llama", "prompt": "x", "stream": True})
        curl = await asyncio.create_subprocess_exec(
            *("curl", "--silent", "--no-buffer", "--noproxy", "*", "--data", asked),
            *("--header", "x-headgate-tenant: hold", patient.url + COMPLETIONS),
            stdout=asyncio.subprocess.PIPE,
        )
        assert await curl.stdout.readuntil(b"\n\n") == STILL_HERE
        await patient.played.holds(1)
        await self.answer(patient)
        rest = await curl.stdout.read()

        assert await curl.wait() == 0
        assert rest.endswith(b"data: [DONE]\n\n")


class TestLeaving:
    async def test_the_last_one_takes_it_along(self, front):
        """Two wait for one request: it lives as long as either does."""
        named = HOLD | {"x-request-id": "r"}
        one, two = (asyncio.create_task(front.refused(said=named)) for _ in range(2))
        await front.played.holds(1)
        await until(lambda: front.figure("headgate_door_open_requests 2"))

        one.cancel()
        await until(lambda: front.figure("headgate_door_open_requests 1"))
        assert not (await front.client.status("r")).is_cancelled
        two.cancel()

        await until(lambda: is_cancelled(front, "r"))
        assert await front.figure("headgate_door_disconnects_total") == 1

    async def test_who_takes_nothing_is_cut_off(self, redis_url, pool):
        """A reader that stands still holds neither memory nor the request for ever."""
        async with opened(redis_url, pool, write_s=0.1) as front:
            _, writer = await asyncio.open_connection("127.0.0.1", int(front.url[-5:]), limit=1)
            body = json.dumps({"model": "llama", "prompt": "x", "stream": True}).encode()
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n"
            writer.write(
                head.encode() + b"x-headgate-tenant: hold\r\nx-request-id: r\r\n\r\n" + body
            )
            await front.played.holds(1)

            for index in range(40):
                await front.played.say(front.played.held[0], index, "x" * 500_000)

            await until(lambda: is_cancelled(front, "r"))
            writer.transport.abort()

    async def test_the_end_of_the_door_is_a_disconnect(self, redis_url, pool):
        """What is open past `drain_s` is cancelled before the process ends."""
        async with opened(redis_url, pool) as front:
            asking = asyncio.create_task(front.refused(said=HOLD | {"x-request-id": "r"}))
            await front.played.holds(1)
            keys = front.client.keys

        played = await Played.start(redis_url, pool)
        assert await played.connection.command("HGET", keys.request("r"), "cancelled") == b"1"
        await played.close()
        with pytest.raises(aiohttp.ClientError):
            await asking


async def is_cancelled(front, request_id):
    return (await front.client.status(request_id)).is_cancelled


class TestWhoComesIn:
    async def test_a_key_is_a_tenant(self, redis_url, pool):
        """Without one 401; with one its tenant counts, whatever the header says, and names are its own."""
        async with opened(redis_url, pool, keys={"sk-1": "team-a"}) as front:
            assert (await front.refused())[:2] == (401, "unauthorized")
            said = {
                "Authorization": "Bearer sk-1",
                "x-request-id": "r",
                "x-headgate-tenant": "fail",
            }
            async with front.post(said=said) as answer:
                assert answer.status == 200
                assert answer.headers["x-request-id"] == "r"
                assert answer.headers["x-headgate-request"] == "team-a:r"

            [(_, fields)] = await front.client.connection.entries(front.client.keys.requests)
            async with front.session.get(f"{front.url}/healthz") as healthz:
                assert healthz.status == 200  # probes have no key

        assert fields[b"tenant"] == b"team-a"

    async def test_a_proxy_reads_no_tenants_answer(self, redis_url, pool):
        """Its key names nobody, and the ids that its users say reach no name of a tenant that has a key."""
        async with opened(redis_url, pool, keys={"sk-1": "team-a", "sk-2": ""}) as front:
            own = {"Authorization": "Bearer sk-1", "x-request-id": "r"}
            async with front.post(said=own) as answer:
                assert answer.headers["x-headgate-request"] == "team-a:r"
            guessed = {"Authorization": "Bearer sk-2", "x-request-id": "team-a:r"}

            assert (await front.refused(said=guessed))[:2] == (400, "invalid")

    async def test_every_wish_is_in_the_entry(self, front):
        """Headers become the stream's own fields, and the body is what the client sent, byte by byte."""
        body = b'{ "model":"llama",  "prompt":"one" , "seed": 1e0}'
        said = {
            "x-llm-d-inference-objective": "chat",
            "x-llm-d-slo-ttft-ms": "500",
            "x-llm-d-inference-ttl": "2s",
            "x-session-id": "s",
            "x-headgate-deadline-ms": "9000",
            "traceparent": "00-1-1-00",
        }
        async with front.session.post(front.url + COMPLETIONS, data=body, headers=said) as answer:
            assert answer.status == 200

        [(_, fields)] = await front.client.connection.entries(front.client.keys.requests)
        wanted = {
            "body": body,
            "path": b"/v1/completions",
            "objective": b"chat",
            "ttft_ms": b"500",
            "max_queue_ms": b"2000",
            "session": b"s",
            "deadline_ms": b"9000",
            "traceparent": b"00-1-1-00",
        }
        assert {name: fields[name.encode()] for name in wanted} == wanted

    async def test_tls(self, redis_url, pool, tmp_path):
        """With a certificate it speaks HTTPS and nothing else; one file of the two stops the start."""
        if not shutil.which("openssl"):
            pytest.skip("no openssl here to make a certificate with")
        authority = Authority(tmp_path)
        crt, key = authority.issue("door")
        door = {"tls_cert_file": str(crt), "tls_key_file": str(key)}
        async with opened(redis_url, pool, **door) as front:
            trust = ssl.create_default_context(cafile=authority.ca_file)
            url = front.url.replace("http:", "https:")
            async with front.session.get(f"{url}/v1/models", ssl=trust) as answer:
                assert answer.status == 200
            with pytest.raises(aiohttp.ClientError):
                await front.session.get(f"{front.url}/v1/models")

        with pytest.raises(ValueError, match="wanted both or none"):
            DoorSettings(tls_cert_file="cert")
        with pytest.raises(SettingsError, match="wanted a certificate and its key"):
            async with opened(redis_url, pool, tls_cert_file="no", tls_key_file="no"):
                pass

    async def test_a_port_that_is_taken(self, redis_url, pool, front):
        """The operator is told which."""
        port = int(front.url[-5:])
        with pytest.raises(SettingsError, match=f"door.port is {port} on 127.0.0.1"):
            async with opened(redis_url, pool, port=port):
                pass
