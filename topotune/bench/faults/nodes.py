"""A cluster of several nodes on one machine, one of which is lost."""

from __future__ import annotations

import re
import secrets
import sys
from contextlib import suppress

import psutil

from topotune.bench.faults.invariants import audit
from topotune.bench.faults.ports import free_port
from topotune.bench.faults.scenario import Scenario, expect
from topotune.bench.faults.site import Site


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
        for process in (*self.processes(), self.process):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def holds(self, pid: int) -> bool:
        """Whether a process is one of this node's."""
        return pid in {process.pid for process in self.processes()}

    def processes(self) -> list[psutil.Process]:
        """All processes below ``ray start``: what serves the node, and the workers on it."""
        with suppress(psutil.NoSuchProcess):
            return list(psutil.Process(self.process.pid).children(recursive=True))
        return []


def with_token() -> dict[str, str]:
    """The environment of a cluster that asks for a token: a new, random one."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def start_head(site: Site, environment: dict[str, str]) -> tuple[Node, str]:
    """The head of a cluster, which runs no trial itself; and the cluster's address."""
    port = free_port()
    arguments = ("--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false")
    head = Node(site, environment, *arguments)
    found = re.search(rf"[\w.:]+:{port}", head.output())
    expect(found is not None, f"no address: {head.output()[-500:]}")
    return head, "" if found is None else found[0]


def _node_killed(site: Site) -> str:
    token = with_token()
    environment = site.environment(token)
    _, address = start_head(site, environment)
    nodes = [Node(site, environment, f"--address={address}", "--num-cpus=1") for _ in range(2)]
    budget = {"trials": 4, "epochs": 5, "max_failures": 0}
    resources = {"concurrency": 2}
    file = site.search_file({"pause": 0.3}, budget=budget, resources=resources)
    driver = site.start("search", file, "--ray-address", address, env=token)
    site.reach(driver, 0, 1)
    site.reach(driver, 1, 1)
    begun = site.trained()
    site.wait(lambda: site.trained() > begun, 60, "no further epoch has begun")
    worker = site.at_work()  # has a whole epoch before it, whatever the other one is at
    lost = [node for node in nodes if node.holds(worker)]
    expect(len(lost) == 1, f"worker {worker} is on {len(lost)} nodes")
    lost[0].kill()
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
