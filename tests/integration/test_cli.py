"""The command line as a person meets it: quick help, results on stdout, one line for a mistake."""

import os
import pty
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import typer

from dispatcher.cli import root
from dispatcher.cli.outline import outline
from dispatcher.cli.redis import dressed, in_json
from dispatcher.resp import Connection, Failure, Status
from scheduler.errors import StreamError
from scheduler.settings import Settings

HEADGATE = Path(sys.executable).with_name("headgate")


def headgate(*words, stdin="", **environ):
    """Run the installed command to its end."""
    return subprocess.run(
        [HEADGATE, *words],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "COLUMNS": "100"} | environ,
    )


class TestHelp:
    def test_help_names_every_command_and_imports_nothing_heavy(self):
        """Help is quick because nothing is imported for it but the table of commands."""
        code = (
            "import sys; from dispatcher.cli.root import main; sys.argv = ['headgate', '--help']\n"
            "try: main()\n"
            "except SystemExit as end: assert not end.code\n"
            "print(*(sys.modules.keys() & {'river', 'numpy', 'aiohttp', 'redis'}), file=sys.stderr)"
        )

        ran = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )

        assert all(f" {name} " in ran.stdout for name in root.COMMANDS)
        loaded = ran.stderr.split()
        assert not {"river", "numpy", "aiohttp", "redis"} & set(loaded)

    def test_every_option_explains_itself(self):
        """What it is, in which unit; a name alone leaves a newcomer guessing."""
        floors = [
            name
            for entry in entry_points(group="headgate.commands")
            for name in outline(entry.module, entry.attr)
        ]
        application = typer.main.get_command(root.root([*root.COMMANDS, *floors]))

        def silent(command, path):
            mute = [p for p in command.params if not getattr(p, "help", None)]
            return [f"{path} {p.name}" for p in mute] + [
                one
                for name, inner in getattr(command, "commands", {}).items()
                for one in silent(inner, f"{path} {name}")
            ]

        assert silent(application, "headgate") == []

    def test_other_floors_are_read_not_imported(self, tmp_path, monkeypatch):
        """A module that cannot even be imported is still told apart, named and explained."""
        (tmp_path / "broken_floor.py").write_text(
            "raise RuntimeError\napp = typer.Typer()\nother = typer.Typer()\n"
            "@app.command()\nasync def run_it(x: int) -> None:\n    '''Run it.\n\n    At length.\n    '''\n"
            "@app.command('short')\ndef long(): ...\n"
            "@other.command()\ndef hidden(): ...\n"
            "app.add_typer(other, name='group', help='Of more.')\n"
        )
        monkeypatch.syspath_prepend(tmp_path)

        assert outline("broken_floor", "app") == {
            "run-it": "Run it.",
            "short": "",
            "group": "Of more.",
        }

    @pytest.mark.parametrize("name", root.COMMANDS)
    def test_the_table_says_what_the_command_says(self, name):
        """The line of help in the table is the first line of the command's own."""
        app = root.root([name])

        commands = app.registered_commands
        said = {c.name or c.callback.__name__: c.callback.__doc__ for c in commands}
        said |= {
            g.typer_instance.info.name: g.typer_instance.info.help for g in app.registered_groups
        }

        assert said[name].splitlines()[0] == root.COMMANDS[name]


