"""Which nodes an autoscaler may add to the cluster, as far as the cluster or its head says.

Ray's GCS has it where a platform has reported it there. Clusters of ``ray up`` do not: theirs
stands in the file that the launcher left on the head, where drivers run. Where neither is, as
under KubeRay, ``TOPOTUNE_AUTOSCALER_CONFIG`` on the head names a file of the launcher's form, of
which ``available_node_types`` and ``max_workers`` are read::

    max_workers: 8
    available_node_types:
      gpu: {resources: {CPU: 8, GPU: 1}, max_workers: 8}
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topotune.config.file import read_yaml
from topotune.errors import ConfigError
from topotune.search.ray.cluster import UNLIMITED, Amounts, NodeType
from topotune.search.ray.ray_internals import cluster_config

ENVIRONMENT = "TOPOTUNE_AUTOSCALER_CONFIG"
LAUNCHERS_FILE = Path("~/ray_bootstrap_config.yaml")
"""Where ``ray up`` leaves its configuration on the head."""


@dataclass(frozen=True)
class Growth:
    """What an autoscaler may have up; see :class:`topotune.search.ray.cluster.Cluster`."""

    types: tuple[NodeType, ...] = ()
    most_workers: int = UNLIMITED
    limits: Amounts = field(default_factory=dict)


def growth() -> Growth:
    """Of the cluster that this process is connected to; nothing where neither source has it.

    Raises:
        ConfigError: the file that says it is not of the launcher's form.
    """
    found = _reported()
    if found.types:
        return found
    if named := os.environ.get(ENVIRONMENT):
        return read_launchers_file(Path(named).expanduser())
    path = LAUNCHERS_FILE.expanduser()
    return read_launchers_file(path) if path.is_file() else Growth()


def _reported() -> Growth:
    """What Ray's GCS knows."""
    config = cluster_config()
    if config is None:
        return Growth()
    types = tuple(
        NodeType(dict(group.resources), group.max_count if group.max_count >= 0 else UNLIMITED)
        for group in config.node_group_configs
    )
    return Growth(types, limits=dict(config.max_resources))


def read_launchers_file(path: Path) -> Growth:
    """The node types in a file of the cluster launcher's form.

    Types whose resources it does not give are left out: only their nodes know what they have.

    Raises:
        ConfigError: it is missing or of another form.
    """
    content, _ = read_yaml(path)
    try:
        most = _count(content.get("max_workers", UNLIMITED))
        head = content.get("head_node_type")
        types = content["available_node_types"]
        known = tuple(_type(kind, name == head, most) for name, kind in types.items())
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigError(
            str(path),
            f"is no configuration of Ray's cluster launcher ({type(error).__name__}: {error})",
            "It needs available_node_types with resources and max_workers of each; see "
            f"{ENVIRONMENT}",
        ) from error
    return Growth(tuple(kind for kind in known if kind.has), most)


def _type(kind: Mapping[str, Any], head: bool, most: int) -> NodeType:
    has = {str(name): float(amount) for name, amount in (kind.get("resources") or {}).items()}
    return NodeType(has, _count(kind.get("max_workers", 0 if head else most)), head)


def _count(number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"expected a number of nodes, got {number!r}")
    return number
