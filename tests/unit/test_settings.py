"""Settings: every field is reachable, every mistake names itself, and what is printed can be read back."""

import subprocess
import sys

import msgspec
import pytest

from dispatcher import node, options
from dispatcher.cli.settings import effective_toml, field_docs
from dispatcher.options import Options
from scheduler import settings as sections
from scheduler.errors import SettingsError
from scheduler.parsing import parse
from scheduler.settings import RedisSettings, Settings
from scheduler.slo import Objective

STRUCTS = [
    struct
    for struct in vars(sections).values()
    if isinstance(struct, type) and issubclass(struct, msgspec.Struct) and struct.__struct_fields__
]


class TestParse:
    def test_nothing_given_is_the_defaults(self):
        """An empty file and an empty environment run."""
        assert parse("", {}) == Settings()

    def test_the_environment_wins_over_the_file(self):
        """`__` nests; the text becomes the field's own type."""
        found = parse(
            "[loop]\nread_max = 9\nstep_s = 1",
            {"HEADGATE_LOOP__READ_MAX": "512", "HEADGATE_POOL": "chat"},
        )

        assert (found.loop.read_max, found.loop.step_s, found.pool) == (512, 1.0, "chat")

    def test_a_single_underscore_reaches_every_fixed_field(self):
        """HEADGATE_REDIS_URL is the spelling people know."""
        found = parse("", {"HEADGATE_REDIS_URL": "redis://h", "HEADGATE_LOOP_READ_MAX": "7"})

        assert (found.redis.url, found.loop.read_max) == ("redis://h", 7)

    def test_text_stays_text_where_text_is_wanted(self):
        """A pool named 1 is a name, not a number."""
        assert parse("", {"HEADGATE_POOL": "1"}).pool == "1"

    def test_named_promises(self):
        """Objectives are free names over a fixed shape, in the file or the environment."""
        found = parse(
            "[objectives.chat]\nttft_ms = 500", {"HEADGATE_OBJECTIVES__CHAT__PRIORITY": "2"}
        )

        assert found.objectives == {"chat": Objective(ttft_ms=500.0, priority=2)}

    def test_kubernetes_service_variables_are_not_ours(self):
        """A Service called headgate, or headgate-door, sets these in every pod of its namespace."""
        links = {
            "HEADGATE_SERVICE_HOST": "10.0.0.1",
            "HEADGATE_PORT": "tcp://10.0.0.1:80",
            "HEADGATE_DOOR_PORT": "tcp://10.0.0.1:80",
        }

        assert parse("", links) == Settings()
        assert parse("", {"HEADGATE_DOOR_PORT": "81"}).door.port == 81

    @pytest.mark.parametrize(
        ("text", "environ", "message"),
        [
            pytest.param(
                "[loop]\nread_mx = 1",
                {},
                "loop.read_mx is not a setting; did you mean read_max?",
                id="misspelt",
            ),
            pytest.param(
                "",
                {"HEADGATE_LOOP__READ_MX": "1"},
                "did you mean read_max?",
                id="misspelt variable",
            ),
            pytest.param(
                "[zebra]", {}, "zebra is not a setting; known here: pool,", id="far from any"
            ),
            pytest.param(
                "[loop]\nread_max = 'many'",
                {},
                "loop.read_max is 'many', wanted int >= 1",
                id="wrong type",
            ),
            pytest.param("loop = 3", {}, "loop is 3, wanted a table", id="no table"),
            pytest.param(
                "[objectives.chat]\nttft_ms = 0",
                {},
                "objectives.chat.ttft_ms is 0, wanted number > 0 and <= 1e+12 or nothing",
                id="below its bound",
            ),
            pytest.param(
                "[loop]\nretention_s = inf",
                {},
                "loop.retention_s is inf, wanted number >= 0 and <= 1e+09",
                id="for ever",
            ),
            pytest.param(
                "[objectives.chat]\ndeadline_ms = inf",
                {},
                "objectives.chat.deadline_ms is inf, wanted number > 0 and <= 1e+12",
                id="a promise for ever",
            ),
            pytest.param(
                "[objectives.chat]\nweight = 1e308",
                {},
                "objectives.chat.weight is 1e+308, wanted number >= 1e-06 and <= 1e+06",
                id="worth more than all",
            ),
            pytest.param(
                "[objectives.chat]\npriority = 9999999999",
                {},
                "objectives.chat.priority is 9999999999, wanted int >= -1e+06 and <= 1e+06",
                id="before all",
            ),
            pytest.param(
                "[fairness.weights]\na = 1e-300",
                {},
                "fairness.weights.a is 1e-300, wanted number >= 1e-06 and <= 1e+06",
                id="no share at all",
            ),
            pytest.param(
                "[lease]\nbeat_s = 2",
                {},
                "lease: beat_s is 2, wanted at most half",
                id="two fields",
            ),
            pytest.param(
                "[log]\nform = 'xml'",
                {},
                "log.form is 'xml', wanted 'auto' or 'text' or 'json'",
                id="no such choice",
            ),
            pytest.param("a =", {}, "not TOML: Invalid value", id="no TOML"),
            pytest.param(
                "[redis]\nurl = 'redis://:s@h'",
                {},
                "redis.url holds a password in the file",
                id="secret in URL",
            ),
            pytest.param(
                "[redis]\nurl = 'redis://['",
                {},
                "redis.url is no URL: Invalid IPv6 URL",
                id="no URL",
            ),
            pytest.param(
                "[redis]\npassword = 's'",
                {},
                "redis.password holds a password in the file",
                id="secret",
            ),
        ],
    )
    def test_a_mistake_names_itself(self, text, environ, message):
        """The path, the value found and the value wanted."""
        with pytest.raises(SettingsError) as caught:
            parse(text, environ)

        assert message in str(caught.value)


