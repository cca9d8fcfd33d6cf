"""The files of cluster/ are valid to the programs that read them, and closed by default."""

from __future__ import annotations

import copy
import importlib.resources
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster_files import CLUSTER, FILES, ROOT, compose, printed, tool

LAUNCHER = sorted(CLUSTER.glob("ray-cluster.*.yaml"))
SCRIPTS = [*sorted(CLUSTER.rglob("*.sh")), CLUSTER / "slurm.sbatch"]
OVERLAYS = [(), ("compose.private.yaml",), ("compose.tls.yaml",)]


def names(config: dict[str, Any], service: str) -> set[str]:
    return {secret["source"] for secret in config["services"][service].get("secrets", [])}


@pytest.mark.parametrize("overlays", OVERLAYS, ids=lambda o: "+".join(o) or "alone")
def test_compose_resolves(overlays: tuple[str, ...]) -> None:
    services = compose(*overlays)["services"]
    assert set(services) == {
        "postgres", "mlflow", "account", "head", "worker", "gpu-worker", "minio", "bucket",
    }  # fmt: skip
    assert compose(workers="5")["services"]["worker"]["deploy"]["replicas"] == 5


def test_compose_wants_the_folder_of_secrets() -> None:
    command = [tool("docker-compose"), "-f", str(CLUSTER / "compose.yaml"), "config"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin"})
    assert done.returncode != 0
    assert "TOPOTUNE_SECRETS" in done.stderr
    assert "cluster/README.md" in done.stderr


def test_compose_publishes_on_loopback_only() -> None:
    ports = {
        service: [(port["host_ip"], port["published"]) for port in body.get("ports", [])]
        for service, body in compose()["services"].items()
    }
    assert {service for service, found in ports.items() if found} == {"mlflow", "head"}
    assert {where for found in ports.values() for where, _ in found} == {"127.0.0.1"}
    assert ports["head"] == [("127.0.0.1", "8265")]  # neither 6379 nor 10001


def test_the_private_overlay_publishes_on_the_given_address_only() -> None:
    services = compose("compose.private.yaml")["services"]
    for service, port in (("postgres", "5432"), ("mlflow", "5000")):
        found = {(p["host_ip"], p["published"]) for p in services[service]["ports"]}
        assert found <= {("127.0.0.1", port), ("192.0.2.7", port)}
        assert ("192.0.2.7", port) in found


def test_compose_gives_each_service_its_own_secrets_only() -> None:
    config = compose()
    assert names(config, "worker") == names(config, "gpu-worker") == {"ray_token", "s3_secret_key"}
    assert "mlflow_admin_password" not in names(config, "head")
    assert "ray_token" not in names(config, "mlflow")
    assert "PGPASSWORD_FILE" not in config["services"]["worker"]["environment"]
    assert config["services"]["head"]["command"].count("--num-cpus=0") == 1  # no trial code there
    for secret in config["secrets"].values():
        assert secret["file"].startswith("/nowhere/")


def test_every_container_is_without_privileges() -> None:
    for name, body in compose()["services"].items():
        assert body["cap_drop"] == ["ALL"], name
        assert body["security_opt"] == ["no-new-privileges:true"], name
        assert not body.get("privileged"), name
        assert set(body["networks"]) == {"inside"}, name
        image, _, tag = body["image"].partition(":")
        assert tag, name
        assert image == "topotune" or tag != "latest", name


@pytest.mark.parametrize("overlays", OVERLAYS, ids=lambda o: "+".join(o) or "alone")
def test_mlflow_asks_for_a_password_and_serves_artifacts(overlays: tuple[str, ...]) -> None:
    server = compose(*overlays)["services"]["mlflow"]
    for flag in ("--app-name=basic-auth", "--serve-artifacts"):
        assert flag in server["command"]
    assert [flag for flag in server["command"] if flag.startswith("--artifacts-destination=")]
    hosts = next(f for f in server["command"] if f.startswith("--allowed-hosts="))
    assert "*" not in hosts.partition("=")[2].split(",")
    assert server["environment"]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_the_overlays_change_what_they_say_of_mlflow_and_nothing_else() -> None:
    plain = compose()["services"]["mlflow"]["command"]
    for overlay, expected in (("private", "--allowed-hosts="), ("tls", "--uvicorn-opts=")):
        changed = compose(f"compose.{overlay}.yaml")["services"]["mlflow"]["command"]
        assert all(flag.startswith(expected) for flag in set(changed) - set(plain))
        assert all(flag.startswith("--allowed-hosts=") for flag in set(plain) - set(changed))


def test_mlflow_knows_every_flag() -> None:
    text = printed(tool("mlflow"), "server", "--help")
    for overlays in OVERLAYS:
        for flag in compose(*overlays)["services"]["mlflow"]["command"][2:]:
            assert re.search(rf"{flag.partition('=')[0]}\b", text), flag


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda p: p.name)
def test_the_launcher_takes_the_file(path: Path) -> None:
    """Its schema, and what `ray up` does before it calls a cloud."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    schema = json.loads(
        importlib.resources.files("ray.autoscaler").joinpath("ray-schema.json").read_text()
    )
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "no_such_key": 1}, schema)
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    types = prepared["available_node_types"]
    if config["provider"]["type"] != "local":
        assert types["head"]["resources"] == {"CPU": 0}
        workers = {name: body for name, body in types.items() if name != "head"}
        assert all(body["min_workers"] == 0 for body in workers.values())
        assert max(workers, key=lambda name: workers[name].get("priority", 0)) == "gpu-spot"
        assert "SPOT" in json.dumps(workers["gpu-spot"]).upper()
    mounts = config["file_mounts"]
    assert [there for there in mounts if there.endswith("/.ray/auth_token")]
    assert all(here == "." or here.startswith("~/.config/") for here in mounts.values())


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda p: p.name)
def test_the_launcher_opens_nothing(path: Path) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert (
        "security_group" not in config["provider"]
    )  # the launcher's own lets SSH in from anywhere
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert [line for line in starts if "--dashboard-host=127.0.0.1" in line]
    for line in starts:
        assert "RAY_AUTH_MODE=token" in line
        assert "0.0.0.0" not in line
        subprocess.run(["bash", "-n", "-c", line], check=True)
    for line in config["setup_commands"] + config["worker_setup_commands"]:
        subprocess.run(["bash", "-n", "-c", line], check=True)


def test_what_workers_forget_of_the_environment(tmp_path: Path) -> None:
    """The line that takes the stores' passwords from a worker does."""
    config = yaml.safe_load(LAUNCHER[0].read_text(encoding="utf-8"))
    folder = tmp_path / ".config" / "topotune"
    folder.mkdir(parents=True)
    file = folder / "cluster.env"
    file.write_text("TOPOTUNE_STORAGE=s3://b/r\nPGPASSWORD=x\nMLFLOW_TRACKING_PASSWORD=y\n")
    for line in config["worker_setup_commands"]:
        subprocess.run(["bash", "-c", line], check=True, env={"HOME": str(tmp_path)})
    assert file.read_text() == "TOPOTUNE_STORAGE=s3://b/r\n"


