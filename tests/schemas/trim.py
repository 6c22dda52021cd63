"""Make kubernetes.json: the schemas of the kinds that deploy/kubernetes uses, and nothing else.

    python tests/schemas/trim.py DEFINITIONS.json CRD.yaml... > tests/schemas/kubernetes.json

DEFINITIONS.json is `_definitions.json` of a strict set of the package kubernetes-validate; the CRDs are the
files of their projects' releases. README.md beside this names the versions. Prose is dropped, which is most
of their size, and a CRD's objects are closed: the API server would prune an unknown field in silence.
"""

import json
import sys
from pathlib import Path

from ruamel.yaml import YAML

KINDS = (
    "io.k8s.api.apps.v1.Deployment",
    "io.k8s.api.apps.v1.StatefulSet",
    "io.k8s.api.core.v1.ConfigMap",
    "io.k8s.api.core.v1.Secret",
    "io.k8s.api.core.v1.Service",
    "io.k8s.api.core.v1.ServiceAccount",
    "io.k8s.api.networking.v1.NetworkPolicy",
    "io.k8s.api.policy.v1.PodDisruptionBudget",
)


def trimmed(schema):
    """The schema without prose."""
    if isinstance(schema, list):
        return [trimmed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: {inner: trimmed(part) for inner, part in value.items()}
        if name == "properties"
        else trimmed(value)
        for name, value in schema.items()
        if name == "properties" or not (name == "description" or name.startswith("x-kubernetes-g"))
    }


def referred(schema):
    """Every definition that the schema names."""
    if isinstance(schema, list):
        return {name for part in schema for name in referred(part)}
    if not isinstance(schema, dict):
        return set()
    own = {schema["$ref"].rpartition("/")[2]} if isinstance(schema.get("$ref"), str) else set()
    return own.union(*(referred(part) for part in schema.values()))


def closed(schema):
    """A CRD's schema that refuses the fields which it does not know."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: closed(part) for name, part in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if (
        isinstance(schema.get("properties"), dict)
        and schema.get("type") == "object"
        and not is_open
    ):
        inner["additionalProperties"] = False
    return inner


def core(definitions):
    """The built-in kinds and all that they refer to."""
    kept, wanted = {}, set(KINDS)
    while wanted:
        name = wanted.pop()
        kept[name] = trimmed(definitions[name])
        wanted |= referred(kept[name]) - kept.keys()
    kinds = {}
    for name in KINDS:
        [place] = definitions[name]["x-kubernetes-group-version-kind"]
        version = "/".join(part for part in (place["group"], place["version"]) if part)
        kinds[f"{version} {place['kind']}"] = {"$ref": f"#/$defs/{name}"}
    return kinds, kept


def custom(path):
    """A CRD's kind, by version, and its closed schema."""
    spec = YAML(typ="safe", pure=True).load(path)["spec"]
    for version in spec["versions"]:
        schema = closed(trimmed(version["schema"]["openAPIV3Schema"]))
        schema["properties"]["metadata"] = {
            "$ref": "#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
        }
        yield f"{spec['group']}/{version['name']} {spec['names']['kind']}", schema


def main():
    definitions, *crds = map(Path, sys.argv[1:])
    kinds, kept = core(json.loads(definitions.read_text())["$defs"])
    for path in crds:
        kinds.update(custom(path))
    json.dump({"kinds": kinds, "$defs": kept}, sys.stdout, separators=(",", ":"), sort_keys=True)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
