"""A file from the web, bounded and all or nothing.

Bytes go to a temporary file beside the target, are checked there, and take the target's name in
one step: a cut connection never leaves half a file behind that looks like a whole one.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from scheduler.errors import HeadgateError

BYTES_MAX = 256 << 20
"The public traces that we name weigh 0.2 to 4 MB."
CHUNK_BYTES = 1 << 16
STALL_S = 30.0
"A server that says nothing for so long is gone."


class DownloadError(HeadgateError):
    """Nothing came, or not what was asked; the message names the address and the reason."""


class FileError(HeadgateError):
    """A file of this machine cannot be read or written; the message names it and the reason."""


def download(url: str, file: IO[bytes]) -> int:
    """Write what stands at the address to an open file; the number of bytes.

    Raises:
        DownloadError: offline, refused, too long, cut short, or no http address.
    """
    if not url.startswith(("http://", "https://")):
        raise DownloadError(f"address is {url!r}, wanted one that starts with http:// or https://")
    request = Request(url, headers={"User-Agent": "headgate"})  # noqa: S310  http and https only
    try:
        with urlopen(request, timeout=STALL_S) as answer:  # noqa: S310  http and https only
            said = answer.headers.get("Content-Length")
            size = _copied(answer, file, url, BYTES_MAX)
    except HTTPError as error:
        with error:
            raise DownloadError(f"{url} answered {error.code} {error.reason}") from None
    except (URLError, OSError, HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise DownloadError(
            f"cannot download {url}: {reason}; without the internet, name a copy with --url"
        ) from None
    if said is not None and said.isdigit() and size != int(said):
        raise DownloadError(f"{url} sent {size} bytes and had promised {said}")
    return size


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that becomes `path` when the block ends well, and nothing when it fails.

    A link stays one; a pipe or a device (`/dev/stdout`) is written as it comes.

    Raises:
        FileError: it cannot be written.
    """
    path = path.resolve()
    if path.exists() and not path.is_file() and not path.is_dir():
        try:
            with path.open("wb") as file:
                yield file
        except OSError as error:
            raise FileError(f"cannot write {str(path)!r}: {error.strerror}") from None
        return
    try:
        scratched = tempfile.NamedTemporaryFile(  # noqa: SIM115  closed below
            dir=path.parent, prefix=f".{path.name}.", delete=False
        )
    except OSError as error:
        raise FileError(f"cannot write {str(path)!r}: {error.strerror}") from None
    scratch = Path(scratched.name)
    try:
        with scratched:
            yield scratched.file
        scratch.chmod(0o644)  # a temporary file is its owner's only; a trace is anybody's
        scratch.replace(path)
    except OSError as error:
        raise FileError(f"cannot write {str(path)!r}: {error.strerror}") from None
    finally:
        scratch.unlink(missing_ok=True)


def _copied(answer: IO[bytes], file: IO[bytes], url: str, bytes_max: int) -> int:
    size = 0
    while chunk := answer.read(CHUNK_BYTES):
        size += len(chunk)
        if size > bytes_max:
            raise DownloadError(f"{url} is longer than the limit of {bytes_max} bytes")
        file.write(chunk)
    return size
