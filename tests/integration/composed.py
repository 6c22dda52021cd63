"""docker-compose.yml without Docker: each service's command and environment as a process of this machine.

1. `read` fills in the variables as Compose does.
2. Every port that a service declares gets a free one on loopback; `Composed.address` is the resolver.
3. In a service's words, other services' `host:port` and its own ports, paths and secrets become the local ones.
4. A process is started where the services it depends on are there, and all are ended with the block.

The image's part (entry point, environment) is read from deploy/Dockerfile.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

from dispatcher import binary

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
END_S = 20.0
"Longer than any role drains in a test."

VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<name>\w+):-(?P<default>[^{}]*)\}|(?P<wrong>.))")


def filled(value, environ):
    """The value with its variables; one without a default is an error here, though Compose would allow it."""
    if isinstance(value, dict):
        return {name: filled(part, environ) for name, part in value.items()}
    if isinstance(value, list):
        return [filled(part, environ) for part in value]
    if not isinstance(value, str):
        return value

    def said(match):
        assert not match["wrong"], f"{value!r}: wanted ${{NAME:-default}} or $$"
        return "$" if match["dollar"] else environ.get(match["name"]) or match["default"]

    return VARIABLE.sub(said, value)


def read(path=FILE, environ=None):
    """The Compose file as Compose would see it."""
    return filled(YAML(typ="safe", pure=True).load(path), environ or {})


def dockerfile(path=DOCKERFILE):
    """Instructions and arguments of a Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in whole.splitlines() if line.strip()]


def image():
    """The entry point, and the environment that every container of our image begins with."""
    found = dockerfile()
    entry = next(json.loads(rest) for word, rest in found if word == "ENTRYPOINT")
    pairs = [pair.split("=", 1) for word, rest in found if word == "ENV" for pair in rest.split()]
    return entry, dict(pairs)


def is_ours(service):
    return service["image"].startswith("headgate:")


def container_ports(service):
    """What it listens on, inside."""
    published = [entry.rpartition(":")[2] for entry in service.get("ports", ())]
    return {int(port) for port in [*service.get("expose", ()), *published]}


class Composed:
    """The file's Headgate services and its Redis, running here."""

    def __init__(self, directory, environ):
        self.file = read(environ=environ)
        self.directory = directory
        self.running = {}
        services = self.file["services"]
        self._ports = {
            (name, port): _free_port()
            for name, service in services.items()
            for port in container_ports(service)
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.down()

    def down(self):
        """Stop what runs, Redis last as Compose would, and kill what will not; the exit codes by service."""
        last = [name for name in self.running if name == "redis"]
        codes = self._stopped([name for name in self.running if name not in last])
        return codes | self._stopped(last)

    def _stopped(self, names):
        leaving = {name: self.running.pop(name) for name in names}
        for process in leaving.values():
            process.send_signal(signal.SIGTERM)
        for process in leaving.values():
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return {name: process.returncode for name, process in leaving.items()}

    def address(self, host, port):
        """Where a service's port is here; a KeyError where the file declares no such port."""
        return "127.0.0.1", self._ports[host, int(port)]

    def start(self, name):
        """Start a service; its output goes to a file that `said` reads."""
        words, environ = self.words(name)
        home = self.directory / name
        home.mkdir()
        with self._log(name).open("wb") as log:
            self.running[name] = subprocess.Popen(
                words, cwd=home, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def listens(self, name):
        """Whether all that it exposes can be connected to."""
        for port in container_ports(self.file["services"][name]):
            try:
                socket.create_connection(self.address(name, port), timeout=1).close()
            except OSError:
                return False
        return True

    def run(self, name, *words, **more):
        """`docker compose run NAME WORDS`: one command in a service's place."""
        command, environ = self.words(name, words)
        return subprocess.run(
            command,
            cwd=self.directory,
            env=environ | more,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def check(self, name):
        """The image's health check, run as Docker would run it."""
        _, environ = self.words(name)
        [words] = [rest for word, rest in dockerfile() if word == "HEALTHCHECK"]
        python, script = json.loads(words.partition("CMD")[2])
        assert (python, script) == ("python", "/usr/local/bin/healthcheck")
        source = ROOT / "deploy" / "healthcheck.py"
        inside = re.search(r'DEFAULT = "(.*)"', source.read_text())[1]
        environ.setdefault("HEALTH_URL", self._localised(inside, name))
        return subprocess.run(
            [sys.executable, source], env=environ, capture_output=True, text=True, check=False
        )

    def said(self, name):
        return self._log(name).read_text(errors="replace")

    def words(self, name, command=None):
        """Command and environment of a service, in this machine's terms."""
        service = self.file["services"][name]
        inside = list(command if command is not None else service["command"])
        environ = {"PATH": os.environ["PATH"]}
        if is_ours(service):
            entry, given = image()
            inside, environ = [*entry, *inside], environ | given
        environ |= service.get("environment", {})
        here = [self._localised(word, name) for word in inside]
        if name == "redis":
            here[0] = str(binary.find(os.environ))
            here += ["--port", str(self._ports[name, 6379]), "--bind", "127.0.0.1"]
        else:
            here[0] = program(here[0])
        return here, {key: self._localised(value, name) for key, value in environ.items()}

    def _localised(self, word, name):
        service = self.file["services"][name]
        owner = service.get("network_mode", "").removeprefix("service:") or name
        for inside, local in self._mounts(service).items():
            if word == inside or word.startswith(f"{inside}/"):
                return str(local) + word.removeprefix(inside)
        own = {
            str(port): str(local) for (host, port), local in self._ports.items() if host == owner
        }
        if word in own:
            return own[word]
        for (host, port), local in self._ports.items():
            pattern = rf"(?<![\w.-]){re.escape(host)}:{port}\b"
            word = re.sub(pattern, f"127.0.0.1:{local}", word)
        for port, local in own.items():
            word = re.sub(rf"(?<![\w.])127\.0\.0\.1:{port}\b", f"127.0.0.1:{local}", word)
        option, is_said, value = word.rpartition(
            "="
        )  # --host=NAME; a bare word may be a command's name
        if is_said and value in self.file["services"]:
            return f"{option}=127.0.0.1"
        return "127.0.0.1" if word == "0.0.0.0" else word

    def _mounts(self, service):
        """Path inside -> path here, of secrets and mounted files."""
        secrets = {
            f"/run/secrets/{secret}": self.secret(secret) for secret in service.get("secrets", ())
        }
        volumes = {}
        for volume in service.get("volumes", ()):
            source, target = volume.split(":")[:2]
            if source.startswith("."):
                volumes[target] = ROOT / source
        return secrets | volumes

    def secret(self, name):
        return ROOT / self.file["secrets"][name]["file"]

    def _log(self, name):
        return self.directory / f"{name}.log"


def program(word):
    beside = Path(sys.executable).with_name(word)
    found = str(beside) if beside.exists() else shutil.which(word)
    assert found, f"command {word!r} does not exist"
    return found


def _free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
