"""Write the service's log as text or JSON lines, with request id and key name and without secrets."""

import json
import logging
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from vessa.redaction import RedactingFormatter, redacted, remember_secret
from vessa_server.observability.request_context import current_request
from vessa_server.settings import Settings

log = logging.getLogger(__name__)

_FILE_READERS = {"pydicom", "highdicom", "nibabel", "PIL", "nrrd", "tifffile"}
_URL_LOGGERS = ("httpx", "httpcore")  # below a warning they log the URL of each image that is fetched
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
    handler.addFilter(_withhold_file_contents)
    warnings.showwarning = _show_warning
    for secret in (settings.api_key, settings.language_model.vllm_key, settings.viewers.labelstudio_token):
        remember_secret(secret.get_secret_value())
    for name in _URL_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    text = RedactingFormatter(logging.Formatter(_TEXT))
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else text)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])


def _withhold_file_contents(record: logging.LogRecord) -> bool:
    """Replace the message of a library that reads image files: it may quote a patient's name."""
    library = record.name.partition(".")[0]
    if library in _FILE_READERS:
        record.msg, record.args = f"a message of {library} is withheld, it may quote the file", ()
        record.exc_info = record.exc_text = None
    return True


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Log where a warning was raised, without its text, which may quote a file."""
    log.warning("%s raised at %s:%d; its text is withheld", category.__name__, Path(filename).name, lineno)


def _name_request(record: logging.LogRecord) -> bool:
    context = current_request()
    record.request, record.key = context.id, context.key
    return True
