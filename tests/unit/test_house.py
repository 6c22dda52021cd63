"""The house's own rules hold, and the tools that guard them would notice if they did not."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("scheduler", "dispatcher", "workers")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRACTS = [contract["name"] for contract in PYPROJECT["tool"]["importlinter"]["contracts"]]
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

VIOLATIONS = [
    ("scheduler/new.py", "import dispatcher.local", {"floors"}),
    ("dispatcher/new.py", "import workers", {"floors"}),
    ("scheduler/new.py", "import time", {"core"}),
    ("scheduler/new.py", "from asyncio import sleep", {"core"}),
    ("scheduler/new.py", "import random", {"core"}),
    ("scheduler/sim/new.py", "import datetime", {"core"}),
    ("scheduler/sim/new.py", "def later():\n    import socket", {"core"}),
    ("workers/new.py", "import dispatcher.new", {"Workers"}),
    ("workers/new.py", "from dispatcher import given", {"Workers"}),
    ("dispatcher/new.py", "from redis.asyncio import Redis", {"redis"}),
    ("workers/new.py", "import redis", {"redis"}),
    ("scheduler/new.py", "import redis", {"core", "redis"}),
    ("scheduler/new.py", "from river import linear_model", {"river"}),
    ("dispatcher/new.py", "import river", {"river"}),
]
"File, what it then says, and a word of each contract that this breaks."

ALLOWED = [
    ("workers/new.py", "import dispatcher.streams\nimport scheduler.wire"),
    ("dispatcher/streams/new.py", "import redis"),
    ("scheduler/regression.py", "import river"),
]

REGISTRY = re.compile(r"pypi\.org|pythonhosted|files\.python|--(extra-)?index-url|find-links")
MACHINE_PATH = re.compile(r"(?<![\w.$~}/-])/(home|root|work|Users)/[\w.]")


@pytest.fixture
def house(tmp_path):
    """A copy of the packages and their contracts, to break."""
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "dispatcher" / "new.py").touch()
    return tmp_path


def lint(house):
    """What lint-imports says of this copy, and not of the installed packages."""
    ran = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=house,
        env=os.environ | {"PYTHONPATH": str(house), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.returncode, set(re.findall(r"^(.+) BROKEN", ran.stdout, re.MULTILINE)), ran.stdout


class TestContracts:
    @pytest.mark.parametrize(("file", "text", "broken"), VIOLATIONS)
    def test_a_planted_violation_is_caught(self, house, file, text, broken):
        """In a module that no contract names, so that new code is guarded too; and nothing else breaks."""
        (house / file).write_text(text + "\n")

        code, found, said = lint(house)

        assert code == 1
        assert found == {name for name in CONTRACTS if any(word in name for word in broken)}, said

    def test_every_contract_has_a_violation(self):
        """A contract that was never seen to fail guards nothing."""
        words = set().union(*(broken for _, _, broken in VIOLATIONS))

        assert all(any(word in name for word in words) for name in CONTRACTS)

    def test_what_is_allowed_passes(self, house):
        """The one door of each contract is open."""
        for file, text in ALLOWED:
            (house / file).write_text(text + "\n")

        code, _, said = lint(house)

        assert code == 0, said


def ours():
    """Every text file of the project that people wrote."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name == ".ci" or name[0] not in "._"]
        for name in names:
            path = Path(folder, name)
            if path.suffix in {".py", ".md", ".toml", ".yml", ".yaml", ".lua", ".sh", ".json", ""}:
                yield path


class TestFiles:
    def test_nothing_names_a_registry_or_a_path_of_one_machine(self):
        """Where packages come from is the installer's own business; our paths are relative."""
        found = [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            for path in ours()
            if path != Path(__file__)
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
            if REGISTRY.search(line) or MACHINE_PATH.search(line)
        ]

        assert found == []

    @pytest.mark.parametrize(
        "line", ["pip install --index-url x", "cd /home/me/headgate", "see /Users/x"]
    )
    def test_such_a_line_would_be_seen(self, line):
        """The patterns match what they are for."""
        assert REGISTRY.search(line) or MACHINE_PATH.search(line)

    def test_no_two_test_files_share_a_name(self):
        """Pytest takes a file for the other of its name, and collects neither."""
        names = [
            path.name for path in (ROOT / "tests").rglob("test_*.py") if "vllm" not in path.parts
        ]
        assert len(names) == len(set(names)), sorted(n for n in set(names) if names.count(n) > 1)

    def test_every_module_says_what_it_is(self):
        """The first thing in a module is a docstring."""
        silent = [
            str(path.relative_to(ROOT))
            for path in MODULES
            if not ast.get_docstring(ast.parse(path.read_text()))
        ]

        assert silent == []

    def test_every_package_ships_its_types(self):
        """py.typed, so that mypy believes us in our users' code."""
        assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)