class Greedy(msgspec.Struct, frozen=True, tag="greedy", tag_field="name"):
    depth: int = 1
    "How deep."


class Patient(msgspec.Struct, frozen=True, tag="patient", tag_field="name"):
    pass


class Choosing(msgspec.Struct, frozen=True):
    policy: Greedy | Patient = Patient()
    "One of two."


class TestTaggedUnion:
    """A setting that is one of several shapes, told apart by a name."""

    def test_the_name_chooses_the_shape(self):
        """Fields are then checked against the chosen one."""
        from scheduler.parsing import build  # noqa: PLC0415

        assert build({"policy": {"name": "greedy", "depth": 3}}, Choosing, ()) == Choosing(
            Greedy(3)
        )
        with pytest.raises(
            SettingsError, match=r"policy.name is 'lazy', wanted 'greedy' or 'patient'"
        ):
            build({"policy": {"name": "lazy"}}, Choosing, ())
        with pytest.raises(
            SettingsError, match=r"policy.dept is not a setting; did you mean depth"
        ):
            build({"policy": {"name": "greedy", "dept": 3}}, Choosing, ())

    def test_it_is_printed_with_its_name(self):
        """Reading the printed table chooses the same shape."""
        assert '[policy]\nname = "greedy"' in effective_toml(Choosing(Greedy(3))).replace(
            "# One of two.\n", ""
        )


