"""Check the documentation against the code: generated tables, and paths that pages name."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import docs_reference
import docstring_lists
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
# Pages write paths from the root, or from the package or folder that their text names.
BASES = (
    ROOT,
    ROOT / "services" / "vessa" / "vessa_server",
    ROOT / "trainer" / "vessa_trainer",
    ROOT / "shared" / "vessa",
    ROOT / "tests",
)
PATH = re.compile(r"`([\w./-]+(?:/|\.(?:py|yaml|yml|sh|md|toml|cff|lock)))`")
# Files of a reader, of a run or of another program.
OTHERS = re.compile(
    r"^(splits|images|masks|language|data|tensorboard|docs|runs|\.audit|\.worklists|vessa\.json|meta\.json|config\.yaml|results\.md"
    r"|table\d\.md|/.*)(/.*|\.md)?$"
)
# A file or folder of tests, with the words that select some of them.
TESTS = re.compile(r"`((?:server|shared|trainer|e2e)/[\w/.-]*|test_[\w.]+)(?: -k (\w+|\"[^\"]+\"))?`")


@pytest.mark.parametrize("name", docs_reference.TABLES)
def test_reference_table_is_generated(name: str) -> None:
    assert len(docs_reference.TABLES[name]().splitlines()) > 8


def test_setting_without_a_description_is_refused() -> None:
    with pytest.raises(ValueError, match="VESSA_PORT has no description"):
        docs_reference.required("VESSA_PORT", None)


def test_markers_and_formulas_are_replaced() -> None:
    page = docs_reference.on_page_markdown("<!-- generated: errors -->\n\n$`x`$\n\n```\n$`x`$\n```\n")
    assert "| status | code |" in page
    assert page.count("<math") == 1
    assert page.endswith("```\n$`x`$\n```\n")


def exists(name: str) -> bool:
    """Return whether a path exists below a base; a bare file name may be anywhere in the packages."""
    return any((base / name).exists() for base in BASES) or (
        "/" not in name and any(any(base.rglob(name)) for base in BASES[1:])
    )


def test_paths_that_pages_name_exist() -> None:
    missing = [
        f"{page.relative_to(ROOT)}: {name}"
        for page in PAGES
        for name in PATH.findall(page.read_text(encoding="utf-8"))
        if not OTHERS.match(name) and not exists(name)
    ]
    assert missing == []


def test_hook_is_the_one_of_the_site() -> None:
    assert f"hooks: [{Path(sys.modules['docs_reference'].__file__ or '').relative_to(ROOT)}]" in (
        ROOT / "mkdocs.yml"
    ).read_text(encoding="utf-8")


def test_argument_lines_of_docstrings_become_lists() -> None:
    text = "Do it.\n\nname: first\n    more of it\nother, third: second\nReturns nothing.\n"
    assert docstring_lists.as_list(text).splitlines() == [
        "Do it.",
        "",
        "- `name`: first",
        "  more of it",
        "- `other, third`: second",
        "",
        "Returns nothing.",
    ]


def test_options_are_shown_as_they_are_written() -> None:
    assert "| `--bank` | `default` |" in docs_reference.cli_pages()


def functions(place: str) -> list[str]:
    """Return the names of the tests in a file or folder of tests/."""
    path = ROOT / "tests" / place
    files = [path] if path.is_file() else sorted(path.rglob("test_*.py"))
    return [
        node.name
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def test_every_attack_and_threat_names_tests_that_exist() -> None:
    """Each word of a `-k` expression selects a test, so that a renamed test does not leave its line empty."""
    named, wrong = 0, []
    for page in ("reliability.md", "threat-model.md"):
        text = (ROOT / "docs" / "explanation" / page).read_text(encoding="utf-8")
        for place, words in TESTS.findall(text):
            named += 1
            found = functions(place)
            if not found or any(not any(w in name for name in found) for w in words.strip('"').split(" or ")):
                wrong.append(f"{page}: {place} -k {words}")
    assert wrong == []
    assert named > 70
