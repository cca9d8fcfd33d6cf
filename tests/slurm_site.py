"""A Slurm of two nodes on this machine, for the tests: real daemons, a folder of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tests.cluster.test_run import free_port

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/run/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
KillWait=60
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={n0} CPUs=4 RealMemory=4000 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why Slurm cannot run here; empty where it can."""
    absent = [name for name in DAEMONS if shutil.which(name, path=search_path()) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root"


def search_path() -> str:
    """The path with the folders of daemons."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Slurm:
    """Munge, a controller and two nodes; ended when it is left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ, "PATH": search_path(), "SLURM_CONF": str(folder / "slurm.conf"),
        }  # fmt: skip
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        folder = self.folder
        folder.chmod(0o755)
        for name in ("state", "spool.n0", "spool.n1", "run"):
            (folder / name).mkdir()
        shutil.chown(folder / "run", "munge", "munge")
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        shutil.chown(key, "munge", "munge")
        key.chmod(0o400)
        ports = {name: free_port() for name in ("controller", "n0", "n1")}
        text = CONFIG.format(folder=folder, host=socket.gethostname(), **ports)
        (folder / "slurm.conf").write_text(text, encoding="utf-8")
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={folder}/run/munge.socket", f"--pid-file={folder}/run/munged.pid",
            f"--log-file={folder}/run/munged.log", f"--seed-file={folder}/run/seed",
            user="munge", group="munge", extra_groups=[],
        )  # fmt: skip
        self._until(lambda: (folder / "run" / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D", "-c")
        for node in ("n0", "n1"):
            self._daemon("slurmd", "-D", "-N", node)
        self._until(lambda: self.ask("sinfo", "-h", "-o", "%D %t") == "2 idle", "slurmctld")

    def _daemon(self, name: str, *options: str, **rights: Any) -> None:
        log = self._stack.enter_context((self.folder / f"{name}.out").open("ab"))
        program = shutil.which(name, path=search_path())
        process = subprocess.Popen(
            [str(program), *options], env=self.environment, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL, **rights,
        )  # fmt: skip
        self._stack.callback(end, process)

    def _until(self, ready: Any, name: str) -> None:
        over = time.monotonic() + 60
        while not ready():
            logs = sorted(self.folder.rglob("*.log")) + sorted(self.folder.glob("*.out"))
            told = "".join(path.read_text(errors="replace")[-500:] for path in logs)
            assert time.monotonic() < over, f"{name} does not start: {told}"
            time.sleep(0.3)

    def ask(self, *command: str, **changes: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            command, env={**self.environment, **changes}, capture_output=True, text=True,
            cwd=self.folder, timeout=60,
        )  # fmt: skip
        return done.stdout.strip()

    def wait(self, job: str, seconds: float) -> dict[str, str]:
        """The fields of a job once it is over."""
        over = time.monotonic() + seconds
        while self.ask("squeue", "-h", "-j", job, "-o", "%t") not in ("", "CD", "F", "CA"):
            assert time.monotonic() < over, (self.folder / f"{job}.log").read_text()[-3000:]
            time.sleep(1)
        text = self.ask("scontrol", "show", "job", job)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
