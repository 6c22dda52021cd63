"""deploy/kubernetes: it builds, the API servers would take it, and it fits together."""

import json
import re
import shutil
import subprocess

import composed
import jsonschema
import kustomized
import pytest
from composed import ROOT
from ruamel.yaml import YAML

from scheduler.parsing import parse
from workers import worker

FOLDER = ROOT / "deploy" / "kubernetes"
EXAMPLE = FOLDER / "overlays" / "example"
SCHEMAS = json.loads((ROOT / "tests" / "schemas" / "kubernetes.json").read_text())


@pytest.fixture(scope="module")
def built():
    return kustomized.build(EXAMPLE)


def one(built, kind, name):
    [found] = [r for r in built if (r["kind"], r["metadata"]["name"]) == (kind, name)]
    return found


def pods(built):
    return {
        r["metadata"]["name"]: r["spec"]["template"]
        for r in built
        if "template" in r.get("spec", {})
    }


def containers(pod):
    return [*pod["spec"]["containers"], *pod["spec"].get("initContainers", ())]


def named(container):
    """Environment of a container; None for what comes from elsewhere."""
    return {entry["name"]: entry.get("value") for entry in container.get("env", ())}


class TestSchema:
    @pytest.mark.parametrize("folder", ["base", "overlays/example"])
    def test_every_resource_is_what_its_api_server_takes(self, folder):
        """Known kinds with known fields: Kubernetes', KEDA's and the Prometheus operator's schemas, closed."""
        for resource in kustomized.build(FOLDER / folder):
            kind = f"{resource['apiVersion']} {resource['kind']}"
            schema = SCHEMAS["kinds"][kind] | {"$defs": SCHEMAS["$defs"]}
            jsonschema.Draft202012Validator(schema).validate(resource)

    def test_the_check_sees_a_misspelt_field(self, built):
        """The schemas are closed: an API server would drop the field in silence."""
        wrong = json.loads(json.dumps(one(built, "ScaledObject", "headgate-vllm")))
        wrong["spec"]["minReplicas"] = 0
        schema = SCHEMAS["kinds"]["keda.sh/v1alpha1 ScaledObject"] | {"$defs": SCHEMAS["$defs"]}

        with pytest.raises(jsonschema.ValidationError, match="minReplicas"):
            jsonschema.validate(wrong, schema)

    @pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl to compare with")
    def test_kubectl_builds_the_same(self, built):
        """Our reading of kustomize is kustomize's, where it is installed."""
        done = subprocess.run(
            ["kubectl", "kustomize", EXAMPLE], capture_output=True, text=True, check=True
        )

        assert ordered(kustomized.load(done.stdout)) == ordered(built)


def ordered(value):
    """The same whatever the order of resources, and of lists whose elements have names."""
    if isinstance(value, dict):
        return {name: ordered(part) for name, part in value.items()}
    if isinstance(value, list):
        return (
            sorted(
                (ordered(part) for part in value), key=lambda part: json.dumps(part, sort_keys=True)
            )
            if any(isinstance(part, dict) for part in value)
            else value
        )
    return value


