"""Write the service's log as text or JSON lines, with request id and key name and without secrets."""

import json
import logging
from datetime import UTC, datetime

from vessa.redaction import RedactingFormatter, redacted
from vessa_server.observability.request_context import current_request
from vessa_server.settings import Settings

_TEXT = "%(asctime)s %(levelname)s %(name)s [%(request)s %(key)s]: %(message)s"


class JsonFormatter(logging.Formatter):
    """Format a record as one JSON object a line, with the traceback of its exception."""

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
        return json.dumps(redacted(line))  # before the escapes of JSON, which would hide a secret's form


def log_to_stderr(settings: Settings) -> None:
    """Send all logging of this process to stderr, redacted."""
    handler = logging.StreamHandler()
    handler.addFilter(_name_request)
    text = RedactingFormatter(logging.Formatter(_TEXT))
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else text)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])


def _name_request(record: logging.LogRecord) -> bool:
    context = current_request()
    record.request, record.key = context.id, context.key
    return True
