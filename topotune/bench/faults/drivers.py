"""Faults of the driver: killed, stopped, or not alone."""

from __future__ import annotations

from topotune.bench.faults.invariants import audit
from topotune.bench.faults.scenario import Scenario, expect
from topotune.bench.faults.site import NAME, Site


def _second_driver(site: Site) -> str:
    file = site.search_file()
    first = site.start("search", file)
    site.reach(first, 0, 1)
    refused = site.run("resume", NAME, code=2, seconds=60)
    expect(f"pid {first.pid}" in refused, f"the holder is not named: {refused}")
    first.finish()
    return f"refused: {refused.strip()[-120:]}; {audit(site)}"


DRIVERS = (
    Scenario(
        "second-driver",
        "a second driver on the same search",
        "refused at once, naming host and pid; the first goes on",
        _second_driver,
    ),
)
