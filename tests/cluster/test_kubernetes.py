"""The manifests of cluster/kuberay: valid to Kubernetes and KubeRay, and closed by default."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.cluster_files import CLUSTER, documents, printed
from topotune.search.ray.autoscaler import read_launchers_file

KUBERAY = CLUSTER / "kuberay"
VERSION = "1.32"
OWN = {"kustomization.yaml", "images.yaml", "growth.yaml"}
RAY = "ray.io/v1"

# The part of KubeRay's CRDs (release 1.6) that the files use; what is not here is refused. Pods are
# checked against Kubernetes' own schema besides.
TEXT, NUMBER, YES_NO = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
PODS = {"type": "object"}
PARAMETERS = {"type": "object", "additionalProperties": TEXT}


def strict(required: list[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


WORKERS = strict(
    ["groupName", "template"],
    groupName=TEXT,
    replicas=NUMBER,
    minReplicas=NUMBER,
    maxReplicas=NUMBER,
    rayStartParams=PARAMETERS,
    template=PODS,
)
CLUSTER_SPEC = strict(
    ["headGroupSpec"],
    rayVersion=TEXT,
    authOptions=strict([], mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    enableInTreeAutoscaling=YES_NO,
    autoscalerOptions=strict(
        [],
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=NUMBER,
        resources={"type": "object"},
        securityContext={"type": "object"},
    ),
    headGroupSpec=strict(
        ["template"],
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        rayStartParams=PARAMETERS,
        template=PODS,
    ),
    workerGroupSpecs={"type": "array", "items": WORKERS},
)
JOB_SPEC = strict(
    [],
    clusterSelector=PARAMETERS,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    entrypoint=TEXT,
)
METADATA = strict(["name"], name=TEXT, namespace=TEXT)
CRD = {
    kind: strict(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": RAY},
        kind={"const": kind},
        metadata=METADATA,
        spec=spec,
    )
    for kind, spec in (("RayCluster", CLUSTER_SPEC), ("RayJob", JOB_SPEC))
}


@cache
def objects() -> list[dict[str, Any]]:
    """Everything that the folder makes, file by file."""
    paths = sorted(path for path in KUBERAY.glob("*.yaml") if path.name not in OWN)
    return [document for path in paths for document in documents(path)]


def one(kind: str, name: str) -> dict[str, Any]:
    (found,) = (o for o in objects() if o["kind"] == kind and o["metadata"]["name"] == name)
    return found


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod that the objects describe, with its name."""
    for item in objects():
        spec, name = item.get("spec", {}), f"{item['kind']}/{item['metadata']['name']}"
        if item["kind"] == "RayCluster":
            yield f"{name}/head", spec["headGroupSpec"]["template"]["spec"]
            for group in spec["workerGroupSpecs"]:
                yield f"{name}/{group['groupName']}", group["template"]["spec"]
        elif "template" in spec:
            yield name, spec["template"]["spec"]


def check(item: dict[str, Any]) -> None:
    if item["apiVersion"] == RAY:
        jsonschema.validate(item, CRD[item["kind"]])
    else:
        kubernetes_validate.validate(item, VERSION, strict=True)


@pytest.mark.parametrize(
    "item", objects(), ids=lambda item: f"{item['kind']}-{item['metadata']['name']}"
)
def test_objects_are_valid(item: dict[str, Any]) -> None:
    check(item)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check({**item, "noSuchField": 1})


def test_pods_of_ray_are_valid() -> None:
    for name, spec in pods():
        if name.startswith("Ray"):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, "spec": spec}
            check(pod)
            with pytest.raises(kubernetes_validate.ValidationError):
                check({**pod, "spec": {**spec, "noSuchField": 1}})


