"""What arrives on an endpoint's stream: jobs, made ready to be served, and words to cancel one."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping

import msgspec
import structlog

from dispatcher.streams import sidecar
from dispatcher.streams.connection import Connection, Entry, Read
from dispatcher.streams.pages import whole
from dispatcher.streams.sidecar import Held
from scheduler import codec
from scheduler.errors import UNREADABLE, WireError
from scheduler.keys import WORKER_GROUP, Keys
from scheduler.wire.client import Control
from scheduler.wire.dispatcher import Job
from scheduler.wire.worker import Tokens
from workers.body import NOTHING, Written
from workers.halves import CLAIM

READ_MAX = 64
"Entries in one read."

BLOCK_S = 2.0
"How long a read waits on the server; only a bound, entries end it at once."

BEHIND_S = 0.1
"How far our idea of Redis' time may be ahead of it."

log = structlog.get_logger()


class _Identity(msgspec.Struct, frozen=True):
    """The least of a job that must be readable."""

    id: str
    entry: str
    attempt: int
    epoch: int


class Arrival(msgspec.Struct, frozen=True):
    """A job of ours, with its body and what earlier attempts wrote."""

    held: Held
    raw_body: bytes
    "Empty where its claim check has run out."
    written: Written = NOTHING
    trouble: str = ""
    "Why it goes back unserved: it cannot be read, and only its identity is there; or nobody knows any more where its KV is."
    cancelled: str | None = None
    "Why nobody wants it any more, as a word says that was read with it; None: nobody says so."


class Inbox:
    """One endpoint's stream, read as one consumer of the group `worker`."""

    def __init__(self, connection: Connection, keys: Keys, endpoint: str, consumer: str) -> None:
        self._connection, self._keys = connection, keys
        self._endpoint, self._consumer = endpoint, consumer
        self._stream = keys.jobs(endpoint)
        self._entries: list[Entry] = []
        "Read and not yet passed on: they stay here while Redis is away."
        self.read_at: float | None = None
        "Every job handed over before has been passed on; None: nothing can be said yet."
        self._seen_at: float | None = None
        "The same of those read, which may still be here."
        self._is_sure = False
        "Whether every reply in our name has come: not one to an earlier worker of this name, nor to a read that failed."
        self._has_more = False
        "At the last look more was given out in our name than we had."
        self._taking = asyncio.Lock()
        "Reader and adopter both take: an entry passed on twice runs twice, one dropped between them is never run."

    async def open(self) -> None:
        """Make the stream and its group, unless they exist."""
        await self._connection.ensure_group(self._stream, WORKER_GROUP)

    async def read(self, room: int, came: Callable[[], None] = lambda: None) -> None:
        """Wait for entries, at most `room` of them; first come those of replies that never came.

        `came` is called the moment there are new ones: a lonely one may be taken by `take_one`.
        """
        if self._entries:
            return
        if not self._is_sure:
            await self._read_again()
            if self._entries:
                return
        asked_at = self._connection.now()

        def put(read: Read) -> None:
            entries = read.get(self._stream, [])
            self._entries.extend(entries)
            self._seen_at = _moment(entries[-1][0]) if entries else asked_at - BEHIND_S
            if entries:
                came()

        self._is_sure = False
        await self._connection.read_group(
            WORKER_GROUP,
            self._consumer,
            [self._stream],
            count=min(room, READ_MAX),
            block_s=BLOCK_S,
            came=put,
        )
        self._is_sure = True

    async def _read_again(self) -> None:
        after = "0"
        while True:
            page = await self._connection.history(
                WORKER_GROUP, self._consumer, self._stream, after=after, count=READ_MAX
            )
            self._entries.extend(page)
            if len(page) < READ_MAX:
                break
            after = page[-1][0]
        self._is_sure = True

    async def adopt(self, in_hand: int) -> None:
        """Take over what was delivered to another worker of this endpoint, while we have so many jobs `in_hand`.

        A frozen predecessor still stands in line at the server and is handed the next entry, whoever it is for. Where it
        has our name, as a pod that is cut off may, that shows as more in our name than we have, at two looks.
        """
        summary = await self._connection.command("XPENDING", self._stream, WORKER_GROUP)
        given = {
            str(one["name"], "utf-8"): int(one["pending"]) for one in summary["consumers"] or ()
        }
        ours = given.pop(self._consumer, 0)
        had_more, self._has_more = self._has_more, ours > in_hand + len(self._entries)
        if not given and not (had_more and self._has_more):
            return
        start = "0-0"
        while True:
            start, entries = await self._connection.claim(
                self._stream, WORKER_GROUP, self._consumer, start=start, count=READ_MAX
            )
            self._entries.extend(entries)
            if start == "0-0":
                return

    async def take(
        self, epoch: int, cancel: Callable[[str, str], None], is_known: Callable[[Job], bool]
    ) -> list[Arrival]:
        """The jobs among what was read; words to cancel are passed to `cancel` as id and reason.

        Jobs of an older epoch were given back long ago and are only acknowledged. What a *newer* worker should
        have got, jobs and words, stays pending, where that worker finds it.
        """
        async with self._taking:
            read = len(self._entries)
            entries = dict(self._entries).items()  # what was adopted may have been read as well
            done, held, odd, unwanted = self._sorted(entries, epoch, cancel, is_known)
            arrivals = odd + await self._fetched(held, unwanted)
            await self._dismiss(epoch, done)
            del self._entries[:read]  # more may have come meanwhile
            if not self._entries:
                self.read_at = self._seen_at
        return arrivals

    def take_one(self, epoch: int, is_known: Callable[[Job], bool]) -> Arrival | None:
        """The one job that was read, where nothing of it must be fetched; None: `take` must look."""
        if self._taking.locked() or len(self._entries) != 1:
            return None
        [(entry, fields)] = self._entries
        try:
            job = codec.decode(Job, fields)
        except WireError:  # a word to cancel, perhaps
            return None
        is_checked = not job.body or job.kv_params == CLAIM
        if job.epoch != epoch or _is_resumed(job) or is_checked or is_known(job):
            return None
        self._entries.clear()
        self.read_at = self._seen_at
        return Arrival(Held(self._endpoint, job, entry), job.body)

    def _sorted(
        self,
        entries: Iterable[Entry],
        epoch: int,
        cancel: Callable[[str, str], None],
        is_known: Callable[[Job], bool],
    ) -> tuple[list[str], list[Held], list[Arrival], dict[str, str]]:
        """What is over with, the jobs that are ours, those that nobody can read, and why which of ours are not wanted."""
        done: list[str] = []
        held: list[Held] = []
        odd: list[Arrival] = []
        unwanted: dict[str, str] = {}
        for entry, fields in entries:
            if b"action" in fields:
                with contextlib.suppress(WireError):
                    control = codec.decode(Control, fields)
                    cancel(control.id, control.reason)
                    unwanted[control.id] = control.reason
                done.append(entry)
                continue
            try:
                job = codec.decode(Job, fields)
            except WireError as error:
                named = self._odd(entry, fields, str(error))
                odd.extend(named)
                done.extend([] if named else [entry])  # nobody's: no drain would ever end for it
                continue
            if job.epoch < epoch:
                done.append(entry)
            elif job.epoch == epoch and not is_known(job):
                held.append(Held(self._endpoint, job, entry))
                unwanted.pop(job.id, None)  # that was about what came before
        return done, held, odd, unwanted

    def _odd(self, entry: str, fields: dict[bytes, bytes], trouble: str) -> list[Arrival]:
        """A job that cannot be read: a dispatcher of another version wrote it. It goes back, if it can be named."""
        log.error("job_unreadable", endpoint=self._endpoint, entry=entry, reason=trouble)
        try:
            identity = codec.decode(_Identity, fields)
        except WireError:
            return []
        job = Job(
            id=identity.id,
            entry=identity.entry,
            attempt=identity.attempt,
            epoch=identity.epoch,
            model="",
            path="",
            enqueued_at=0.0,
            decided_at=0.0,
        )
        return [
            Arrival(Held(self._endpoint, job, entry), b"", trouble=f"unreadable job: {trouble}")
        ]

    async def _fetched(self, held: Iterable[Held], unwanted: Mapping[str, str]) -> list[Arrival]:
        jobs = list(held)
        claims = [self._keys.body(one.job.id) for one in jobs if not one.job.body]
        claims += [self._keys.kv(one.job.id) for one in jobs if one.job.kv_params == CLAIM]
        resumed = [self._keys.request(one.job.id) for one in jobs if _is_resumed(one.job)]
        told = await self._connection.commands(
            [*(("GET", key) for key in claims), *(("HGET", key, "tokens") for key in resumed)]
        )
        found = dict(zip([*claims, *resumed], told, strict=True))
        arrivals = []
        for one in jobs:
            job = one.job
            pieces = int(found.get(self._keys.request(job.id)) or 0)
            written = await self._written(one, pieces) if pieces else NOTHING
            raw = job.body or found[self._keys.body(job.id)] or b""
            trouble = ""
            if job.kv_params == CLAIM:
                kv_params = found[self._keys.kv(job.id)] or b""
                trouble = "" if kv_params else "where its KV is: the claim check has run out"
                job = msgspec.structs.replace(job, kv_params=kv_params)
            ours = Held(one.endpoint, job, one.job_entry)
            arrivals.append(Arrival(ours, raw, written, trouble, unwanted.get(job.id)))
        return arrivals

    async def _written(self, held: Held, pieces: int) -> Written:
        """What earlier attempts left in the token log, so many pieces; all of them are fenced, so it stands still.

        Of a log with a hole nothing: it is emptied, and this attempt begins it anew.
        """
        entries = await whole(self._connection, self._keys.tokens(held.job.id))
        parts = codec.readable(Tokens, entries)
        if len(parts) == len(entries) and _is_whole(parts):
            return _joined(parts, pieces, first_at=_moment(entries[0][0]))
        call = sidecar.rewind(self._keys, held)
        await self._connection.call(call.function, call.keys, call.args)
        log.warning(
            "begun_anew",
            request_id=held.job.id,
            endpoint=self._endpoint,
            attempt=held.job.attempt,
            reason=f"redis has lost some of the {pieces} pieces that were written",
        )
        return NOTHING

    async def _dismiss(self, epoch: int, entries: list[str]) -> None:
        if not entries:
            return
        call = sidecar.dismiss(self._keys, self._endpoint, epoch, entries)
        if await self._connection.call(call.function, call.keys, call.args) == 0:
            # They stay pending, and are ours again should Redis only have forgotten us.
            self._is_sure = False


