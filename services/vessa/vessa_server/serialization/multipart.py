"""multipart/form-data, read from a body that is already complete and bounded."""

import json
from collections.abc import Callable
from typing import Any

import python_multipart
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from vessa.errors import InvalidRequest, MalformedBody, TooLarge

MAX_PARTS = 32
MAX_HEADER_BYTES = 4096
MAX_TEXT_BYTES = 1 << 20  # as much as a safetensors header; parsed JSON takes many times its bytes


class Form:
    """The fields of a form, by name, as bytes. Names outside `allowed` and repeated ones are refused."""

    def __init__(
        self,
        content_type: str,
        body: bytes,
        allowed: set[str],
        *,
        many: str | None = None,
        max_parts: int = MAX_PARTS,
    ) -> None:
        """Parse a body; MalformedBody when it is no form or cut off, InvalidRequest for other names.

        many: the one field that may be repeated
        """
        reader = _parse(content_type, body, many, max_parts)
        self._fields, self._files = reader.fields, reader.files
        unknown = sorted(self._fields.keys() - allowed)
        if unknown:
            raise InvalidRequest(
                f"unknown form field {unknown[0][:80]!r}; expected only {', '.join(sorted(allowed))}"
            )

    def file(self, name: str) -> bytes:
        """Return the bytes of a required file."""
        data = self._fields.get(name)
        if not data:
            raise InvalidRequest(f"the form needs the file {name!r}")
        return data

    def files(self, name: str) -> list[bytes]:
        """Return the bytes of all files of the field that may be repeated; at least one is required."""
        self.file(name)
        return self._files

    def text(self, name: str, default: str) -> str:
        """Return a text field; an empty one counts as absent. TooLarge over 1 MiB."""
        data = self._fields.get(name, b"")
        if len(data) > MAX_TEXT_BYTES:
            raise TooLarge(
                f"form field {name!r} has {len(data)} bytes, more than the limit of {MAX_TEXT_BYTES}"
            )
        try:
            return data.decode().strip() or default
        except UnicodeDecodeError:
            raise InvalidRequest(f"form field {name!r} must be UTF-8 text") from None

    def json(self, name: str) -> Any:
        """Return a field that holds JSON, None when it is absent."""
        text = self.text(name, "")
        return read_json(text, f"form field {name!r}") if text else None


def read_json(text: str, what: str) -> Any:
    """Parse JSON that a caller sent; InvalidRequest when it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{what} must be JSON, got {text[:80]!r}") from None


def _parse(content_type: str, body: bytes, many: str | None, max_parts: int) -> "_Reader":
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise MalformedBody("a multipart/form-data body needs a boundary in its Content-Type")
    reader = _Reader(many, max_parts)
    try:
        callbacks: Any = reader.callbacks()
        parser = python_multipart.MultipartParser(boundary, callbacks)
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise MalformedBody("the body is not valid multipart/form-data") from None
    if not reader.complete:
        raise MalformedBody("the multipart/form-data body is cut off: its closing boundary is missing")
    return reader


class _Reader:
    """Collects the parts as the parser finds them."""

    def __init__(self, many: str | None, max_parts: int) -> None:
        self.fields: dict[str, bytes] = {}
        self.files: list[bytes] = []
        self._many, self._max_parts, self._parts = many, max_parts, 0
        self.complete = False
        self._name, self._value, self._disposition = bytearray(), bytearray(), b""
        self._data = bytearray()

    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header(self._name, data[start:end]),
            "on_header_value": lambda data, start, end: self._header(self._value, data[start:end]),
            "on_header_end": self._header_end,
            "on_part_data": lambda data, start, end: self._data.extend(data[start:end]),
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > self._max_parts:
            raise MalformedBody(f"a form has at most {self._max_parts} fields")
        self._disposition = b""
        self._data = bytearray()
        self._name.clear()
        self._value.clear()

    def _header(self, target: bytearray, data: bytes) -> None:
        if len(target) + len(data) > MAX_HEADER_BYTES:
            raise MalformedBody("a header of a form field is too long")
        target.extend(data)

    def _header_end(self) -> None:
        if bytes(self._name).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _end(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if not name:
            raise MalformedBody("a form field has no name")
        if name == self._many:
            self.files.append(bytes(self._data))
        elif name in self.fields:
            raise MalformedBody(f"the form field {name[:80]!r} is given twice")
        self.fields[name] = bytes(self._data)

    def _finish(self) -> None:
        self.complete = True
