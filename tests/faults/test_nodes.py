"""A cluster of several nodes on one machine, one of which is lost."""

from __future__ import annotations

from contextlib import suppress

import psutil
import pytest

from tests.faults.invariants import audit
from tests.faults.site import Seen, Site
from topotune.bench.scaling.processes import Node, start_head, with_token


@pytest.mark.faults
def test_node_killed(site: Site, seen: Seen) -> None:
    """Kill -9 of one of two nodes of a cluster, with budget.max_failures: 0: its trials go on
    elsewhere from their last epoch, counted as the loss of a node."""
    token = with_token()
    environment = site.environment(token)
    _, address = start_head(site, environment)
    nodes = [Node(site, environment, f"--address={address}", "--num-cpus=1") for _ in range(2)]
    budget = {"trials": 4, "epochs": 5, "max_failures": 0}
    site.search_file({"pause": 0.3}, budget=budget, resources={"concurrency": 2})
    driver = site.search(0, 1, "--ray-address", address, env=token)
    site.reach(driver, 1, 1)
    begun = site.trained()
    site.wait(lambda: site.trained() > begun, 60, "no further epoch has begun")
    worker = site.at_work()  # has a whole epoch before it, whatever the other one is at
    lost = [node for node in nodes if worker in {process.pid for process in node.processes()}]
    assert len(lost) == 1, f"worker {worker} is on {len(lost)} nodes"
    kill(lost[0])
    output = driver.finish()
    moved = [line for line in output.splitlines() if "goes on from its last epoch" in line]
    assert moved, "no trial was moved"
    assert "its node was lost" in moved[0], f"the cause: {moved[0]}"
    states = site.states()
    assert set(states.values()) == {"COMPLETE"}, f"states {states}"
    waits = "; it was said why a trial waited" if "1 waiting: each needs" in output else ""
    seen(f"{moved[0]}{waits}; {audit(site, undisturbed=False)}")


def kill(node: Node) -> None:
    """Kill -9 every process of the node, as a machine does that loses power."""
    for process in (*node.processes(), node.process):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    node.process.wait()