def _is_resumed(job: Job) -> bool:
    """Whether earlier attempts may have written to its token log."""
    return job.stream and job.attempt > 1


def _moment(entry: str) -> float:
    """When an entry was written, by Redis' clock."""
    return int(entry.partition("-")[0]) / 1e3


def _is_whole(parts: list[Tokens]) -> bool:
    """Whether they begin where the answer does, and Redis has lost nothing between them."""
    return bool(parts) and parts[0].index == 0 and not any(part.lost for part in parts)


def _joined(parts: list[Tokens], pieces: int, *, first_at: float) -> Written:
    ids: list[int] = []
    is_known = True
    for part in parts:
        found = _ids(part.chunks) if part.chunks else []
        is_known = is_known and bool(found)
        ids.extend(found)
    return Written(
        text="".join(part.text for part in parts),
        pieces=pieces,
        output_tokens=max((part.output_tokens for part in parts), default=0),
        first_token_at=first_at,
        ids=tuple(ids) if is_known else (),
        is_plain=not any(part.chunks for part in parts),
    )


class _Ids(msgspec.Struct):
    token_ids: list[int] = []


class _IdChunk(msgspec.Struct):
    choices: list[_Ids] = []


def _ids(chunks: str) -> list[int]:
    try:
        parsed = msgspec.json.decode(chunks, type=list[_IdChunk])
    except UNREADABLE:
        return []
    return [number for chunk in parsed for choice in chunk.choices for number in choice.token_ids]
