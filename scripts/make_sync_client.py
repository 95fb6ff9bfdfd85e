"""Generate the sync client from the async one: python scripts/make_sync_client.py.

A test fails when the generated file is not up to date.
"""

import re
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).resolve().parents[1] / "shared/vessa/client"
SOURCE, TARGET = CLIENT / "async_client.py", CLIENT / "sync_client.py"

_DOCSTRING = '''"""The annotator's client. scripts/make_sync_client.py generates it from `async_client.py`.

`vessa.client.endpoints` builds requests and reads responses with plain functions; the client only sends. It
repeats requests that are safe to repeat and waits as long as Retry-After says.
"""
'''
_REPLACEMENTS = {
    r"\basync (def|for|with)\b": r"\1",
    r"\bawait ": "",
    r"^import asyncio\n": "",
    r"\basyncio\.sleep\b": "time.sleep",
    r"\bin_thread\b": "in_place",
    r"\bstream_async\b": "stream_sync",
    r"\bAsync(AnnotatorClient|BaseTransport|Client|Iterator)\b": r"\1",
    r"\b__a(enter|exit)__\b": r"__\1__",
    r"\baclose\b": "close",
    "One client serves all tasks of one event loop": "Threads may share one client",
    "Ctrl-C, or a cancelled task, cancels": "Ctrl-C cancels",
}


def sync_client(source: str) -> str:
    """Return the text of the sync client for the text of the async one."""
    text = re.sub(r'\A"""(?s:.*?)"""\n', lambda _: _DOCSTRING, source)
    for pattern, replacement in _REPLACEMENTS.items():
        text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        if not count:
            raise SystemExit(f"{SOURCE.name} has nothing that matches {pattern!r}: drop the replacement")
    # Shorter calls may fit on one line, and renamed imports may change their order.
    for command in (["check", "--select=I", "--fix", "--quiet"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(TARGET), "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout
    return text


if __name__ == "__main__":
    TARGET.write_text(sync_client(SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
