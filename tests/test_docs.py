"""Check the documentation against the code: generated tables, and paths that pages name."""

from __future__ import annotations

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