def test_the_dockerfile() -> None:
    path = CLUSTER / "Dockerfile"
    assert printed(tool("hadolint"), "--no-color", path) == ""
    text = path.read_text(encoding="utf-8")
    assert re.search(r"^ARG BASE_IMAGE=python:\d+\.\d+\.\d+-", text, re.M)
    assert re.findall(r"^USER (.*)$", text, re.M) == ["${UID}:${GID}"]
    assert re.search(r"^ARG UID=[1-9]", text, re.M)
    assert "UV_COMPILE_BYTECODE=1" in text
    assert "HEALTHCHECK" in text
    installs = re.findall(r"uv pip install (.*?)(?:;|&&|\n)", text)
    assert installs
    assert all("-c constraints.txt" in line or "--no-deps ." in line for line in installs)
    # What it copies is what .dockerignore lets through.
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [
        part
        for line in re.findall(r"^COPY (.*)$", text, re.M)
        for part in line.split()[:-1]
        if not part.startswith("--")
    ]
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied)
    assert all((ROOT / part).exists() for part in copied)


def test_what_the_image_installs_is_pinned() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
    extras = re.findall(r"--extra (\w+)", (CLUSTER / "Dockerfile").read_text(encoding="utf-8"))
    assert extras == ["cluster", "aws", "gcp"]
    wanted = [*project["dependencies"]]
    wanted += [line for extra in extras for line in project["optional-dependencies"][extra]]
    assert {re.split(r"[^\w-]", line)[0].lower() for line in wanted} <= pinned


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_sound(path: Path) -> None:
    assert printed(tool("shellcheck"), "--shell=bash", path) == ""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text


def test_the_entrypoint_reads_secrets_from_files(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("a secret\n", encoding="utf-8")
    script = CLUSTER / "entrypoint.sh"
    show = ["bash", "-c", 'echo "$PGPASSWORD|${PGPASSWORD_FILE-gone}|$1"', "-", "a b"]
    assert printed(script, *show, PGPASSWORD_FILE=str(secret)) == "a secret|gone|a b\n"
    assert printed(script, *show, PGPASSWORD="given") == "given|gone|a b\n"
    done = subprocess.run(
        [script, "true"], capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "PGPASSWORD_FILE": str(tmp_path / "absent")},
    )  # fmt: skip
    assert done.returncode == 2
    assert "PGPASSWORD_FILE" in done.stderr


SECRET = re.compile(
    r"(?i)(?:password|secret|token|key)[\"']?\s*[:=]\s*[\"']?(?=[a-z]*\d)[a-z0-9+/]{12,}"
    r"|[a-f0-9]{32,}|AKIA[A-Z0-9]{12,}|-----BEGIN|://[^/\s:@\"]+:[^/\s@\"]+@"
)


def test_what_looks_like_a_secret_would_be_found() -> None:
    for line in ("password: hunter2hunter2", "postgresql://a:b@host/c", "AKIAIOSFODNN7EXAMPLE"):
        assert SECRET.search(line)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CLUSTER)))
def test_no_file_holds_a_secret(path: Path) -> None:
    assert not SECRET.search(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CLUSTER)))
def test_every_start_of_ray_has_the_token(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if re.search(r"\bray[\"\s,-]+start\b|^kind: RayCluster", text, re.M) and path.suffix != ".md":
        assert re.search(r"RAY_AUTH_MODE[=:] ?token|mode: token", text)
    assert "RAY_AUTH_MODE=disabled" not in text


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CLUSTER)))
def test_files_begin_with_what_they_are(path: Path) -> None:
    assert re.match(r"#|;", path.read_text(encoding="utf-8"))
