"""Certificates of an authority of our own, made with openssl."""

import subprocess
from pathlib import Path

NEW = "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -x509 -days 2"


class Authority:
    """`ca_file` is what one trusts who trusts it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.ca_file, self._key = self._made("ca", "-subj", "/CN=our own authority")

    def issue(self, name: str) -> tuple[Path, Path]:
        """A certificate for this machine, good for servers and clients, and its key."""
        signed = ("-CA", self.ca_file, "-CAkey", self._key)
        alternative = ("-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost")
        plain = ("-addext", "basicConstraints=critical,CA:FALSE")
        return self._made(name, "-subj", f"/CN={name}", *signed, *alternative, *plain)

    def _made(self, name: str, *more: object) -> tuple[Path, Path]:
        crt, key = (self._directory / f"{name}.{kind}" for kind in ("crt", "key"))
        words = [*NEW.split(), *map(str, more), "-keyout", str(key), "-out", str(crt)]
        subprocess.run(words, check=True, capture_output=True)
        return crt, key
