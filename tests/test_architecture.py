"""The walls of the house: who may import whom, and how large a file may grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import topotune

PACKAGE = Path(topotune.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py"))
ROOM_ORDER = (
    ("__init__", "errors", "records", "plugins", "requirements", "seeding", "files", "redaction"),
    ("settings", "repository"),
    ("config",),
    ("optim", "data", "tcep"),
    ("models",),
    ("tasks",),
    ("tracking", "results"),
    ("train",),
    ("search",),
    ("service",),
    ("bench", "testing"),
    ("cli", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(ROOM_ORDER) for name in names}
THIRD_PARTY_HOMES = {
    "ray": {"search/ray", "service"},
    "optuna": {"search/study"},
    "sqlalchemy": {"search/study", "search/place"},
    "mlflow": {"tracking/mlflow.py"},
    "torchvision": {"data"},
    "mlxtend": {"data"},
    "sklearn": {"data"},
    "pydantic": {"config"},
    "typer": {"cli", "bench"},
    "rich": {"cli", "bench"},
    "matplotlib": {"results"},
    "torchdiffeq": {"tcep"},
    "safetensors": {"results"},
    "pyarrow": {"search/place"},
}
GPU_MACHINE = ("optim", "tcep", "models", "data", "tasks", "train", "records", "errors", "plugins")
NOT_THERE = {"ray", "optuna", "mlflow", "pydantic"}


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether only for type checking) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            typing_only.update(ast.walk(node))
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in typing_only) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            found += [(f"{node.module}.{alias.name}", node in typing_only) for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    here = room(path)
    if path == PACKAGE / "__init__.py":
        return  # the front door re-exports lazily
    for module, _ in imports(path):
        top, _, rest = module.partition(".")
        if top == "topotune":
            there = rest.partition(".")[0]
            if there in LEVEL:  # else a name of the front door, such as __version__
                assert LEVEL[there] <= LEVEL[here], f"{here} imports {module}"
        elif top in THIRD_PARTY_HOMES:
            name = str(path.relative_to(PACKAGE))
            homes = THIRD_PARTY_HOMES[top]
            assert any(f"{name}/".startswith(f"{home}/") for home in homes), f"{name} imports {top}"


def test_no_files_import_each_other() -> None:
    """Imports inside of functions and those for type checking count, too."""
    modules = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in FILES}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    graph = {
        name: {
            there
            for module, _ in imports(path)
            for there in (module, module.rpartition(".")[0])
            if there in modules and there not in (name, "topotune")
        }
        for name, path in modules.items()
    }
    circles = {
        name.removeprefix("topotune.")
        for name in modules
        if any(name in reachable(graph, there) for there in graph[name])
    }
    assert not circles


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """All that a file imports, directly or not."""
    found, left = {start}, [start]
    while left:
        left += (new := graph[left.pop()] - found)
        found |= new
    return found


def test_results_and_tracking_read_records_only() -> None:
    for path in FILES:
        if room(path) in ("results", "tracking"):
            for module, _ in imports(path):
                if module.startswith("topotune."):
                    there = module.split(".")[1]
                    assert there in {room(path), "records", "errors", "files", "redaction"}, (
                        path,
                        module,
                    )


def test_the_torch_only_part_needs_nothing_that_a_gpu_machine_lacks() -> None:
    for path in FILES:
        if room(path) in GPU_MACHINE:
            for module, _ in imports(path):
                assert module.partition(".")[0] not in NOT_THERE, (path, module)


def test_every_file_has_a_place_in_the_order() -> None:
    assert {room(path) for path in FILES} <= set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_hold_one_concept(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


@pytest.mark.parametrize(
    "statement",
    ["import topotune", "import topotune.cli.main", "from topotune.cli.main import app"],
)
def test_light_imports_stay_light(statement: str) -> None:
    code = (
        f"{statement}; import sys; "
        "print([m for m in ('torch', 'ray', 'mlflow', 'optuna', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


ONLY_FOR_CLUSTERS_AND_STORES = (
    *("torch", "ray", "mlflow", "pyarrow", "psycopg"),
    *(f"topotune.search.place.objects.{name}" for name in ("store", "replica", "mirror")),
    *("topotune.search.place.row_lease", "topotune.search.ray.sharing", "topotune.service"),
)


@pytest.mark.parametrize(
    "module",
    [
        "topotune.search.driver",
        "topotune.search.status",
        "topotune.search.doctor.machine",
        "topotune.search.doctor.cluster",
        "topotune.search.doctor.preflight",
        "topotune.tracking.outbox",
        "topotune.tracking.shipper",
    ],
)
def test_rooms_are_entered_only_where_they_are_needed(module: str) -> None:
    """Driver, outbox and doctor load nothing that only a cluster or an object store needs."""
    code = (
        f"import {module}, sys; "
        f"print([m for m in {ONLY_FOR_CLUSTERS_AND_STORES} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