class TestDoor:
    def test_a_mistake_is_one_line_and_exit_2(self, tmp_path):
        """Nothing on stdout, no traceback, the file and the setting named."""
        path = tmp_path / "h.toml"
        path.write_text("[loop]\nread_mx = 1")

        ran = headgate("settings", "--config", str(path))

        assert (ran.returncode, ran.stdout) == (2, "")
        assert (
            f"headgate: {path}: loop.read_mx is not a setting; did you mean read_max?\n"
            in ran.stderr
        )
        assert "Traceback" not in ran.stderr

    def test_an_unknown_command_suggests_the_nearest(self):
        """As the settings do."""
        ran = headgate("sttings")

        assert ran.returncode == 2
        assert "Did you mean 'settings'" in ran.stderr

    @pytest.mark.parametrize(
        ("words", "wanted"),
        [
            (("door", "--port", "99999"), "less than or equal to 65535"),
            (("emulate", "--port", "99999"), "less than or equal to 65535"),
            (("up", "--workers", "many"), "valid integer"),
        ],
        ids=["range", "another floor's", "kind"],
    )
    def test_a_refused_value_is_said_with_what_was_wanted(self, words, wanted):
        ran = headgate(*words)
        assert ran.returncode == 2
        assert repr(words[-1]) in ran.stderr
        assert wanted in ran.stderr

    @pytest.mark.parametrize(
        ("words", "wanted"),
        [
            (("--emulate", "2", "--roles", "prefill"), "wanted somebody who decodes"),
            (("--emulate", "2", "--roles", "encode"), "wanted prefill, decode, both"),
            (("--emulate", "2", "--roles", ","), "--roles is empty"),
            (("--engine", "a=http://h:1", "--roles", "decode"), "wanted --emulate"),
        ],
        ids=["nobody decodes", "no role", "empty", "nobody emulated"],
    )
    def test_roles_that_nobody_could_play_are_refused(self, words, wanted):
        """A pool in which every request would wait for ever is not started."""
        ran = headgate("up", *words)
        assert ran.returncode == 2
        assert wanted in ran.stderr
        assert ran.stderr.startswith("headgate: --roles")

    def test_mistakes_out_of_a_task_group_leave_by_the_same_door(self, monkeypatch, capsys):
        """A group of our errors is one line each, however deep they lie."""

        def fail(**_):
            raise ExceptionGroup(
                "tasks", [StreamError("a"), ExceptionGroup("more", [StreamError("b")])]
            )

        monkeypatch.setattr(root, "root", lambda _words: fail)

        with pytest.raises(SystemExit) as end:
            root.main()

        assert (end.value.code, capsys.readouterr().err) == (2, "headgate: a\nheadgate: b\n")

    def test_commands_of_a_group_are_handed_settings_too(self, capsys):
        """However deep a command lies, it asks for `Settings` in the same way."""
        app, group = typer.Typer(), typer.Typer(name="deep", help="Deep.")
        app.add_typer(group)

        @group.command()
        def show(settings: Settings) -> None:
            """Show."""
            typer.echo(settings.pool)

        @group.command()
        def other() -> None:
            """Another, so that the group stays one."""

        extended = root.root([])
        root._adopt(extended, app, lambda given: Settings(pool=given.pool))

        with pytest.raises(SystemExit):
            extended(["deep", "show", "--pool", "chat"])

        assert capsys.readouterr().out == "chat\n"

    def test_ctrl_c_is_130(self, monkeypatch):
        """The shell's own code for an interrupted program."""
        app = typer.Typer()

        @app.command()
        async def wait() -> None:
            """Wait."""
            raise KeyboardInterrupt

        extended = root.root([])
        root._adopt(extended, app, lambda _given: Settings())

        with pytest.raises(SystemExit) as end:
            extended(["wait"])

        assert end.value.code == 130

    @pytest.mark.parametrize("module", ["typer", "numpy"])
    def test_ctrl_c_among_the_imports_is_without_a_word(self, module):
        """The first half second of a command shows nobody's source."""
        code = (
            "import os, runpy, signal, sys\n"
            "class Finder:\n"
            "    def find_spec(self, name, *_):\n"
            f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
            "sys.meta_path.insert(0, Finder())\n"
            "sys.argv = ['headgate', 'simulate']\n"
            "runpy.run_module('dispatcher.cli', run_name='__main__')"
        )

        ran = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )

        assert (ran.returncode, ran.stderr) == (-signal.SIGINT, "")


class TestSettings:
    def test_shared_options_stand_before_or_after_the_command(self):
        """After wins, being nearer; both end in the same settings."""
        before = headgate("--pool", "chat", "settings")
        after = headgate("--pool", "other", "settings", "--pool", "chat")

        assert 'pool = "chat"\n' in before.stdout
        assert before.stdout == after.stdout


