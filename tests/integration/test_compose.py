"""The Compose file: valid, careful, and a system that answers when its commands are run."""

import http.client
import importlib.resources
import json
import re
import stat
import subprocess
import sys
import time

import composed
import jsonschema
import openai
import promql_parser
import pytest
from composed import ROOT, Composed, is_ours
from ruamel.yaml import YAML

from dispatcher.resp import Connection, Failure
from workers import worker

pytestmark = pytest.mark.xdist_group("compose")  # one system for all of them

READY_S = 60.0
POLL_S = 0.05
TEST_USER = "user tester on nopass ~* &* +@all\n"
"Ours alone, to look into Redis from outside."


def until(is_true, what):
    """Wait for other processes; they have no event of ours to wait for."""
    end = time.monotonic() + READY_S
    while not (found := is_true()):
        assert time.monotonic() < end, f"not within {READY_S:g} s: {what()}"
        time.sleep(POLL_S)
    return found


def get(address, path):
    connection = http.client.HTTPConnection(*address, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


class Stack(Composed):
    """The file's system with a Redis that a test may look into."""

    def __init__(self, directory):
        secrets = directory / "secrets"
        secrets.mkdir()
        example = composed.read()["secrets"]
        for name, secret in example.items():
            (secrets / name).write_bytes((ROOT / secret["file"]).read_bytes())
        with (secrets / "users.acl").open("a") as users:
            users.write(TEST_USER)
        super().__init__(
            directory,
            {
                "HEADGATE_SECRETS": str(secrets),
                "HEADGATE_TIME_SCALE": "50",
                "HEADGATE_WORKER_DRAIN_S": "2",
                "HEADGATE_DOOR_DRAIN_S": "2",
            },
        )

    def up(self):
        """Every service of ours that needs no profile, after the Redis that it waits for."""
        services = self.file["services"]
        self.start("redis")
        until(self._redis_answers, lambda: self.said("redis"))
        ours = [name for name, one in services.items() if is_ours(one) and "profiles" not in one]
        return self.up_with(ours)

    def up_with(self, ours):
        """These, and wait until they are well."""
        for name in ours:
            self.start(name)
        for name in ours:
            until(lambda name=name: self.listens(name), lambda name=name: self.said(name))
        for name in ours:  # a program each, so only when it is likely to be content
            until(
                lambda name=name: self.check(name).returncode == 0,
                lambda name=name: self.said(name),
            )
        return ours

    def redis(self, user):
        host, port = self.address("redis", 6379)
        secret = "any" if user == "tester" else self.secret(user).read_text()
        return Connection(f"redis://{user}:{secret}@{host}:{port}/0", timeout_s=5)

    def _redis_answers(self):
        try:
            with self.redis("viewer") as redis:
                return redis.call("PING") == "PONG"
        except Exception:  # noqa: BLE001  not yet there, in whatever way
            return False

    def targets(self):
        """Job, host and port of everything that Prometheus' settings name."""
        config = YAML(typ="safe", pure=True).load(ROOT / "deploy/prometheus/prometheus.yml")
        for job in config["scrape_configs"]:
            for group in job["static_configs"]:
                for target in group["targets"]:
                    yield job["job_name"], *target.split(":"), "optional" in group.get("labels", {})

    def leaders(self):
        pages = {
            name: get(self.address(name, 9464), "/metrics")[1]
            for name in DISPATCHERS
            if name in self.running
        }
        return [
            name for name, text in pages.items() if 'headgate_is_leader{pool="default"} 1.0' in text
        ]


DISPATCHERS = ("dispatcher-a", "dispatcher-b")


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    with Stack(tmp_path_factory.mktemp("compose")) as stack:
        stack.up()
        yield stack


@pytest.fixture(scope="module")
def file():
    return composed.read()


@pytest.fixture(scope="module")
def series(stack):
    """Name of every series that a running role shows, and the labels seen on it."""
    found = {}
    for _, host, port, _ in stack.targets():
        if host in stack.running:
            for name, labels in shown(get(stack.address(host, port), "/metrics")[1]):
                found.setdefault(name, set()).update(labels)
    return found


class TestFile:
    def test_follows_the_compose_specification(self, file):
        """Compose itself would accept every key."""
        schemas = importlib.resources.files("check_jsonschema.builtin_schemas.vendor")
        schema = json.loads(schemas.joinpath("compose-spec.json").read_text())

        jsonschema.validate(file, schema)

    def test_our_services_are_locked_down(self, file):
        """Each is restarted, bounded, unprivileged, and cannot write to its own file system."""
        for name, service in file["services"].items():
            assert service["security_opt"] == ["no-new-privileges:true"], name
            if name != "vllm":  # its image writes where it likes
                assert service["read_only"], name
                assert service["cap_drop"] == ["ALL"], name
            if "tools" not in service.get("profiles", ()):
                assert service["restart"] == "unless-stopped", name
                assert service["deploy"]["resources"]["limits"]["memory"], name

    def test_no_secret_stands_in_the_environment(self, file):
        """Passwords come by file: an environment is shown by `docker inspect`."""
        for name, service in file["services"].items():
            for key, value in service.get("environment", {}).items():
                if "PASSWORD" in key:
                    assert key.upper().endswith("_FILE"), f"{name}: {key}"
                    assert str(value).startswith("/run/secrets/"), f"{name}: {key}"

    def test_only_loopback_is_published(self, file):
        """A trial on a laptop must not open a port to the network it happens to be in."""
        published = [port for one in file["services"].values() for port in one.get("ports", ())]

        assert published
        assert all(port.startswith("127.0.0.1:") for port in published)

    def test_every_named_file_and_secret_exists(self, file):
        """Docker would make a directory in the place of a missing file."""
        for service in file["services"].values():
            for volume in service.get("volumes", ()):
                source = volume.split(":")[0]
                assert (
                    (ROOT / source).exists()
                    if source.startswith(".")
                    else source in file["volumes"]
                )
            assert set(service.get("secrets", ())) <= file["secrets"].keys()
        assert all((ROOT / secret["file"]).is_file() for secret in file["secrets"].values())

    def test_stopping_takes_no_longer_than_it_is_given(self, file):
        """A role's grace covers its drain and its last words; else Docker kills it in the middle."""
        drained = set()
        for name, service in file["services"].items():
            for variable, drain_s in service.get("environment", {}).items():
                if variable.endswith("_DRAIN_S"):
                    grace_s = float(service["stop_grace_period"].rstrip("s"))
                    assert grace_s >= float(drain_s) + 10, name
                    drained.add(service["command"][0])

        assert drained == {"worker", "door"}

    def test_every_worker_stands_beside_an_engine(self, file):
        """What --engine names is a service of the file, and a port that it has."""
        beside = {}
        for name, service in file["services"].items():
            if service.get("command", [""])[0] == "worker":
                engine = worker.address(service["command"][2])
                host, _, port = engine.url.removeprefix("http://").partition(":")
                if host == "127.0.0.1":
                    host = service["network_mode"].removeprefix("service:")
                words = file["services"][host]["command"]
                assert words[words.index("--port") + 1] == port, name
                beside[engine.name] = host

        assert len(beside) == len(set(beside.values())) == 6

    def test_prometheus_scrapes_every_role(self, file):
        """A role that is added to the file must be added to Prometheus' settings."""
        stack = Composed(ROOT, {})
        seen = set()
        for _, host, port, _ in Stack.targets(stack):
            assert file["services"][host], host
            seen.add((host, int(port)))

        for name, service in file["services"].items():
            if is_ours(service) and "tools" not in service.get("profiles", ()):
                host = service.get("network_mode", "").removeprefix("service:") or name
                ports = composed.container_ports(service) or {9464}
                # Beside /metrics a door has its own port, which is its clients'.
                shown = {9464} & ports or ports
                assert {(host, port) for port in shown} <= seen, name


class TestImage:
    def test_is_not_root_and_says_how_it_is(self):
        """A number for the user, an entry point without a shell, a health check, a signal that drains."""
        last = dict(composed.dockerfile())

        assert int(last["USER"].split(":")[0]) > 0
        assert json.loads(last["ENTRYPOINT"]) == ["headgate"]
        assert last["STOPSIGNAL"] == "SIGTERM"
        assert "HEALTHCHECK" in last

    def test_copies_what_exists_and_all_that_the_wheel_needs(self):
        """Everything that it copies is there, and let through by the ignore file."""
        let = (composed.DOCKERFILE.with_name("Dockerfile.dockerignore")).read_text().splitlines()
        copied = [
            source
            for word, rest in composed.dockerfile()
            if word == "COPY"
            for source in rest.split()[:-1]
        ]
        assert {"dispatcher", "workers", "scheduler", "pyproject.toml"} <= set(copied)
        for source in copied:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in let, source

    def test_every_base_is_pinned_and_named_without_a_host(self):
        """A tag that says a version; the registry is the reader's choice."""
        file = composed.read()
        names = [one["image"] for one in file["services"].values() if not is_ours(one)]
        [base] = [rest for word, rest in composed.dockerfile() if word == "ARG"]
        for name in [*names, base.partition("=")[2]]:
            assert "." not in name.partition(":")[0], name
            assert any(c.isdigit() for c in name.partition(":")[2]), name


class TestUsers:
    def test_a_new_installation_gets_passwords_of_its_own(self, tmp_path):
        """Each user has a long one, the ACL file has only hashes, and a second run changes no password."""
        script = ROOT / "deploy/redis/users.sh"
        subprocess.run(["sh", script, tmp_path / "s"], check=True)
        first = {path.name: path.read_text() for path in (tmp_path / "s").iterdir()}
        subprocess.run(["sh", script, tmp_path / "s"], check=True)

        assert {path.name: path.read_text() for path in (tmp_path / "s").iterdir()} == first
        rules = first.pop("users.acl")
        assert all(len(secret) == 48 and secret not in rules for secret in first.values())
        assert len(set(first.values())) == len(first) == 7
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o700


class TestSystem:
    def test_a_request_is_seen_through(self, stack):
        """What the README tells a newcomer to type is answered by an engine."""
        done = stack.run(
            "client", "submit", "--model", "emulated", "--max-tokens", "5", "--json", "hello"
        )

        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout)
        assert (record["outcome"], record["output_tokens"]) == ("completed", 5)

    def test_the_door_speaks_openai(self, stack):
        """What any OpenAI client asks of its published port is answered by an engine, word by word."""
        host, port = stack.address("door", 8080)
        with openai.OpenAI(
            base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0
        ) as ai:
            # Which models there are it learns as their workers say so.
            until(lambda: [one.id for one in ai.models.list()] == ["emulated"], lambda: "no model")
            stream = ai.completions.create(
                model="emulated", prompt="hello", max_tokens=5, stream=True
            )
            reasons = [chunk.choices[0].finish_reason for chunk in stream]

        assert reasons[-1] == "length"

    def test_every_target_of_prometheus_answers(self, stack):
        """Each role shows its metrics exactly where Prometheus' settings look for them."""
        jobs = set()
        for job, host, port, is_optional in stack.targets():
            if is_optional:
                continue
            status, text = get(stack.address(host, port), "/metrics")
            assert (status, "# TYPE" in text) == (200, True), f"{job} {host}:{port}"
            jobs.add(job)

        assert jobs == {"headgate-dispatcher", "headgate-door", "headgate-worker", "engine"}

    def test_redis_keeps_what_it_accepted(self, stack):
        """An append-only file, and no key is ever thrown away."""
        with stack.redis("tester") as redis:
            found = {
                name: redis.call("CONFIG", "GET", name)[1]
                for name in ("appendonly", "maxmemory-policy", "maxmemory")
            }

        assert found == {
            "appendonly": b"yes",
            "maxmemory-policy": b"noeviction",
            "maxmemory": b"1073741824",
        }

    @pytest.mark.parametrize(
        "words",
        [
            ("status", "--json"),
            ("dead", "list"),
            ("drain", "a100-0", "--no-wait"),
            ("resume", "a100-0"),
        ],
        ids=" ".join,
    )
    def test_people_can_look_after_it(self, stack, words):
        """The operator's user has all the rights that an operator needs."""
        operator = {
            "HEADGATE_REDIS_USERNAME": "operator",
            "HEADGATE_REDIS_PASSWORD_FILE": str(stack.secret("operator")),
        }

        done = stack.run("client", *words, **operator)

        assert done.returncode == 0, done.stderr

    def test_a_long_prompt_in_two_legs(self, stack):
        """`--profile pd`, with nobody else at work: one computes the prompt, and the other finds its KV and goes on."""
        services = stack.file["services"].items()
        stack.up_with([name for name, one in services if one.get("profiles") == ["pd"]])
        operator = {
            "HEADGATE_REDIS_USERNAME": "operator",
            "HEADGATE_REDIS_PASSWORD_FILE": str(stack.secret("operator")),
        }
        whole = ("h100-0", "a100-0", "l40s-0")
        for name in whole:
            stack.run("client", "drain", name, "--no-wait", **operator)
        words = ("--model", "emulated", "--max-tokens", "5", "--json", "--id", "long")
        done = stack.run("client", "submit", *words, "river " * 6000)
        told = stack.run("client", "explain", "long", **operator)
        for name in whole:
            stack.run("client", "resume", name, **operator)

        record = json.loads(done.stdout)
        assert (record["outcome"], record["endpoint"]) == ("completed", "decode-0")
        assert "prefilled on prefill-0" in " ".join(told.stdout.split())

    def test_the_standby_goes_on(self, stack):
        """The leader is stopped as Compose stops it; the next request is answered all the same."""
        [leader] = until(stack.leaders, lambda: "no leader")
        stopped = stack.running.pop(leader)
        stopped.terminate()
        assert stopped.wait(10) == 0

        done = stack.run(
            "client", "submit", "--model", "emulated", "--max-tokens", "2", "--json", "again"
        )

        assert json.loads(done.stdout)["outcome"] == "completed"
        assert stack.leaders() == [name for name in DISPATCHERS if name != leader]

    def test_an_autoscaler_may_count_what_waits(self, stack):
        """KEDA's redis scaler asks by a script of its own; a viewer may run it."""
        script = "if redis.call('type', KEYS[1]).ok == 'zset' then return redis.call('zcard', KEYS[1]) end return 0"
        with stack.redis("viewer") as redis:
            assert redis.call("EVAL", script, "1", "hg:{default}:waiting") == 0

    def test_no_role_wanted_more_than_it_may(self, stack):
        """The rights suffice for all of the above. Only a dispatcher may load functions; the others can do without."""
        with stack.redis("tester") as redis:
            entries = redis.call("ACL", "LOG", "128")
        rows = [dict(zip(entry[::2], entry[1::2], strict=True)) for entry in entries]

        denied = {(row[b"username"].decode(), row[b"object"].decode()) for row in rows}

        assert denied <= {
            (user, "function|load") for user in ("client", "door", "worker", "operator")
        }


