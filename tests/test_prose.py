"""Check the rules of plain English that a program can check (CONTRIBUTING.md, "Style")."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_WORDS = 35
WIDTH = 100
OPENINGS = ("Who", "What", "Where", "Which", "How", "Whether", "When", "Why")
# Phrases that readers of this project stumbled over; the plain ones are behind the arrow.
PHRASES = {
    r"\banew\b": "again, or a new one",
    r"\btak(?:e|es|en|ing) up again\b": "resume",
    r"\b[Ww]ho (?:is|are|has|asks|draws|lacks|makes|needs|takes) \b[^?]*?[,.]": "name the actor",
    r"\bhung up on\b": "the connection is closed",
    r"\btells? (?:its|their|that it)\b": "returns, reports",
    r"\bspeaks? for (?:it|them)sel(?:f|ves)\b": "state the fact",
    r"\bby (?:its|their) own word\b": "as it reports",
}


def markdown_files() -> list[Path]:
    """Return the Markdown files that git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def prose_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) of Markdown without code blocks, formulas and tables."""
    closing: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if closing is not None:
            closing = None if stripped.endswith(closing) else closing
        elif stripped.startswith("```"):
            closing = "```"
        elif stripped == "$$":
            closing = "$$"
        elif stripped.startswith("<!--"):
            closing = None if stripped.endswith("-->") else "-->"
        elif not stripped.startswith("|"):
            yield number, line


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line of its first word, sentence) of the paragraphs, list items and headings of Markdown."""
    start, words = 0, ""
    previous = 0
    blocks: list[tuple[int, str]] = []
    for number, line in prose_lines(text):
        fresh = not line.strip() or re.match(r"\s*([-*]|\d+\.|#+|>)\s", line) or number != previous + 1
        previous = number
        if fresh:
            blocks.append((start, words))
            start, words = number + (not line.strip()), ""
        words += " " + re.sub(r"^\s*([-*]|\d+\.|#+|>)\s", "", line).strip()
    for first, block in [*blocks, (start, words)]:
        plain = re.sub(r"`[^`]*`", "CODE", re.sub(r"\]\([^)]*\)", "]", block))
        for sentence in re.split(r"(?<=[.!?:])[)*\"]*\s+(?=[^a-z])", plain):
            if sentence.strip():
                yield first, sentence.strip()


def too_long(text: str) -> list[str]:
    """Return 'line N: W words: start' for each sentence that is too long."""
    counted = ((line, len(re.findall(r"\S*\w\S*", sentence)), sentence) for line, sentence in sentences(text))
    return [f"line {line}: {count} words: {text[:60]}" for line, count, text in counted if count > MOST_WORDS]


def modules() -> list[Path]:
    """Return every Python module of the distributions, tests, benchmarks and scripts."""
    folders = ("shared", "services", "trainer", "tests", "benchmarks", "scripts", "examples")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_sentences_are_short() -> None:
    found = [
        f"{path.relative_to(ROOT)} {line}" for path in markdown_files() for line in too_long(path.read_text())
    ]
    assert found == []


def test_markdown_is_wrapped() -> None:
    """Code and formulas too; tables and a single long word, such as an address, are exempt."""
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in markdown_files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > WIDTH and not line.startswith("|") and " " in line.strip().lstrip("-*>0123456789. ")
    ]
    assert found == []


def test_markdown_has_no_phrase_that_readers_stumble_over() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]!r}, plainly: {plain}"
        for path in markdown_files()
        for number, line in prose_lines(path.read_text())
        for pattern, plain in PHRASES.items()
        if (match := re.search(pattern, line))
    ]
    assert found == []


def test_module_docstrings_state_what_the_module_does() -> None:
    found = []
    for path in modules():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if docstring.split(" ")[0].rstrip(",.:") in OPENINGS:
            found.append(f"{path.relative_to(ROOT)}: {docstring.splitlines()[0]}")
    assert found == []


def test_decision_pages_are_short() -> None:
    found = {
        path.name: lines
        for path in (ROOT / "docs" / "decisions").glob("*.md")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 120
    }
    assert found == {}


EXAMPLE = f"""# A heading

One sentence. Long {"word " * MOST_WORDS}end.

```
{"code " * 50}
```

| {"cell " * 50} |
- {"item " * 10}
- {"item " * 30}
"""


def test_long_sentences_are_found_outside_code_and_tables() -> None:
    assert [line.split(": ")[1] for line in too_long(EXAMPLE)] == [f"{MOST_WORDS + 2} words"]
