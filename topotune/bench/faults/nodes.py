"""A cluster of several nodes on one machine, one of which is lost."""

from __future__ import annotations

import re
import secrets
import sys

import psutil

from topotune.bench.faults.invariants import audit
from topotune.bench.faults.scenario import Scenario, expect
from topotune.bench.faults.site import Site

_PORT = 6479


class Node:
    """A Ray node of its own, as ``ray start`` makes it.

    Args:
        site: whose processes it belongs to.
        environment: with the token of the cluster.
        arguments: of ``ray start``.
    """

    def __init__(self, site: Site, environment: dict[str, str], *arguments: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        command += ["--disable-usage-stats", *arguments]
        self.process, self._log = site.spawn(command, environment)
        site.wait(lambda: "block forever" in self.output(), 60, "no node", self.output)

    def output(self) -> str:
        """What it has printed."""
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        """Kill -9 every process of the node, as a machine does that loses power."""
        me = psutil.Process(self.process.pid)
        for process in (*me.children(recursive=True), me):
            process.kill()
        self.process.wait()

    def trains(self) -> bool:
        """Whether a worker of this node is at a trial."""
        tree = psutil.Process(self.process.pid).children(recursive=True)
        return any("ResourceTrainable" in " ".join(process.cmdline()) for process in tree)


def _node_killed(site: Site) -> str:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = site.environment(token)
    head = Node(
        site,
        environment,
        *("--head", f"--port={_PORT}", "--num-cpus=0", "--include-dashboard=false"),
    )
    found = re.search(rf"[\w.:]+:{_PORT}", head.output())
    expect(found is not None, f"no address: {head.output()[-500:]}")
    address = "" if found is None else found[0]
    nodes = [Node(site, environment, f"--address={address}", "--num-cpus=1") for _ in range(2)]
    budget = {"trials": 4, "epochs": 5, "max_failures": 0}
    resources = {"concurrency": 2}
    file = site.search_file({"pause": 0.3}, budget=budget, resources=resources)
    driver = site.start("search", file, "--ray-address", address, env=token)
    site.reach(driver, 0, 1)
    site.reach(driver, 1, 1)
    (lost,) = [node for node in nodes if node.trains()][:1]
    lost.kill()
    output = driver.finish()
    moved = [line for line in output.splitlines() if "goes on from its last epoch" in line]
    expect(bool(moved), "no trial was moved")
    expect("its node was lost" in moved[0], f"the cause: {moved[0]}")
    states = site.states()
    expect(set(states.values()) == {"COMPLETE"}, f"states {states}")
    waits = "; it was said why a trial waited" if "1 waiting: each needs" in output else ""
    return f"{moved[0]}{waits}; {audit(site, undisturbed=False)}"


NODES = (
    Scenario(
        "node-killed",
        "kill -9 of one of two nodes of a cluster, with budget.max_failures: 0",
        "its trials go on elsewhere from their last epoch, counted as the loss of a node",
        _node_killed,
        seconds=90,
    ),
)
