"""Turn disk errors into StoreUnavailable."""

import contextlib
import logging
import os
from collections.abc import Iterator

from vessa.errors import StoreUnavailable

log = logging.getLogger(__name__)

RETRY_AFTER_S = 5.0


@contextlib.contextmanager
def disk(action: str) -> Iterator[None]:
    """Turn an OSError into StoreUnavailable that says why, but not where."""
    try:
        yield
    except OSError as error:
        log.exception("the template store could not be %s", action)
        reason = os.strerror(error.errno) if error.errno else "input/output error"
        raise StoreUnavailable(
            f"the template store could not be {action}: {reason}", retry_after=RETRY_AFTER_S
        ) from error
