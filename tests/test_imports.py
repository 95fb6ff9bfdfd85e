"""Who may import whom: the rules that keep the client free of torch and the two processes apart."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "vessa": ROOT / "shared" / "vessa",
    "vessa_server": ROOT / "services" / "vessa" / "vessa_server",
    "vessa_trainer": ROOT / "trainer" / "vessa_trainer",
}
TORCH = {"torch", "torchvision", "timm", "sam2", "transformers"}
WEB = {"fastapi", "starlette", "uvicorn"}
# In the server: the folders and modules that may speak HTTP, and those that may know torch.
HTTP_PARTS = {"app", "api"}
TORCH_PARTS = {"adaptation", "inference", "model", "pretraining"}


def modules(package: str) -> list[Path]:
    """All Python files of one distribution's package."""
    return sorted(PACKAGES[package].rglob("*.py"))


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import, also those inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            # ruff's TID252 bans relative imports; one that got in would escape these rules
            assert node.level == 0, f"relative import on line {node.lineno}"
            yield node.lineno, node.module or ""


def breaches(package: str, forbidden: set[str], exempt: set[str] | None = None) -> list[str]:
    """Return 'file:line imports name' for each forbidden top-level name outside `exempt`."""
    base = PACKAGES[package]
    found = []
    for path in modules(package):
        part = path.relative_to(base).with_suffix("").parts[0]
        if part in (exempt or set()):
            continue
        for line, name in imported(path.read_text(encoding="utf-8")):
            if name.split(".")[0] in forbidden:
                found.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_package_has_modules(package: str) -> None:
    assert len(modules(package)) > 1


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("vessa", {"vessa_server", "vessa_trainer", "redis", *TORCH, *WEB}),
        ("vessa_server", {"vessa_trainer"}),
        ("vessa_trainer", {"vessa_server", *WEB}),
    ],
)
def test_package_keeps_to_its_side(package: str, forbidden: set[str]) -> None:
    assert breaches(package, forbidden) == []


def test_web_framework_stays_in_app_and_api() -> None:
    assert breaches("vessa_server", WEB, exempt=HTTP_PARTS) == []


def test_torch_stays_in_its_four_folders() -> None:
    assert breaches("vessa_server", TORCH, exempt=TORCH_PARTS) == []


def test_model_and_pretraining_know_nothing_of_the_service() -> None:
    above = {
        "app",
        "api",
        "auth",
        "cli",
        "serialization",
        "serving",
        "settings",
        "template_bank",
        "volume_jobs",
    }
    base = PACKAGES["vessa_server"]
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for part in ("model", "pretraining")
        for path in sorted((base / part).rglob("*.py"))
        for line, name in imported(path.read_text(encoding="utf-8"))
        if name.split(".")[0] == "vessa_server" and name.split(".")[1:2] and name.split(".")[1] in above
    ]
    assert found == []


@pytest.mark.parametrize(
    "path", [path for package in PACKAGES for path in modules(package) if path.name == "losses.py"], ids=str
)
def test_losses_import_torch_alone(path: Path) -> None:
    others = {
        name.split(".")[0]
        for _, name in imported(path.read_text(encoding="utf-8"))
        if name.split(".")[0] not in {"torch", *sys.stdlib_module_names}
    }
    assert others == set()


def test_no_module_is_named_after_a_dependency_or_after_nothing() -> None:
    dependencies = {"redis", "torch", "numpy", "httpx", "pydantic", "safetensors", "training", *TORCH, *WEB}
    nothing = {"utils", "util", "helpers", "helper", "misc", "common"}
    names = {path: path.stem for package in PACKAGES for path in modules(package)}
    names |= {path.parent: path.parent.name for path in names if path.name == "__init__.py"}
    assert [str(path) for path, name in names.items() if name in dependencies | nothing] == []


def test_nothing_runs_code_from_a_file() -> None:
    """No pickle, no torch.load of objects, no YAML tags, no pickled arrays."""
    found = []
    for path in (path for package in PACKAGES for path in modules(package)):
        source = path.read_text(encoding="utf-8")
        where = path.relative_to(ROOT)
        found += [
            f"{where}:{line} imports {name}"
            for line, name in imported(source)
            if name.split(".")[0] in {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
        ]
        found += [f"{where}:{call.lineno}" for call in ast.walk(ast.parse(source)) if _runs_code(call)]
    assert found == []


def _runs_code(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    match ast.unparse(node.func):
        case "torch.load":
            return options.get("weights_only") != "True"
        case "yaml.load" | "yaml.unsafe_load" | "yaml.full_load" | "eval" | "exec":
            return True
        case _:
            return options.get("allow_pickle") == "True"