class TestFits:
    def test_what_is_named_exists(self, built):
        """Config maps, services and pods that something refers to are there."""
        maps = {r["metadata"]["name"] for r in built if r["kind"] == "ConfigMap"}
        assert {place["name"] for r in built for place in kustomized.places(r, "configMap")} == maps
        labels = [pod["metadata"]["labels"] for pod in pods(built).values()]
        for resource in built:
            spec = resource.get("spec", {})
            selector = {
                "Service": spec.get("selector"),
                "NetworkPolicy": spec.get("podSelector", {}).get("matchLabels"),
                "PodDisruptionBudget": spec.get("selector", {}).get("matchLabels"),
            }.get(resource["kind"])
            if selector:
                assert any(selector.items() <= own.items() for own in labels), resource["metadata"]

    def test_ports_have_names_that_their_containers_know(self, built):
        """A probe or service that names an unknown port never succeeds."""
        known = {
            p["name"] for pod in pods(built).values() for c in containers(pod) for p in c["ports"]
        }
        asked = {
            p["targetPort"] for r in built if r["kind"] == "Service" for p in r["spec"]["ports"]
        }
        probes = {
            g["port"] for pod in pods(built).values() for g in kustomized.places(pod, "httpGet")
        }

        assert asked | probes <= known
        [monitor] = [r for r in built if r["kind"] == "ServiceMonitor"]
        served = {
            p["name"]
            for r in built
            if r["kind"] == "Service"
            and monitor["spec"]["selector"]["matchLabels"].items()
            <= r["metadata"]["labels"].items()
            for p in r["spec"]["ports"]
        }
        assert {e["port"] for e in monitor["spec"]["endpoints"]} <= served

    def test_every_redis_user_that_is_mounted_is_made_by_the_script(self, built):
        """The secret's keys are the files that users.sh writes."""
        made = {path.name for path in (ROOT / "deploy/redis/example").iterdir()}
        wanted = {
            item["key"]
            for pod in pods(built).values()
            for volume in pod["spec"]["volumes"]
            if "secret" in volume
            for item in volume["secret"]["items"]
        }

        assert {"dispatcher", "door", "worker", "users.acl"} <= wanted <= made

    def test_who_needs_redis_is_let_through_to_it(self, built):
        """The network policy's label is on the dispatchers, the doors and every pod with a worker."""
        [rule] = one(built, "NetworkPolicy", "headgate-redis")["spec"]["ingress"]
        wanted = rule["from"][0]["podSelector"]["matchLabels"].items()
        found = pods(built)
        assert all(
            wanted <= found[name]["metadata"]["labels"].items()
            for name in ("headgate-dispatcher", "headgate-door", "vllm")
        )

    def test_who_may_knock_at_the_door_says_so(self, built):
        """Its API is for pods with the label, its metrics for whoever scrapes; it reaches Redis and names only."""
        policy = one(built, "NetworkPolicy", "headgate-door")["spec"]
        api, metrics = policy["ingress"]
        assert api["from"] == [
            {"podSelector": {"matchLabels": {"headgate.io/door-client": "true"}}}
        ]
        assert [p["port"] for p in api["ports"]] == ["http"]
        assert [p["port"] for p in metrics["ports"]] == ["metrics"]
        assert [p["port"] for rule in policy["egress"] for p in rule["ports"]] == ["redis", 53, 53]

    def test_a_door_has_the_time_to_end(self, built):
        """Its hook, its drain and its last cancellations fit into what Kubernetes gives it."""
        spec = pods(built)["headgate-door"]["spec"]
        [door] = spec["containers"]
        hook_s = float(door["lifecycle"]["preStop"]["exec"]["command"][1])
        drain_s = float(named(door)["HEADGATE_DOOR_DRAIN_S"])

        assert spec["terminationGracePeriodSeconds"] >= hook_s + drain_s + 10

    def test_our_pods_are_locked_down(self, built):
        """No root, nothing to write to, no privileges, no token of the cluster."""
        found = pods(built)
        own = [found[name] for name in ("headgate-redis", "headgate-dispatcher", "headgate-door")]
        ours = [container for pod in own for container in containers(pod)]
        [sidecar] = found["vllm"]["spec"]["initContainers"]
        for container in [*ours, sidecar]:
            rules = container["securityContext"]
            assert rules["readOnlyRootFilesystem"], container["name"]
            assert not rules["allowPrivilegeEscalation"], container["name"]
            assert rules["capabilities"] == {"drop": ["ALL"]}, container["name"]
            assert container["resources"]["limits"]["memory"], container["name"]
        for pod in own:
            assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert all(pod["spec"]["automountServiceAccountToken"] is False for pod in found.values())

    def test_settings_are_accepted(self, built):
        """The file that the roles will read, with the variables that they will find, has no unknown name."""
        [config] = [r for r in built if r["metadata"]["name"].startswith("headgate-settings-")]
        for name in ("headgate-dispatcher", "headgate-door", "vllm"):
            pod = pods(built)[name]
            for container in containers(pod):
                environ = {k: v for k, v in named(container).items() if v is not None}
                settings = parse(config["data"]["headgate.toml"], environ | {"HEADGATE_POOL": "p"})
                assert settings.redis.url == "redis://headgate-redis:6379/0"

    @pytest.mark.parametrize("pod", ["headgate-dispatcher", "headgate-door", "vllm"])
    def test_commands_exist(self, built, pod):
        """Each role's command is one of ours, with options that it has."""
        [ours] = [
            c for c in containers(pods(built)[pod]) if c["image"].startswith("example/headgate:")
        ]
        done = subprocess.run(
            [composed.program("headgate"), *ours["args"], "--help"],
            capture_output=True,
            text=True,
            check=False,
        )

        assert done.returncode == 0, done.stderr