class TestWatching:
    """What Prometheus and Grafana ask for is what the roles show, each by the text that it showed just now."""

    def test_who_dies_is_told_of(self):
        """A dead worker's endpoint has no state and its process no metrics: an alert on a state would wait for ever."""
        asked = {
            selector.name: {one.name for one in selector.matchers.matchers}
            for rule in rules()
            if rule.get("alert") in ("HeadgateEndpointGone", "HeadgateTargetDown")
            for selector in selectors(rule["expr"])
        }

        assert asked == {
            "headgate_endpoint_state": set(),
            "headgate_is_leader": set(),
            "up": {"job", "optional"},
        }

    def test_every_query_asks_for_series_that_exist(self, series):
        """A panel or an alert on a series that nobody shows is silent for ever."""
        recorded = {rule["record"] for rule in rules() if "record" in rule} | {"up"}
        for place, query in queries():
            for selector in selectors(query):
                known = selector.name in series or selector.name in recorded
                assert known, f"{place}: {selector.name}"

    def test_every_query_asks_for_labels_that_exist(self, series):
        """So is one on a label that its series do not bear."""
        for place, query in queries():
            for selector in selectors(query):
                labels = series.get(selector.name)
                for matcher in selector.matchers.matchers:
                    assert not labels or matcher.name in labels, (
                        f"{place}: {selector} {matcher.name}"
                    )

    def test_every_figure_of_the_pool_is_on_the_dashboard_or_in_a_rule(self, series):
        """What a dispatcher counts for people, people see."""
        asked = {selector.name for _, query in queries() for selector in selectors(query)}
        families = {name.removesuffix("_bucket") for name in asked}
        unseen = {
            name
            for name in series
            if name.startswith("headgate_")
            and not name.startswith("headgate_worker_")
            and not name.endswith(("_sum", "_count", "_bucket", "_created"))
            and name not in families
        }

        assert unseen <= UNSHOWN

    def test_the_dashboard_is_what_its_script_writes(self):
        """An edit in Grafana goes into the script, or is lost at the next one."""
        script = ROOT / "deploy/grafana/dashboard.py"
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)

        assert done.stdout == DASHBOARD.read_text()

    def test_panels_do_not_overlap(self):
        """Each has its own place, within Grafana's 24 columns."""
        taken = set()
        for panel in json.loads(DASHBOARD.read_text())["panels"]:
            place = panel["gridPos"]
            cells = {
                (place["x"] + x, place["y"] + y)
                for x in range(place["w"])
                for y in range(place["h"])
            }
            assert not cells & taken, panel["title"]
            assert place["x"] + place["w"] <= 24, panel["title"]
            taken |= cells