def test_what_kuberay_asks_beyond_its_schema() -> None:
    cluster = one("RayCluster", "topotune")["spec"]
    pinned = (CLUSTER.parent / "constraints.txt").read_text(encoding="utf-8")
    assert f"\nray=={cluster['rayVersion']}\n" in pinned
    assert cluster["authOptions"] == {"mode": "token", "secretName": "topotune-ray-token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert all(group["minReplicas"] == 0 < group["maxReplicas"] for group in groups.values())
    limits = groups["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 1
    job = one("RayJob", "topological-adam-mnist5k")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": "topotune"}
    assert job["metadata"]["namespace"] == one("Namespace", "topotune")["metadata"]["name"]


def test_every_pod_is_restricted() -> None:
    found = dict(pods())
    assert len(found) == 6
    for name, spec in found.items():
        general = spec["securityContext"]
        assert general["runAsNonRoot"], name
        assert general["runAsUser"] > 0, name
        assert general["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        assert not [volume for volume in spec["volumes"] if "hostPath" in volume], name
        if name != "RayCluster/topotune/head":  # its autoscaler asks the API server
            assert spec["automountServiceAccountToken"] is False, name
        for container in spec["containers"]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False, name
            assert own["capabilities"] == {"drop": ["ALL"]}, name
            assert {"cpu", "memory"} <= set(container["resources"]["limits"]), name
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name
    labels = one("Namespace", "topotune")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_secrets_come_by_reference_only() -> None:
    assert not [item for item in objects() if item["kind"] == "Secret"]
    for name, spec in pods():
        for entry in (e for container in spec["containers"] for e in container.get("env", [])):
            if any(word in entry["name"] for word in ("PASSWORD", "SECRET", "TOKEN")):
                assert set(entry["valueFrom"]["secretKeyRef"]) == {"name", "key"}, name
    workers = [spec for name, spec in pods() if name.endswith(("/gpu", "/cpu"))]
    assert "secretKeyRef" not in yaml.safe_dump(workers)


def test_the_same_server_as_compose() -> None:
    (container,) = one("Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    plain = yaml.safe_load((CLUSTER / "compose.yaml").read_text(encoding="utf-8"))
    command = plain["services"]["mlflow"]["command"]
    different = set(command) ^ set(container["args"])
    assert all(flag.startswith("--allowed-hosts=") for flag in different)


def reach(policy: str, way: str) -> list[tuple[Any, list[int]]]:
    """Whom a policy lets in or out, by label, and on which ports."""
    rules = one("NetworkPolicy", policy)["spec"].get("ingress" if way == "from" else "egress", [])
    return [
        (peer, [port["port"] for port in rule.get("ports", [])])
        for rule in rules
        for peer in rule[way]
    ]


def test_the_network_is_closed_but_for_what_is_listed() -> None:
    everything = one("NetworkPolicy", "deny-all")["spec"]
    assert everything == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    ray = {"podSelector": {"matchLabels": {"ray.io/cluster": "topotune"}}}
    mlflow = {"podSelector": {"matchLabels": {"app": "mlflow"}}}
    assert reach("postgres", "from") == [(mlflow, [5432]), (ray, [5432])]
    assert reach("postgres", "to") == []
    assert reach("ray-nodes", "from") == [(ray, [])]
    assert [ports for _, ports in reach("ray-head", "from")] == [[8265], [8265]]
    assert reach("ray-head", "from")[0][0] == {"podSelector": {}}
    assert reach("mlflow", "from") == [({"podSelector": {}}, [5000])]
    for policy in ("ray-nodes", "ray-head"):  # never the metadata service, with the node's keys
        for peer, _ in reach(policy, "to"):
            assert "169.254.0.0/16" in peer.get("ipBlock", {"except": ["169.254.0.0/16"]})["except"]
    for item in (o for o in objects() if o["kind"] == "NetworkPolicy"):
        for rule in item["spec"].get("ingress", []):
            assert rule["from"], item["metadata"]["name"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_builds_it() -> None:
    built = list(yaml.safe_load_all(printed("kubectl", "kustomize", KUBERAY)))
    for item in built:
        if item["kind"] not in ("RayCluster", "RayJob"):
            kubernetes_validate.validate(item, VERSION, strict=True)
        if item["kind"] != "Namespace":
            assert item["metadata"]["namespace"] == "topotune"
    (cluster,) = (item for item in built if item["kind"] == "RayCluster")
    jsonschema.validate(cluster, CRD["RayCluster"])
    images = {
        container["image"]
        for spec in (cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"])
        for container in spec["template"]["spec"]["containers"]
    }
    assert images == {"topotune:0.2.0"}
    # The script's map got a name of its own, and the server's volume follows it.
    maps = {item["metadata"]["name"]: item["data"] for item in built if item["kind"] == "ConfigMap"}
    (script,) = (name for name, data in maps.items() if "databases.sh" in data)
    (server,) = (item for item in built if item["kind"] == "StatefulSet")
    assert script in yaml.safe_dump(server)
    volumes = cluster["spec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    (growth,) = (one["configMap"]["name"] for one in volumes if "configMap" in one)
    assert "growth.yaml" in maps[growth]


def test_every_file_is_in_the_kustomization() -> None:
    listed = documents(KUBERAY / "kustomization.yaml")[0]
    there = {path.name for path in KUBERAY.glob("*.yaml")} - OWN - {"rayjob.yaml"}
    assert set(listed["resources"]) == there  # a search is started on purpose


def test_drivers_are_told_what_the_autoscaler_may_add() -> None:
    (cluster,) = documents(CLUSTER / "kuberay" / "raycluster.yaml")
    (growth,) = documents(CLUSTER / "kuberay" / "growth.yaml")
    groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    assert set(groups) == set(growth["available_node_types"])
    for name, kind in growth["available_node_types"].items():
        limits = groups[name]["template"]["spec"]["containers"][0]["resources"]["limits"]
        has = {"CPU": int(limits["cpu"])}
        has |= {"GPU": limits["nvidia.com/gpu"]} if "nvidia.com/gpu" in limits else {}
        assert kind["resources"] == has
        assert kind["max_workers"] == groups[name]["maxReplicas"]
    assert growth["max_workers"] == sum(group["maxReplicas"] for group in groups.values())
    read = read_launchers_file(CLUSTER / "kuberay" / "growth.yaml")
    assert [kind.most for kind in read.types] == [8, 4]
