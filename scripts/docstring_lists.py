"""Show the `name: text` lines of our docstrings as lists in the documentation (a griffe extension)."""

import re
from typing import Any

import griffe

ARGUMENT = re.compile(r"^((?:[a-z_]\w*, )*[a-z_]\w*): (?=\S)")


def as_list(text: str) -> str:
    """Return a docstring whose lines `name: text` are items of a Markdown list."""
    lines: list[str] = []
    for line in text.splitlines():
        if match := ARGUMENT.match(line):
            if lines and lines[-1] and not lines[-1].startswith(("- ", "  ")):
                lines.append("")
            line = f"- `{match[1]}`: {line[match.end() :]}"
        elif line.startswith(" ") and lines and lines[-1].startswith(("- ", "  ")):
            line = "  " + line.strip()
        elif line and lines and lines[-1].startswith(("- ", "  ")):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


class DocstringLists(griffe.Extension):
    """Rewrite the docstring of every object that griffe loads."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = as_list(obj.docstring.value)
