"""Serve with a worker that hangs or dies on command: `sick.py FILE`.

FILE is read before each batch: `hang` waits until it is gone, `die` ends the worker process.
"""

import sys
import time
from pathlib import Path
from typing import Any

from vessa_server.app import serve
from vessa_server.inference.annotator import Annotator
from vessa_server.settings import Settings

told, segment = Path(sys.argv[1]), Annotator.segment


def sick_segment(self: Annotator, items: Any) -> Any:
    """Segment, hang or die, as the file says."""
    while told.exists():
        if told.read_text() == "die":
            raise SystemExit
        time.sleep(0.05)
    return segment(self, items)


Annotator.segment = sick_segment  # type: ignore[method-assign]
if __name__ == "__main__":  # the worker process imports this too, and is as sick
    serve(Settings())