class TestPrinted:
    def test_reads_back_to_the_same_settings(self):
        """`headgate settings > headgate.toml` changes nothing."""
        settings = parse(
            "pool = 'chat'\n[objectives.chat]\nttft_ms = 500\n[loop]\nread_max = 9", {}
        )

        assert parse(effective_toml(settings), {}) == settings

    def test_the_tables_of_the_core_are_spelt_out(self):
        """What was not said stands there too, with what it means; and read back it is the same core."""
        settings = parse("[plan]\nfill = 0.2\n[policy]\nname = 'urgency'\nprice = 0.25", {})
        core = node.core_settings(settings)

        printed = effective_toml(settings, {"policy": core.policy, "plan": core.plan})

        assert node.core_settings(parse(printed, {})) == core
        for struct in (core.plan, core.policy):
            for name, doc in field_docs(type(struct)).items():
                assert f"\n{name} = {getattr(struct, name)}" in printed
                assert doc.split(".")[0][:60] in printed

    @pytest.mark.parametrize("name", ["commit_window_s", "fill", "patience"])
    def test_nothing_of_the_plan_is_for_ever(self, name):
        """What is weighed with infinity is no number any more, and nobody has a place."""
        with pytest.raises(SettingsError, match=rf"plan.{name} is inf, wanted number .* <= 1e\+09"):
            node.core_settings(parse(f"[plan]\n{name} = inf", {}))

    def test_never_prints_a_password(self):
        """Neither the password field nor one inside the URL; and what is printed is still readable."""
        settings = Settings(redis=RedisSettings(url="redis://me:s3cret@h:1/2", password="s3cret"))

        printed = effective_toml(settings)

        assert "s3cret" not in printed + repr(settings)
        assert "redis://me:***@h:1/2" in printed
        assert parse(printed, {}).pool == "default"

    @pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
    def test_every_plain_field_says_what_it_means(self, struct):
        """A setting without a line under it cannot be explained; a section explains itself."""
        undocumented = [
            name
            for name, wanted in struct.__annotations__.items()
            if name not in field_docs(struct)
            and not (isinstance(wanted, type) and issubclass(wanted, msgspec.Struct))
        ]

        assert undocumented == []


class TestOptions:
    def test_option_over_variable_over_file(self, tmp_path):
        """The nearest to the hand wins."""
        path = tmp_path / "h.toml"
        path.write_text("pool = 'file'\n[redis]\nurl = 'redis://file'\nprefix = 'p'")
        environ = {"HEADGATE_CONFIG": str(path), "HEADGATE_REDIS_URL": "redis://variable"}

        found = options.settings(Options(pool="option"), environ)

        assert (found.pool, found.redis.url, found.redis.prefix) == (
            "option",
            "redis://variable",
            "p",
        )

    def test_the_file_here_is_read_when_none_is_named(self, tmp_path, monkeypatch):
        """./headgate.toml, if there is one."""
        monkeypatch.chdir(tmp_path)
        assert options.settings(Options(), {}) == Settings()

        (tmp_path / "headgate.toml").write_text("pool = 'here'")
        assert options.settings(Options(), {}).pool == "here"

    def test_a_named_file_must_be_there(self, tmp_path):
        """Silence would run on defaults that nobody chose."""
        with pytest.raises(
            SettingsError, match=r"settings file '.*none.toml' cannot be read: No such file"
        ):
            options.settings(Options(config=str(tmp_path / "none.toml")), {})

    def test_a_mistake_in_a_file_names_the_file(self, tmp_path):
        """With several files about, the path of the setting is not enough."""
        path = tmp_path / "h.toml"
        path.write_text("x = 1")

        with pytest.raises(SettingsError, match=rf"{path}: x is not a setting"):
            options.settings(Options(config=str(path)), {})

    def test_the_password_comes_from_its_file(self, tmp_path):
        """As mounted secrets come: the file's last newline is not part of it."""
        secret = tmp_path / "secret"
        secret.write_text("p@ss/word\n")
        environ = {"HEADGATE_REDIS_URL": "rediss://h:1/2", "HEADGATE_REDIS_USERNAME": "me"}

        found = options.settings(Options(), environ | {"HEADGATE_REDIS_PASSWORD_FILE": str(secret)})

        assert found.redis.login_url == "rediss://me:p%40ss%2Fword@h:1/2"


def test_the_settings_load_without_the_heavy_libraries():
    """A client that only reads its settings pays for neither River nor NumPy."""
    code = "import scheduler.parsing, sys; sys.exit(bool({'river', 'numpy'} & sys.modules.keys()))"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
