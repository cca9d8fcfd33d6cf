"""What a cluster can hold, what it may yet hold, and the words for what it cannot."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.search_cases import make_config
from topotune.errors import ConfigError, ResourceError
from topotune.search.doctor.preflight import fit_resources
from topotune.search.ray.autoscaler import ENVIRONMENT, growth, read_launchers_file
from topotune.search.ray.cluster import UNLIMITED, Cluster, Node, NodeType, needs_of
from topotune.search.ray.session import RaySession
from topotune.search.study.space import resolve
from topotune.search.view import SilentListener


def node(*, free: dict[str, float] | None = None, **has: float) -> Node:
    return Node(has, has if free is None else free)


def cluster(*nodes: Node, types: tuple[NodeType, ...] = (), **more: Any) -> Cluster:
    return Cluster(nodes, types, **more)


def fit(now: Cluster, **resources: Any) -> tuple[float, int]:
    return fit_resources(make_config(resources=resources), now)


GPU_NODES = (NodeType({"CPU": 8, "GPU": 1}, 4), NodeType({"CPU": 2}, 0, head=True))
"""A head and up to four nodes with a GPU each."""


def test_trials_are_fitted_node_by_node() -> None:
    assert fit(cluster(node(CPU=2))) == (0, 2)
    assert fit(cluster(node(CPU=8, GPU=4))) == (1, 4)
    assert fit(cluster(node(CPU=16, GPU=2)), gpus=0.25) == (0.25, 8)
    assert fit(cluster(node(CPU=16, GPU=2)), gpus=0.4) == (0.4, 4)
    assert fit(cluster(node(CPU=16)), concurrency=3, cpus=2) == (0, 3)
    # Three cores each: one trial of two cores on a node, not three on two.
    assert fit(cluster(node(CPU=3), node(CPU=3)), cpus=2) == (0, 2)
    assert fit(cluster(node(CPU=8, GPU=3), node(CPU=8, GPU=1)), gpus=2) == (2, 1)
    mixed = cluster(node(CPU=8), node(CPU=8, site=2), node(CPU=1, site=1))
    assert fit(mixed, custom={"site": 0.5}) == (0, 5)


@pytest.mark.parametrize(
    ("now", "resources", "words"),
    [
        (cluster(node(CPU=2)), {"gpus": 2}, "resources.gpus: a trial needs 2 GPUs .* has 0. Write"),
        (cluster(node(CPU=2)), {"cpus": 64}, "resources.cpus: a trial needs 64 CPUs .* has 2. Low"),
        (
            cluster(node(CPU=4), node(CPU=4)),
            {"cpus": 8},
            r"resources: no single node has 8 CPUs \(the largest has 4\). A trial runs on one node",
        ),
        (
            cluster(node(CPU=4), node(CPU=1, GPU=1)),
            {"cpus": 2, "gpus": 1},
            "no single node has 2 CPUs and 1 GPU. A trial",
        ),
        (
            cluster(node(CPU=4)),
            {"custom": {"site": 1}},
            "resources.custom.site: a trial needs 1 site and the cluster has 0. Start nodes",
        ),
        (
            cluster(node(CPU=2), types=GPU_NODES),
            {"gpus": 8},
            "resources.gpus: a trial needs 8 GPUs and the cluster may get 4",
        ),
        (
            cluster(node(CPU=2), types=GPU_NODES),
            {"gpus": 2},
            r"no single node has 2 GPUs \(the largest has 1\), nor would one that the autoscaler",
        ),
        (
            cluster(node(CPU=2), types=GPU_NODES),
            {"custom": {"site": 1}},
            "needs 1 site and the cluster may get 0",
        ),
    ],
)
def test_what_no_node_can_hold_is_refused(
    now: Cluster, resources: dict[str, Any], words: str
) -> None:
    with pytest.raises(ResourceError, match=words):
        fit(now, **resources)


def test_a_cluster_that_is_still_empty_is_taken_for_what_it_may_become() -> None:
    empty = cluster(node(CPU=2), types=GPU_NODES)
    assert fit(empty) == (1, 4)
    assert fit(empty, gpus=0.5) == (0.5, 8)
    assert fit(empty, gpus=0) == (0, 4 * 8 + 2)
    assert fit(empty, concurrency=3) == (1, 3)
    # Limits of the whole cluster count, too.
    assert fit(cluster(node(CPU=2), types=GPU_NODES, most_workers=3)) == (1, 3)
    assert fit(cluster(node(CPU=2), types=GPU_NODES, limits={"GPU": 2})) == (1, 2)
    # Four nodes are up and there may be no more of them: they are not counted twice.
    full = cluster(*(node(CPU=8, GPU=1) for _ in range(4)), types=GPU_NODES)
    assert fit(full) == (1, 4)
    assert fit(cluster(types=(NodeType({"CPU": 1}, UNLIMITED),)), concurrency=500) == (0, 500)


def waits(now: Cluster, gpus: float = 0, **resources: Any) -> str:
    return now.waits(needs_of(make_config(resources=resources), gpus))


@pytest.mark.parametrize(
    ("now", "gpus", "resources", "words"),
    [
        (
            cluster(node(CPU=8, GPU=4, free={"CPU": 4})),
            1,
            {},
            "each needs 1 GPU, 0 of 4 free",
        ),
        (
            cluster(node(CPU=2, free={})),
            0,
            {},
            "each needs 1 CPU, 0 of 2 free",
        ),
        (
            cluster(node(CPU=4, GPU=2, free={"CPU": 1, "GPU": 0.5})),
            1,
            {"cpus": 2},
            "each needs 2 CPUs, 1 of 4 free and 1 GPU, 0.5 of 2 free",
        ),
        (
            cluster(node(CPU=4, site=1, free={"CPU": 3})),
            0,
            {"custom": {"site": 1}},
            "each needs 1 site, 0 of 1 free",
        ),
        (
            cluster(node(CPU=4, free={"CPU": 1}), node(CPU=4, free={"CPU": 1})),
            0,
            {"cpus": 2},
            "each needs 2 CPUs, 2 of 8 free, on no single node enough",
        ),
        (cluster(node(CPU=4)), 0, {"cpus": 8}, "no single node has 8 CPUs (the largest has 4)"),
        (cluster(node(CPU=4)), 1, {}, "a trial needs 1 GPU and no node has any"),
        (
            cluster(node(CPU=2), types=GPU_NODES),
            1,
            {},
            "each needs 1 GPU, 0 of 0 free; no node that is up is large enough; the autoscaler may "
            "add nodes: up to 4 GPUs",
        ),
        (
            cluster(node(CPU=9, GPU=1, free={"CPU": 8}), types=(NodeType({"GPU": 1}, UNLIMITED),)),
            1,
            {},
            "each needs 1 GPU, 0 of 1 free; the autoscaler may add nodes: up to any number of GPUs",
        ),
        (
            cluster(*[node(CPU=8, GPU=1, free={"CPU": 7})] * 4, types=GPU_NODES),
            1,
            {},
            "each needs 1 GPU, 0 of 4 free; the autoscaler may add no more",
        ),
        (cluster(node(CPU=4, GPU=1)), 0.5, {}, ""),
    ],
)
def test_it_is_said_why_a_trial_waits(
    now: Cluster, gpus: float, resources: dict[str, Any], words: str
) -> None:
    assert waits(now, gpus, **resources) == words


def test_a_trial_that_must_be_alone_needs_a_whole_gpu() -> None:
    config = make_config(resources={"custom": {"site": 2}})
    assert needs_of(config, 0.5) == {"CPU": 1, "GPU": 0.5, "site": 2}
    assert needs_of(config, 0.5, alone=True) == {"CPU": 1, "GPU": 1, "site": 2}
    assert needs_of(config, 2, alone=True)["GPU"] == 2
    assert needs_of(config, 0, alone=True) == {"CPU": 1, "site": 2}


def test_a_trial_that_holds_a_gpu_trains_on_it_where_there_is_one() -> None:
    config = make_config(resources={"cpus": 3})
    assert resolve(config, {"lr": 0.1}, 0, 0).device == "cpu"
    assert resolve(config, {"lr": 0.1}, 0, 0.5).device == "auto"


LAUNCHER = {
    "cluster_name": "gpu",
    "max_workers": 6,
    "provider": {"type": "aws", "region": "us-west-2"},
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 2}, "node_config": {}},
        "gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 4},
        "plain": {"resources": {"CPU": 16}},
        "unknown": {"resources": {}},
    },
}


def test_the_launchers_file_says_what_may_be_added(tmp_path: Path) -> None:
    path = tmp_path / "ray_bootstrap_config.yaml"
    path.write_text(json.dumps(LAUNCHER))
    found = read_launchers_file(path)
    assert found.types == (
        NodeType({"CPU": 2}, 0, head=True),
        NodeType({"CPU": 8, "GPU": 1}, 4),
        NodeType({"CPU": 16}, 6),
    )
    assert found.most_workers == 6
    now = cluster(node(CPU=2), types=found.types, most_workers=found.most_workers)
    assert (now.most("GPU"), now.most("CPU")) == (4, 6 * 16 + 2)
    assert now.most_slots({"CPU": 1.0, "GPU": 1.0}) == 4


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        "available_node_types: {gpu: 3}",
        "available_node_types: {gpu: {resources: {GPU: many}, max_workers: 1}}",
        "available_node_types: {gpu: {resources: {GPU: 1}, max_workers: -1}}",
        "available_node_types: {gpu: {resources: {GPU: 1}, max_workers: 1}}\nmax_workers: '4'",
    ],
)
def test_another_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"cluster.yaml: is no configuration.*{ENVIRONMENT}"):
        read_launchers_file(path)


@pytest.mark.ray
def test_a_real_cluster_is_measured_and_says_what_it_may_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray._private import worker
    from ray._private.state import state
    from ray.util.placement_group import placement_group, remove_placement_group

    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps({"CPU": 2, "GPU": 1, "site": 3}))
    monkeypatch.setenv("HOME", str(tmp_path))
    with RaySession("local", SilentListener()) as session:
        now = session.cluster()
        assert [now.total(name) for name in ("CPU", "GPU", "site", "moon")] == [2, 1, 3, 0]
        assert not now.grows
        assert session.size() == (2, 1)
        held = placement_group([{"CPU": 1, "GPU": 0.5, "site": 3}])
        ray.get(held.ready(), timeout=60)
        now = session.cluster()
        assert [now.free(name) for name in ("CPU", "GPU", "site")] == [1, 0.5, 0]
        assert now.waits({"CPU": 1, "GPU": 1}) == "each needs 1 GPU, 0.5 of 1 free"
        remove_placement_group(held)

        assert growth().types == ()
        (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps(LAUNCHER))
        assert [kind.most for kind in growth().types] == [0, 4, 6]
        other = tmp_path / "other.yaml"
        other.write_text("available_node_types: {gpu: {resources: {GPU: 2}, max_workers: 3}}")
        monkeypatch.setenv(ENVIRONMENT, str(other))
        assert growth().types == (NodeType({"GPU": 2}, 3),)
        # What the cluster itself reports goes first.
        messages: Any = importlib.import_module("ray.core.generated.autoscaler_pb2")
        config = messages.ClusterConfig()
        group = config.node_group_configs.add()
        group.name, group.max_count = "gpu", 5
        group.resources["GPU"], group.resources["CPU"] = 1, 8
        config.max_resources["GPU"] = 4
        client: Any = vars(worker)["global_worker"].gcs_client
        client.report_cluster_config(config.SerializeToString())
        found = growth()
        assert found.types == (NodeType({"CPU": 8, "GPU": 1}, 5),)
        most = Cluster((), found.types, found.most_workers, found.limits)
        assert {
            name: most.most(name) for name in ("CPU", "GPU")
        } == state.get_max_resources_from_cluster_config()
