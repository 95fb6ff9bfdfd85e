"""Read multipart/form-data: from a complete body, or chunk by chunk with its files on the disk."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import python_multipart
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from vessa.errors import InvalidRequest, MalformedBody, TooLarge

MAX_PARTS = 32
MAX_HEADER_BYTES = 4096
MAX_VALUES = 2_000_000  # of one JSON text
MAX_TEXT_BYTES = 1 << 20  # as much as a safetensors header; parsed JSON takes many times its bytes


class Form:
    """Hold the fields of a form by name, as bytes; unknown and repeated names are refused."""

    def __init__(
        self,
        content_type: str,
        body: bytes,
        allowed: set[str],
        *,
        many: str | None = None,
        max_parts: int = MAX_PARTS,
    ) -> None:
        """Parse a body. Raises MalformedBody when it is no form or cut off, InvalidRequest for other names.

        many: the one field that may be repeated
        """
        stream = FormStream(content_type, allowed, many=many, max_parts=max_parts)
        stream.feed(body)
        self._fields: dict[str, bytes] = stream.finish().fields
        self._files: list[bytes] = stream.blobs

    @property
    def fields(self) -> dict[str, bytes]:
        """Return all fields by name."""
        return self._fields

    @classmethod
    def of_fields(cls, fields: dict[str, bytes]) -> "Form":
        """Return a form of fields that are already parsed."""
        form = cls.__new__(cls)
        form._fields, form._files = fields, []
        return form

    def file(self, name: str) -> bytes:
        """Return the bytes of a required file. Raises InvalidRequest when it is missing."""
        data = self._fields.get(name)
        if not data:
            raise InvalidRequest(f"The form needs the file {name!r}. Add it.")
        return data

    def files(self, name: str) -> list[bytes]:
        """Return the bytes of all files of the field that may be repeated; at least one is required."""
        self.file(name)
        return self._files

    def text(self, name: str, default: str) -> str:
        """Return a text field; an empty one counts as absent. Raises TooLarge over 1 MiB."""
        data = self._fields.get(name, b"")
        if len(data) > MAX_TEXT_BYTES:
            raise TooLarge(
                f"Form field {name!r} has {len(data)} bytes, more than the limit of {MAX_TEXT_BYTES}. "
                "Shorten it."
            )
        try:
            return data.decode().strip() or default
        except UnicodeDecodeError:
            raise InvalidRequest(f"Form field {name!r} must be UTF-8 text.") from None

    def json(self, name: str) -> Any:
        """Return a field that holds JSON, None when it is absent."""
        text = self.text(name, "")
        return read_json(text, f"form field {name!r}") if text else None


def read_json(text: str, what: str) -> Any:
    """Parse JSON that a caller sent. Raises InvalidRequest when it is none, TooLarge for too many values.

    Parsed, a value of two bytes takes up to a hundred: the number of values bounds the memory.
    """
    if text.count(",") + text.count("[") + text.count("{") > MAX_VALUES:
        raise TooLarge(f"{what} holds more than {MAX_VALUES} values, the limit. Send less in one request.")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{what} must be JSON, got {text[:80]!r}") from None


class FormStream:
    """Parse a form chunk by chunk. Feed it the body, then call `finish`.

    Text fields stay in memory, bounded. The files of the field `many` go to `folder` when one is given, as
    `00000.input`, `00001.input` and so on, else to `blobs`.
    """

    def __init__(
        self,
        content_type: str,
        allowed: set[str],
        *,
        many: str | None = None,
        max_parts: int = MAX_PARTS,
        folder: Path | None = None,
    ) -> None:
        """Prepare the parser. Raises MalformedBody when the content type has no boundary."""
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise MalformedBody("A multipart/form-data body needs a boundary in its Content-Type.")
        self._allowed, self._many, self._reader = allowed, many, _Reader(many, max_parts, folder)
        callbacks: Any = self._reader.callbacks()
        self._parser = python_multipart.MultipartParser(boundary, callbacks)

    @property
    def blobs(self) -> list[bytes]:
        """Return the files of the repeated field that were kept in memory."""
        return self._reader.blobs

    @property
    def paths(self) -> list[Path]:
        """Return the files of the repeated field that were written to the folder."""
        return self._reader.paths

    def feed(self, chunk: bytes) -> None:
        """Parse some bytes of the body. Raises MalformedBody; OSError when a file cannot be written."""
        try:
            self._parser.write(chunk)
        except FormParserError:
            raise MalformedBody("The body is not valid multipart/form-data.") from None

    def finish(self) -> Form:
        """Return the text fields. Raises MalformedBody when the body is cut off, InvalidRequest."""
        self.feed(b"")
        self._parser.finalize()
        reader = self._reader
        if not reader.complete:
            raise MalformedBody("The multipart/form-data body is cut off: its closing boundary is missing.")
        unknown = sorted(reader.fields.keys() - self._allowed)
        if unknown:
            raise InvalidRequest(
                f"Unknown form field {unknown[0][:80]!r}. Expected only {', '.join(sorted(self._allowed))}."
            )
        if reader.folder is not None and not reader.paths:
            raise InvalidRequest(f"The form needs the file {self._many!r}. Add it.")
        return Form.of_fields(reader.fields)


class _Reader:
    """Collect the parts as the parser finds them."""

    def __init__(self, many: str | None, max_parts: int, folder: Path | None) -> None:
        self.fields: dict[str, bytes] = {}
        self.blobs: list[bytes] = []
        self.paths: list[Path] = []
        self.folder = folder
        self._many, self._max_parts, self._parts = many, max_parts, 0
        self.complete = False
        self._field, self._value, self._disposition = bytearray(), bytearray(), b""
        self._name = ""
        self._data = bytearray()
        self._file: BinaryIO | None = None

    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header(self._field, data[start:end]),
            "on_header_value": lambda data, start, end: self._header(self._value, data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._open,
            "on_part_data": lambda data, start, end: self._take(data[start:end]),
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > self._max_parts:
            raise MalformedBody(f"The form has more than {self._max_parts} fields, the limit.")
        self._disposition = b""
        self._data = bytearray()
        self._field.clear()
        self._value.clear()

    def _header(self, target: bytearray, data: bytes) -> None:
        if len(target) + len(data) > MAX_HEADER_BYTES:
            raise MalformedBody(
                f"A header of a form field has more than {MAX_HEADER_BYTES} bytes, the limit."
            )
        target.extend(data)

    def _header_end(self) -> None:
        if bytes(self._field).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def _open(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if not self._name:
            raise MalformedBody("A form field has no name.")
        if self._name == self._many and self.folder is not None:
            path = self.folder / f"{len(self.paths):05d}.input"
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            self._file = os.fdopen(handle, "wb")
            self.paths.append(path)
        elif self._name != self._many and self._name in self.fields:
            raise MalformedBody(f"The form field {self._name[:80]!r} is given twice.")

    def _take(self, data: bytes) -> None:
        if self._file is not None:
            self._file.write(data)
            return
        if self.folder is not None and len(self._data) + len(data) > MAX_TEXT_BYTES:
            raise TooLarge(
                f"Form field {self._name[:80]!r} has more than {MAX_TEXT_BYTES} bytes, the limit. Shorten it."
            )
        self._data.extend(data)

    def _end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        elif self._name == self._many:
            self.blobs.append(bytes(self._data))
            self.fields[self._name] = self.blobs[-1]
        else:
            self.fields[self._name] = bytes(self._data)

    def _finish(self) -> None:
        self.complete = True
