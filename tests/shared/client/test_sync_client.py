"""The sync client is generated from the async one."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "scripts" / "make_sync_client.py"


def test_the_generated_client_is_up_to_date():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    expected = script.sync_client(script.SOURCE.read_text())
    assert script.TARGET.read_text() == expected, "run: python scripts/make_sync_client.py"
