"""The charts, rendered by Helm itself and held against the schemas of Kubernetes and KubeRay."""

import json
import re
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).parent / "helm"
RENDERED = [
    ("offsite-coordinator", None),
    ("offsite-coordinator", "large.yaml"),
    ("offsite-coordinator", "small.yaml"),
    ("offsite-site", "site.yaml"),
    ("offsite-site", "kit.yaml"),
]
pytestmark = pytest.mark.slow  # fetches Helm


@pytest.fixture(params=RENDERED, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def manifests(helm, request):
    chart, values = request.param
    rendered = helm(chart, "template", values=HERE / values if values else None)
    assert rendered.returncode == 0, rendered.stderr
    return list(yaml.safe_load_all(rendered.stdout))


def pods(manifests):
    """The pods of all that is rendered."""
    for manifest in manifests:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "StatefulSet":
            yield spec["template"]["spec"]
        elif manifest["kind"] == "RayCluster":
            yield from (group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]))


@pytest.mark.parametrize(("chart", "values"), [pair for pair in RENDERED if pair[1] or "site" not in pair[0]])
def test_helm_finds_nothing_wrong(helm, chart, values) -> None:
    lint = helm(chart, "lint", "--strict", values=HERE / values if values else None)
    assert lint.returncode == 0, lint.stdout


def test_kubernetes_and_kuberay_take_every_manifest(manifests) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate")
    jsonschema = pytest.importorskip("jsonschema")
    ray = closed(json.loads((HERE / "raycluster.schema.json").read_text()))
    for manifest in manifests:
        if manifest["kind"] == "RayCluster":
            jsonschema.validate(manifest, ray)
        else:
            kubernetes.validate(manifest, "1.33", strict=True)


def closed(schema):
    """A schema that takes no field beyond those it lists: a cluster drops them without a word."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    names = {"properties", "additionalProperties", "x-kubernetes-preserve-unknown-fields"} & schema.keys()
    more = {"additionalProperties": False} if names == {"properties"} else {}
    return {name: closed(value) for name, value in schema.items()} | more


def test_every_container_is_locked_up_and_has_no_account(manifests) -> None:
    for pod in pods(manifests):
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
        assert pod["automountServiceAccountToken"] is False
        volumes = {volume["name"] for volume in pod["volumes"]} | {"home", "work"}
        for container in (*pod.get("initContainers", []), *pod["containers"]):
            assert container["securityContext"] == {
                "readOnlyRootFilesystem": True,
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert "limits" in container["resources"]
        assert all("livenessProbe" in container for container in pod["containers"])


def test_no_secret_but_the_blobs_and_the_token_of_ray_reaches_a_node_without_a_gateway(helm) -> None:
    manifests = list(yaml.safe_load_all(helm("offsite-coordinator", "template").stdout))
    ray = next(manifest for manifest in manifests if manifest["kind"] == "RayCluster")
    text = json.dumps(ray)
    assert "offsite-blobs" in text and "offsite-journal" not in text and "offsite-kit" not in text


def test_a_redis_keeps_the_head_s_state_and_gateways_wait_for_the_head_as_kuberay_has_workers_do(helm) -> None:
    def rendered(values):
        return list(yaml.safe_load_all(helm("offsite-coordinator", "template", values=values).stdout))

    waits = "RAY_gcs_rpc_server_reconnect_timeout_s"
    assert waits not in json.dumps(rendered(None)) and "gcsFaultTolerance" not in json.dumps(rendered(None))
    manifests = {manifest["kind"]: manifest for manifest in rendered(HERE / "large.yaml")}
    options = manifests["RayCluster"]["spec"]["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == "redis.example.org:6379"
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == {"name": "redis", "key": "password"}
    for container in manifests["StatefulSet"]["spec"]["template"]["spec"]["containers"]:
        assert {"name": waits, "value": "600"} in container["env"]


def test_the_product_takes_what_containers_run(manifests, takes) -> None:
    ran = []
    for pod in pods(manifests):
        scripts = [container["command"][-1] for container in pod.get("initContainers", [])]
        ran += [takes(line.split()) for script in scripts for line in re.findall(r"offsite (site .*)", script)]
        for container in pod["containers"]:
            command = [*container.get("command", ["tini", "--", "offsite"]), *container.get("args", [])]
            if command[2] == "offsite" and not container["name"].startswith("ray-"):  # those KubeRay starts
                ran.append(takes([str(word) for word in command[3:]]))
    assert ran


@pytest.mark.parametrize(
    ("chart", "wrong", "said"),
    [
        ("offsite-coordinator", "replicas=2,stores.journalSecret=", "several gateways share nothing but their stores"),
        ("offsite-coordinator", "stores.blobsSecret=", "nodes of a cluster share no folder"),
        ("offsite-coordinator", "replica=2", "'replica' not allowed"),
        ("offsite-coordinator", "ray.objectStore=1TB", "objectStore"),
        ("offsite-site", "policy=x", "coordinator: HOST:PORT is missing"),
        ("offsite-site", "coordinator=a:1", "policy is missing"),
        ("offsite-site", "coordinator=a:1,policy=x,trainer.zeroStage=4", "zeroStage"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_name(helm, chart, wrong, said) -> None:
    rendered = helm(chart, "template", "--set", wrong)
    assert rendered.returncode and said in rendered.stderr, rendered.stderr
