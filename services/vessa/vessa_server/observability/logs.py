"""The service's log: lines for people or JSON for machines, each with its request's id and its key's name."""

import json
import logging
from datetime import UTC, datetime

from vessa_server.observability.request_context import current_request
from vessa_server.settings import Settings

_TEXT = "%(asctime)s %(levelname)s %(name)s [%(request)s %(key)s]: %(message)s"


class JsonFormatter(logging.Formatter):
    """One JSON object a line; of an exception, its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request": getattr(record, "request", "-"),
            "key": getattr(record, "key", "-"),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(settings: Settings) -> None:
    """Set up all logging of this process."""
    handler = logging.StreamHandler()
    handler.addFilter(_name_request)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])


def _name_request(record: logging.LogRecord) -> bool:
    context = current_request()
    record.request, record.key = context.id, context.key
    return True
