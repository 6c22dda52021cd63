"""As much of `kustomize build` as deploy/kubernetes uses, so that its result can be checked without the program.

Resources, components, ConfigMap generators with their hashes, patches (strategic merge and JSON), images, labels
and the namespace; an unknown field of a kustomization is an error. Where kubectl is installed, a test compares.
"""

import copy
import hashlib
import json

from ruamel.yaml import YAML

KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "ports": "containerPort",
    "volumeMounts": "mountPath",
}
"What tells the elements of a list apart in a strategic merge; a list that is not named here is replaced."

FIELDS = {
    "apiVersion",
    "kind",
    "namespace",
    "resources",
    "components",
    "configMapGenerator",
    "patches",
    "images",
    "labels",
}


def load(text):
    return [one for one in YAML(typ="safe", pure=True).load_all(text) if one]


def build(folder):
    """All resources of a kustomization, as `kubectl kustomize` prints them, in no order."""
    resources = _accumulated(folder)
    renamed = {}
    for one in resources:
        if one.pop("generated", False):
            old = one["metadata"]["name"]
            renamed[old] = one["metadata"]["name"] = f"{old}-{config_hash(one)}"
    for one in resources:
        for place in places(one, "configMap"):
            place["name"] = renamed.get(place["name"], place["name"])
    return resources


def config_hash(config):
    """The suffix that kustomize gives a ConfigMap (api/hasher): ten characters of a SHA-256.

    It means to hash the name as well, looks for it by a wrong path, and so always finds none.
    """
    plain = json.dumps(
        {"data": config["data"], "kind": "ConfigMap", "name": ""},
        separators=(",", ":"),
        sort_keys=True,
        ensure_ascii=False,
    )
    for sign in "<>&":  # as Go's encoder writes them
        plain = plain.replace(sign, f"\\u{ord(sign):04x}")
    digest = hashlib.sha256(plain.encode()).hexdigest()
    return digest[:10].translate(str.maketrans("013ae", "ghkmt"))


def _accumulated(folder, below=()):
    [own] = load((folder / "kustomization.yaml").read_text())
    unknown = own.keys() - FIELDS
    assert not unknown, f"{folder}: {unknown}"
    found = list(below)
    for name in own.get("resources", ()):
        path = folder / name
        found += _accumulated(path) if path.is_dir() else load(path.read_text())
    found += [_config_map(folder, wanted) for wanted in own.get("configMapGenerator", ())]
    for name in own.get("components", ()):
        found = _accumulated(folder / name, found)
    for patch in own.get("patches", ()):
        _patch(found, patch, folder)
    for one in found:
        if "namespace" in own:
            one["metadata"]["namespace"] = own["namespace"]
        for label in own.get("labels", ()):
            _label(one, label)
        for image in own.get("images", ()):
            _rename(one, image)
    return found


def _config_map(folder, wanted):
    data = {}
    for entry in wanted["files"]:
        key, _, path = entry.rpartition("=")
        data[key or path] = (folder / path).read_text()
    metadata = {"name": wanted["name"]}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "data": data,
        "generated": True,
    }


def _patch(resources, patch, folder):
    [change] = load(patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text())
    chosen = [one for one in resources if _is_target(one, patch["target"])]
    assert chosen, f"{folder}: no resource is {patch['target']}"
    for one in chosen:
        if isinstance(change, list):
            for step in change:
                _step(one, step)
        else:
            named = one["metadata"]["name"]
            one.update(merged(one, change))
            one["metadata"]["name"] = named  # a patch with a target may be called anything


def _is_target(one, target):
    label, _, value = target.get("labelSelector", "=").partition("=")
    return (
        one["kind"] == target["kind"]
        and target.get("name") in (None, one["metadata"]["name"])
        and (not label or one["metadata"].get("labels", {}).get(label) == value)
    )


def _step(one, step):
    assert step["op"] == "replace", step
    *way, last = [int(part) if part.isdigit() else part for part in step["path"].split("/")[1:]]
    for part in way:
        one = one[part]
    assert last in one, step
    one[last] = step["value"]


def merged(old, new, field=""):
    """A strategic merge: maps by key, known lists by their elements' names, everything else replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        both = {name: merged(old[name], new[name], name) for name in old.keys() & new.keys()}
        return {**old, **copy.deepcopy(new), **both}
    if isinstance(old, list) and isinstance(new, list) and field in KEYS:
        key = KEYS[field]
        before, after = ({one[key]: one for one in many} for many in (old, new))
        return list(merged(before, after).values())
    return copy.deepcopy(new)


def _label(one, label):
    assert not label.get("includeSelectors")
    labelled = [one]
    if label.get("includeTemplates"):
        spec = one.get("spec", {})
        labelled += [spec["template"]] if "template" in spec else []
        labelled += spec.get("volumeClaimTemplates", [])
    for part in labelled:
        part["metadata"].setdefault("labels", {}).update(label["pairs"])


def _rename(one, image):
    for field in ("containers", "initContainers"):
        for many in places(one, field):
            for container in many:
                if container["image"].partition(":")[0] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"


def places(value, field):
    """Every value of this field, however deep."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict) and field in value:
        yield value[field]
    for part in parts:
        yield from places(part, field)
