"""Measure the layout of the three packages: modules per folder, long functions, import rules.

python scripts/layout.py        prints tables and ends in one line of JSON (`make layout`)
"""

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "vessa": ROOT / "shared" / "vessa",
    "vessa_server": ROOT / "services" / "vessa" / "vessa_server",
    "vessa_trainer": ROOT / "trainer" / "vessa_trainer",
}
TORCH = {"torch", "torchvision", "timm", "sam2", "transformers"}
WEB = {"fastapi", "starlette", "uvicorn"}
# The parts of the server that may speak HTTP, and those that may know torch.
HTTP_PARTS = {"app", "api"}
TORCH_PARTS = {"adaptation", "inference", "model", "pretraining"}
LONGEST_SHOWN = 10


@dataclass(frozen=True)
class Module:
    """A Python file of a package. name: dotted; part: its first folder or file below the package."""

    name: str
    part: str
    path: Path
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        """Whether the file is an `__init__.py`."""
        return self.path.name == "__init__.py"


@cache
def modules(package: str) -> list[Module]:
    """Read every module of a package, once."""
    base = PACKAGES[package]
    found = []
    for path in sorted(base.rglob("*.py")):
        inside = path.relative_to(base).with_suffix("")
        words = [word for word in inside.parts if word != "__init__"]
        name = ".".join([package, *words])
        found.append(Module(name, inside.parts[0], path, ast.parse(path.read_text(encoding="utf-8"))))
    return found


def imported(module: Module) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import, also inside functions and under TYPE_CHECKING.

    `from a import b` yields `a.b`, which names the module `a.b` or a name of the module `a`.
    """
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            # ruff's TID252 bans relative imports; one that got in would escape these rules
            assert node.level == 0, f"relative import in {module.path} on line {node.lineno}"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def breaches(package: str, forbidden: set[str], allowed_parts: set[str] | None = None) -> list[str]:
    """Return 'file:line imports name' for each forbidden top-level name outside the allowed parts."""
    return [
        f"{module.path.relative_to(ROOT)}:{line} imports {name}"
        for module in modules(package)
        if module.part not in (allowed_parts or set())
        for line, name in imported(module)
        if name.split(".")[0] in forbidden
    ]


def import_graph(found: list[Module]) -> dict[str, set[str]]:
    """Return the modules that each module imports; the own package of a submodule counts only if named."""
    names = {module.name for module in found}
    graph: dict[str, set[str]] = {name: set() for name in names}
    for module in found:
        for _, target in imported(module):
            while target and target not in names:
                target = target.rpartition(".")[0]
            if target and target != module.name:
                graph[module.name].add(target)
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other in a circle (Tarjan's components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in order:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], order[target])
        if low[name] == order[name]:
            component = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(component) > 1:
                found.append(sorted(component))

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return found


def folder_sizes(found: list[Module]) -> dict[str, int]:
    """Return the number of modules in each folder; `__init__.py` and `__main__.py` do not count."""
    sizes: dict[str, int] = {}
    for module in found:
        if module.path.stem not in ("__init__", "__main__"):
            folder = str(module.path.parent.relative_to(ROOT))
            sizes[folder] = sizes.get(folder, 0) + 1
    return sizes


def functions(found: list[Module]) -> list[tuple[int, str]]:
    """Return (lines, module:name) of every function, the longest first."""
    return sorted(
        (
            ((node.end_lineno or node.lineno) - node.lineno + 1, f"{module.name}:{node.name}")
            for module in found
            for node in ast.walk(module.tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ),
        reverse=True,
    )


def main() -> None:
    """Print the folders, the longest functions, every breach, and one line of JSON."""
    found = [module for package in PACKAGES for module in modules(package)]
    sizes, longest = folder_sizes(found), functions(found)
    for folder, size in sorted(sizes.items()):
        print(f"{size:4}  {folder}")
    print("\nlongest functions, lines")
    for lines, name in longest[:LONGEST_SHOWN]:
        print(f"{lines:4}  {name}")
    web = breaches("vessa_server", WEB, HTTP_PARTS)
    torch = breaches("vessa_server", TORCH, TORCH_PARTS)
    rings = circles(import_graph(found))
    for line in [*web, *torch, *(f"circle: {', '.join(ring)}" for ring in rings)]:
        print(line)
    lines = {module.name: len(module.path.read_text(encoding="utf-8").splitlines()) for module in found}
    figures = {
        "modules": len(found),
        "folders": len(sizes),
        "widest_folder": max(sizes.values()),
        "longest_module": max(lines.values()),
        "longest_function": longest[0][0],
        "circles": len(rings),
        "fastapi_outside": len(web),
        "torch_outside": len(torch),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