class TestSidecar:
    def test_the_worker_stands_beside_the_engine(self, built):
        """Its --engine is understood, and points at the port that vLLM listens on."""
        pod = pods(built)["vllm"]
        [sidecar] = pod["spec"]["initContainers"]
        environ = named(sidecar) | {"POD_NAME": "vllm-7f-x"}
        text = re.sub(r"\$\((\w+)\)", lambda m: environ[m[1]], sidecar["args"][2])

        engine = worker.address(text)

        assert (engine.name, engine.hardware, engine.max_num_seqs) == ("vllm-7f-x", "h100", 512)
        assert engine.by_priority
        [vllm] = pod["spec"]["containers"]
        assert engine.url.endswith(f":{vllm['ports'][0]['containerPort']}")
        assert f"--max-num-seqs={engine.max_num_seqs}" in vllm["args"]

    def test_the_engine_outlives_the_drain(self, built):
        """A native sidecar ends last; so the hooks make vLLM wait until the worker's own port is closed."""
        spec = pods(built)["vllm"]["spec"]
        [sidecar], [vllm] = spec["initContainers"], spec["containers"]
        environ = named(sidecar)

        assert sidecar["restartPolicy"] == "Always"
        assert "startupProbe" not in sidecar
        assert sidecar["lifecycle"]["preStop"]["exec"]["command"][-1] == "kill -TERM 1"
        waits = vllm["lifecycle"]["preStop"]["exec"]["command"][-1]
        assert f'("127.0.0.1", {environ["HEADGATE_WORKER_METRICS_PORT"]})' in waits
        compile(waits, "preStop", "exec")
        drain_s = float(environ["HEADGATE_WORKER_DRAIN_S"]) + worker.SETTLE_S
        assert spec["terminationGracePeriodSeconds"] >= drain_s + 10

    def test_what_the_deployment_said_stays(self, built):
        """The patch adds to vLLM's own volumes, mounts and labels and takes nothing away."""
        [original] = kustomized.load((EXAMPLE / "vllm.yaml").read_text())
        pod, before = pods(built)["vllm"], original["spec"]["template"]
        assert before["metadata"]["labels"].items() <= pod["metadata"]["labels"].items()
        assert [v for v in pod["spec"]["volumes"] if v in before["spec"]["volumes"]] == before[
            "spec"
        ]["volumes"]
        [vllm] = pod["spec"]["containers"]
        assert {k: v for k, v in vllm.items() if k != "lifecycle"} == before["spec"]["containers"][
            0
        ]


class TestScaling:
    def test_nothing_that_waits_is_left_without_a_replica(self, built):
        """From zero by the activation gauge; to zero only by a zero that was said, never by silence."""
        spec = one(built, "ScaledObject", "headgate-vllm")["spec"]
        assert spec["minReplicaCount"] == 0
        triggers = {t["metadata"]["query"]: t for t in spec["triggers"]}
        active = triggers['max(headgate_active{pool="default"})']
        assert (
            float(active["metadata"]["activationThreshold"])
            < 1
            <= float(active["metadata"]["threshold"])
        )
        assert all(t["metadata"]["ignoreNullValues"] == "false" for t in spec["triggers"])
        assert "fallback" not in spec  # with one, an error may scale to its count

    def test_it_scales_what_has_the_sidecar(self, built):
        """The target is a Deployment of the overlay, beside which there is a worker."""
        target = one(built, "ScaledObject", "headgate-vllm")["spec"]["scaleTargetRef"]["name"]

        assert pods(built)[target]["metadata"]["labels"]["headgate.io/role"] == "worker"

    def test_the_documented_alternative_is_valid(self):
        """What docs/DEPLOYMENT.md offers to those without Prometheus is taken as it stands there."""
        text = (ROOT / "docs" / "DEPLOYMENT.md").read_text()
        [block] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
        found = kustomized.load(block)
        for resource in found:
            schema = SCHEMAS["kinds"][f"keda.sh/v1alpha1 {resource['kind']}"]
            jsonschema.validate(resource, schema | {"$defs": SCHEMAS["$defs"]})

        assert [r["kind"] for r in found] == ["TriggerAuthentication", "ScaledObject"]

    def test_rules_are_prometheus_own(self, built):
        """The operator's copy of the rules says what deploy/prometheus/rules.yml says."""
        rules = YAML(typ="safe", pure=True).load(ROOT / "deploy/prometheus/rules.yml")

        assert one(built, "PrometheusRule", "headgate")["spec"] == rules
