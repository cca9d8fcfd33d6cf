"""How busy a trial's machine is, under the names that MLflow's page of system metrics reads."""

from __future__ import annotations

import sys
import time

import psutil

EVERY = 10.0
"""Seconds between two samples, MLflow's own interval."""
_MB = 1e6


class SystemMetrics:
    """Samples the machine when asked, at most every ``EVERY`` seconds after the first sample.

    Made when a trial begins: the first sample's share of the CPUs is that since then.
    """

    def __init__(self) -> None:
        psutil.cpu_percent()
        self._due = 0.0

    def sample(self) -> dict[str, float]:
        """Metric name to value; empty where the last sample is too recent.

        CPUs in percent of all, memory in MB (1e6 bytes, as MLflow counts) and percent, disk of the
        root file system in percent; of each GPU that torch sees, its memory in use.
        """
        if (now := time.monotonic()) < self._due:
            return {}
        self._due = now + EVERY
        memory = psutil.virtual_memory()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MB,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": psutil.disk_usage("/").percent,
        }
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            for index in range(torch.cuda.device_count()):
                free, total = torch.cuda.mem_get_info(index)
                values[f"gpu_{index}_memory_usage_megabytes"] = (total - free) / _MB
                values[f"gpu_{index}_memory_usage_percentage"] = 100 * (total - free) / total
        return {f"system/{name}": float(value) for name, value in values.items()}
