"""Exit 0 when a role answers 200: python healthcheck [URL], else $HEALTH_URL, else its health page on port 9464.

The image has no curl; http.client, unlike urllib, asks no proxy for the way to this very container.
"""

import os
import sys
from http.client import HTTPConnection
from urllib.parse import urlsplit

TIMEOUT_S = 3.0
DEFAULT = "http://127.0.0.1:9464/healthz"


def main() -> int:
    """Ask once; the reason of a failure goes to stderr, where `docker inspect` shows it."""
    url = urlsplit(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("HEALTH_URL", DEFAULT))
    connection = HTTPConnection(url.hostname or "127.0.0.1", url.port or 80, timeout=TIMEOUT_S)
    try:
        connection.request("GET", url.path or "/")
        answer = connection.getresponse()
        said = answer.read(400).decode(errors="replace").strip()
    except OSError as error:
        sys.stderr.write(f"{url.geturl()}: {error}\n")
        return 1
    finally:
        connection.close()
    if answer.status != 200:
        sys.stderr.write(f"{url.geturl()}: {answer.status} {said}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
