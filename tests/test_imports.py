"""Hold the import rules by folder: the client free of torch, the two sides apart, no circles."""

from __future__ import annotations

import ast
import json
import sys

import layout
import pytest
from layout import HTTP_PARTS, PACKAGES, TORCH, TORCH_PARTS, WEB, breaches, imported, modules

# Features beside the main path, and the modules that may use each.
SIDE_FEATURES = {
    "vessa_server.active_learning": {
        "vessa_server.api.suggest",
        "vessa_server.api.viewers.monailabel",
        "vessa_server.app",
    },
    "vessa_server.adaptation": {"vessa_server.inference.annotator"},
    "vessa_server.model.language.remote": {
        "vessa_server.cli.weights",
        "vessa_server.inference.annotator",
        "vessa_server.model.weights.directory",
        "vessa_server.serving.worker",
    },
    "vessa_server.replicas": {"vessa_server.cli.main"},
}


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


def test_web_framework_stays_in_its_parts() -> None:
    assert breaches("vessa_server", WEB, HTTP_PARTS) == []


def test_torch_stays_in_its_four_folders() -> None:
    assert breaches("vessa_server", TORCH, TORCH_PARTS) == []


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
        "viewers",
        "volume_jobs",
    }
    found = [
        f"{module.name}:{line} imports {name}"
        for module in modules("vessa_server")
        if module.part in ("model", "pretraining")
        for line, name in imported(module)
        if name.split(".")[0] == "vessa_server" and name.split(".")[1] in above
    ]
    assert found == []


@pytest.mark.parametrize("feature", SIDE_FEATURES)
def test_a_side_feature_is_used_through_its_folder_and_from_few_modules(feature: str) -> None:
    outside = [m for package in PACKAGES for m in modules(package) if not m.name.startswith(feature)]
    inside = {m.name for package in PACKAGES for m in modules(package) if m.name.startswith(f"{feature}.")}
    uses = {(m.name, name) for m in outside for _, name in imported(m) if name.startswith(feature)}
    assert {user for user, _ in uses} == SIDE_FEATURES[feature]
    reached = {part for _, name in uses for part in inside if f"{name}.".startswith(f"{part}.")}
    assert reached == set(), "import from the folder itself, not from its modules"


def test_modules_import_each_other_in_no_circle() -> None:
    found = [module for package in PACKAGES for module in modules(package)]
    assert layout.circles(layout.import_graph(found)) == []


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"d"}}
    assert layout.circles(graph) == [["a", "b", "c"]]


def test_folders_stay_narrow() -> None:
    sizes = layout.folder_sizes([module for package in PACKAGES for module in modules(package)])
    assert {folder: size for folder, size in sizes.items() if size > 12} == {}


def test_layout_ends_in_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    layout.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["circles"] == figures["fastapi_outside"] == figures["torch_outside"] == 0
    assert figures["widest_folder"] <= 12


@pytest.mark.parametrize(
    "module",
    [m for package in PACKAGES for m in modules(package) if m.path.name == "losses.py"],
    ids=lambda module: module.name,
)
def test_losses_import_torch_alone(module: layout.Module) -> None:
    others = {
        name.split(".")[0]
        for _, name in imported(module)
        if name.split(".")[0] not in {"torch", *sys.stdlib_module_names}
    }
    assert others == set()


def test_no_module_is_named_after_a_dependency_or_after_nothing() -> None:
    dependencies = {"redis", "torch", "numpy", "httpx", "pydantic", "safetensors", "training", *TORCH, *WEB}
    nothing = {"utils", "util", "helpers", "helper", "misc", "common"}
    names = [module.name for package in PACKAGES for module in modules(package)]
    assert [name for name in names if name.rpartition(".")[2] in dependencies | nothing] == []


def test_nothing_runs_code_from_a_file() -> None:
    """No pickle, no torch.load of objects, no YAML tags, no pickled arrays."""
    found = []
    for module in (module for package in PACKAGES for module in modules(package)):
        found += [
            f"{module.name}:{line} imports {name}"
            for line, name in imported(module)
            if name.split(".")[0] in {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
        ]
        found += [f"{module.name}:{call.lineno}" for call in ast.walk(module.tree) if _runs_code(call)]
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