class TestRights:
    @pytest.mark.parametrize(
        ("user", "words"),
        [
            pytest.param("default", ["PING"], id="nobody"),
            pytest.param("client", ["FUNCTION", "LOAD", "x"], id="client plants code"),
            pytest.param(
                "client", ["HSET", "hg:{default}:leader", "epoch", "9"], id="client leads"
            ),
            pytest.param(
                "client", ["XRANGE", "hg:{default}:decisions", "-", "+"], id="client pries"
            ),
            pytest.param(
                "client", ["CLIENT", "KILL", "TYPE", "normal"], id="client cuts others off"
            ),
            pytest.param("door", ["FUNCTION", "LOAD", "x"], id="door plants code"),
            pytest.param("door", ["XADD", "hg:{default}:beats", "*", "a", "b"], id="door beats"),
            pytest.param("door", ["XRANGE", "hg:{default}:rewards", "-", "+"], id="door pries"),
            pytest.param("door", ["XREAD", "STREAMS", "hg:{default}:jobs:a", "0"], id="door works"),
            pytest.param("worker", ["FUNCTION", "LOAD", "x"], id="worker plants code"),
            pytest.param("worker", ["SET", "hg:{default}:snapshot", "x"], id="worker teaches"),
            pytest.param("dispatcher", ["FLUSHALL"], id="dispatcher empties"),
            pytest.param("dispatcher", ["CONFIG", "GET", "*"], id="dispatcher configures"),
            pytest.param("dispatcher", ["GET", "other"], id="dispatcher strays"),
            pytest.param("operator", ["DEL", "hg:{default}:snapshot"], id="operator forgets"),
            pytest.param("viewer", ["DEL", "hg:{default}:requests"], id="viewer deletes"),
            pytest.param("viewer", ["GET", "hg:{default}:body:r"], id="viewer reads a body"),
            pytest.param(
                "viewer", ["XRANGE", "hg:{default}:requests", "-", "+"], id="viewer reads prompts"
            ),
            pytest.param(
                "viewer", ["XINFO", "STREAM", "hg:{default}:results", "FULL"], id="viewer reads all"
            ),
        ],
    )
    def test_a_role_may_do_no_more_than_its_work(self, stack, user, words):
        """A stolen password of one role is not the keys to the house."""
        host, port = stack.address("redis", 6379)
        if user == "default":
            with Connection(f"redis://{host}:{port}/0", timeout_s=5) as redis:
                said = redis.call(*words)
        else:
            with stack.redis(user) as redis:
                said = redis.call(*words)

        assert isinstance(said, Failure)
        assert said.startswith(("NOPERM", "NOAUTH"))


