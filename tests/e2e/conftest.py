"""Start an annotator for tests that send it anything."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def victim(start_annotator: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A service with small limits, for any request; tests may delete all its banks."""
    return start_annotator(
        tmp_path_factory.mktemp("victim"),
        VESSA_MAX_BODY_BYTES=str(8 << 20),
        VESSA_MAX_JOB_BYTES=str(16 << 20),
        VESSA_BODY_TIMEOUT_S="2",
        VESSA_SERVE_VIEWERS="nninteractive,monailabel,labelstudio",
        VESSA_FAILED_KEYS_PER_MINUTE="0",  # schemathesis tries wrong keys without end
    )