class TestLog:
    @pytest.mark.parametrize(
        ("environ", "said"),
        [
            pytest.param(
                {}, '{"endpoint": "e7", "event": "late", "level": "info", ', id="json in a pipe"
            ),
            pytest.param({"HEADGATE_LOG__FORM": "text"}, "late ", id="text on request"),
            pytest.param({"HEADGATE_LOG__LEVEL": "error"}, "", id="silenced"),
        ],
    )
    def test_events_go_to_stderr(self, environ, said):
        """stdout is results; an event is one line on stderr, in the form its reader wants."""
        code = (
            "import os, structlog; from dispatcher.cli import log; from scheduler.parsing import parse\n"
            "log.configure(parse('', os.environ).log)\n"
            "structlog.get_logger().info('late', endpoint='e7')"
        )

        ran = subprocess.run(
            [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
        )

        assert ran.stdout == ""
        assert said in ran.stderr
        assert bool(ran.stderr) == bool(said)


class TestRedis:
    def test_one_command(self, every_server):
        """The reply alone, so that it can be piped; an error reply is exit 1."""
        assert headgate("redis", "--redis", every_server, "PING").stdout == "PONG\n"
        headgate("redis", "--redis", every_server, "XADD", "s", "1-1", "model", "llama")
        read = headgate("redis", "--redis", every_server, "XRANGE", "s", "-", "+")
        assert read.stdout == "1-1\nmodel\nllama\n"
        refused = headgate("redis", "--redis", every_server, "INCR", "s")
        assert (refused.returncode, refused.stdout[:9]) == (1, "WRONGTYPE")

    def test_json(self, redis_url):
        """For jq: one line a reply."""
        ran = headgate("redis", "--json", "--redis", redis_url, "MGET", "a")

        assert ran.stdout == "[null]\n"

    def test_commands_from_a_pipe(self, redis_url):
        """Quotes group words as in a shell; the first bad line does not end the rest."""
        ran = headgate(
            "redis",
            HEADGATE_REDIS_URL=redis_url,
            stdin="SET a 'two words'\nSET b 'open\nGET a\nquit\nGET a\n",
        )

        assert ran.stdout == "OK\ntwo words\n"
        assert "Invalid argument(s)" in ran.stderr

    def test_at_a_terminal_it_looks_like_redis_cli(self, redis_url):
        """A prompt with the address, and replies in their dress."""
        master, terminal = pty.openpty()
        with subprocess.Popen(
            [HEADGATE, "redis", "--redis", redis_url],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
        ):
            os.close(terminal)
            os.write(master, b"RPUSH l a\nLRANGE l 0 -1\nGET none\nquit\n")
            said = b""
            while b"(nil)" not in said:
                said += os.read(master, 4096)
        os.close(master)

        assert b"(integer) 1\r\n" in said
        assert b'1) "a"\r\n' in said
        assert redis_url.removeprefix("redis://").removesuffix("/0").encode() + b"> " in said

    def test_password_and_database_come_from_the_url(self, redis_url):
        """AUTH and SELECT go first."""
        with Connection(redis_url, timeout_s=5) as admin:
            admin.call("ACL", "SETUSER", "guest", "on", ">se:cret", "~*", "+@all")
        url = redis_url.replace("redis://", "redis://guest:se%3Acret@").removesuffix("0") + "3"
        assert headgate("redis", "--redis", url, "ACL", "WHOAMI").stdout == "guest\n"
        assert "db=3" in headgate("redis", "--redis", url, "CLIENT", "INFO").stdout

        wrong = headgate("redis", "--redis", url.replace("cret", "cred"), "PING")

        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert "refused AUTH: WRONGPASS" in wrong.stderr
        assert "cred" not in wrong.stderr
        with Connection(redis_url, timeout_s=5) as admin:
            admin.call("ACL", "DELUSER", "guest")

    def test_through_the_unix_socket(self, redis_server):
        """The private server's other door."""
        assert redis_server.unix_url.startswith("unix://")
        assert headgate("redis", "--redis", redis_server.unix_url, "PING").stdout == "PONG\n"

    def test_without_any_redis_it_says_where_it_looked(self, tmp_path):
        """None given and none running is the weather, not a traceback."""
        ran = headgate("redis", "PING", XDG_STATE_HOME=str(tmp_path))

        assert ran.returncode == 2
        assert f"none runs in {tmp_path}" in ran.stderr

    @pytest.mark.parametrize(
        ("reply", "shown"),
        [
            pytest.param(Status("OK"), "OK", id="status"),
            pytest.param(Failure("ERR no"), "(error) ERR no", id="error"),
            pytest.param(None, "(nil)", id="nothing"),
            pytest.param(b'a"\n\xff', r'"a\"\n\xff"', id="bytes"),
            pytest.param(
                [b"x"] * 10, "\n".join(f'{n:>2}) "x"' for n in range(1, 11)), id="aligned"
            ),
        ],
    )
    def test_dress(self, reply, shown):
        """Each kind of reply as redis-cli shows it."""
        assert dressed(reply) == shown

    def test_json_of_bytes_is_text(self):
        """Bytes that are no text lose their shape, never the line."""
        assert in_json([b"a", 1, None, b"\xff"]) == '["a", 1, null, "�"]'


def test_version_names_the_releases_that_matter():
    """What a report of trouble needs."""
    ran = headgate("version")

    assert ran.returncode == 0
    assert {"headgate", "python", "redis", "river"} <= {
        line.split()[0] for line in ran.stdout.splitlines()
    }