class TestEnd:
    """The last of this file's: it ends the system that the others use."""

    def test_every_role_leaves_at_sigterm(self, stack):
        """`docker compose stop` has nobody to kill, and nothing counts as a failure to be restarted."""
        codes = stack.down()

        assert set(codes.values()) == {0}, codes


DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "headgate.json"

UNSHOWN = {"headgate_retries_total", "headgate_reigns_total"}
"The sum of two that are shown; and what the leader's panel shows as changes."


def rules():
    file = YAML(typ="safe", pure=True).load(ROOT / "deploy/prometheus/rules.yml")
    return [rule for group in file["groups"] for rule in group["rules"]]


def queries():
    """Where it stands, and the query, of everything that is asked of Prometheus."""
    for rule in rules():
        yield rule.get("alert") or rule["record"], rule["expr"]
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"].replace("$__rate_interval", "5m")
    scaled = YAML(typ="safe", pure=True).load(
        ROOT / "deploy/kubernetes/autoscaling/scaledobject.yaml"
    )
    for trigger in scaled["spec"]["triggers"]:
        yield "ScaledObject", trigger["metadata"]["query"]


def selectors(query):
    found = []

    def visit(node):
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(query), pre_visit=visit)
    return found


def shown(text):
    """Names of the series of a metrics page, also of those without a sample yet, and the labels on each."""
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            parts = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
            yield from ((name + part, set()) for part in parts)
        elif line and not line.startswith("#"):
            name, _, rest = line.partition("{")
            yield name.split()[0], set(re.findall(r'(\w+)="', rest))
