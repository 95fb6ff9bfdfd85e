"""Bound what one HTTP connection can hold: its head, the rest of a refused body, and unread answers."""

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)

LINGER_S = 2.0  # for the client to read an answer that was sent before its whole body came
SLOWEST_READER = 256 * 1024  # bytes per second of a large answer
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\nContent-Length: 87\r\n\r\n"
    b'{"error": {"code": "queue_full", "message": "Too many connections.", "item": null}}    '
)


class BoundedHttp(H11Protocol):
    """Extend uvicorn's h11 protocol, which takes a head of at most 64 KiB, by limits on time and number.

    - A head must arrive within `timeout_keep_alive` seconds.
    - When an answer is complete before the request's body, the connection is closed after `LINGER_S`.
    - An answer must be read within `write_timeout_s` plus its size / `SLOWEST_READER`.
    - When all unread answers together hold more than `max_unread_bytes`, the connection with the largest one
      is closed.
    - Connections beyond `max_connections` get 503 and are closed.

    httptools, which uvicorn prefers where it is installed, bounds none of these: without a key, endless
    headers fill the memory, and one long header keeps the event loop busy for minutes.
    """

    max_connections = 512
    max_unread_bytes = 1 << 30
    write_timeout_s = 30.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head: asyncio.TimerHandle | None = None
        self._rest: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._aborted = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the head's timer, or refuse one connection too many."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            log.warning("%d connections are open, the limit: one more was refused", self.max_connections)
            transport.write(_FULL)
            self._close()
            return
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Parse data unless the connection is closing, then check which timer must run."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch()
        self._bound_close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        super().connection_lost(exc)
        for timer in (self._head, self._rest, self._unread):
            if timer is not None:
                timer.cancel()

    def on_response_complete(self) -> None:
        """Bound the rest of a body whose request is answered."""
        super().on_response_complete()
        if not self.transport.is_closing() and self.conn.their_state is h11.SEND_BODY:
            self._rest = self.loop.call_later(LINGER_S, self._close)
        self._bound_close()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, also when its client reads nothing."""
        super().timeout_keep_alive_handler()
        self._bound_close()

    def pause_writing(self) -> None:
        """Start the timer of an answer that the client does not read as fast as it is written."""
        super().pause_writing()
        if self._unread is None:
            seconds = self.write_timeout_s + self.transport.get_write_buffer_size() / SLOWEST_READER
            self._unread = self.loop.call_later(seconds, self._give_up)
        self._bound_unread()

    def resume_writing(self) -> None:
        """Stop the timer of the answer."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            if self._head is not None:
                self._head.cancel()
                self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(self.timeout_keep_alive, self._close)
        if self._rest is not None and self.conn.their_state is not h11.SEND_BODY:
            self._rest.cancel()
            self._rest = None

    def _close(self) -> None:
        self.transport.close()
        self._bound_close()

    def _bound_close(self) -> None:
        """Give a closing connection a bounded time to write what is left."""
        if self.transport.is_closing() and self._unread is None:
            seconds = self.write_timeout_s + self.transport.get_write_buffer_size() / SLOWEST_READER
            self._unread = self.loop.call_later(seconds, self._give_up)

    def _bound_unread(self) -> None:
        """Close the connection with the largest unread answer while all of them hold too much memory."""
        open_ = [c for c in self.connections if isinstance(c, BoundedHttp) and not c._aborted]
        sizes = {c: c.transport.get_write_buffer_size() for c in open_}
        while sum(sizes.values()) > self.max_unread_bytes:
            largest = max(sizes, key=sizes.__getitem__)
            del sizes[largest]
            largest._give_up()

    def _give_up(self) -> None:
        self._aborted = True
        left = self.transport.get_write_buffer_size()
        if left:
            log.info(
                "a client did not read its answer in time or room: the connection is closed, %d bytes left",
                left,
            )
        self.transport.abort()


def bounded_http(
    max_connections: int, write_timeout_s: float, max_unread_bytes: int = 1 << 30
) -> type[BoundedHttp]:
    """Return the protocol class with these limits, for uvicorn, which makes one object a connection."""
    limits = {
        "max_connections": max_connections,
        "write_timeout_s": write_timeout_s,
        "max_unread_bytes": max_unread_bytes,
    }
    return type("LimitedHttp", (BoundedHttp,), limits)
