"""Keep secrets out of what people share: redact texts, and read passwords from files."""

from vessa.redaction.secrets import (
    REDACTED,
    RedactingFormatter,
    argument_warning,
    redact,
    redacted,
    remember_secret,
    remember_url,
)

__all__ = [
    "REDACTED",
    "RedactingFormatter",
    "argument_warning",
    "redact",
    "redacted",
    "remember_secret",
    "remember_url",
]
