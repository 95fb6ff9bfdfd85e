"""Hold the sessions of viewers: each owns a volume in memory, bounded per key and in total.

Sessions are in memory only, because they show patients. Methods may be called from any thread.
"""

import asyncio
import contextlib
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vessa.errors import LimitReached, QueueFull, StoreUnavailable, TooLarge, UnknownSession
from vessa_server.auth.keys import Caller
from vessa_server.settings import Viewers

LIVENESS_S = 120.0  # a viewer that sends heartbeats and is silent for longer has crashed
SWEEP_S = 15.0


@dataclass(eq=False)
class ViewerSession:
    """Hold one viewer's session.

    token: names it, 256 random bits; protocol: nninteractive or monailabel; owner: name of its key
    bank: name of the template bank of its address; beats: whether the viewer sends heartbeats
    work: the protocol's own state; lock: held while a request changes `work`
    group: patient as the viewer named it, empty when it names none
    """

    token: str
    protocol: str
    owner: str
    bank: str
    beats: bool
    used: float
    seen: float
    work: Any = None
    nbytes: int = 0
    group: str = ""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class ViewerSessions:
    """Open, find and end sessions; the idle ones end by themselves."""

    def __init__(self, bounds: Viewers, clock: Callable[[], float] = time.monotonic) -> None:
        self.bounds, self._clock = bounds, clock
        self._sessions: dict[str, ViewerSession] = {}
        self._uploads: Counter[str] = Counter()
        self._lock = threading.Lock()

    def open(self, protocol: str, caller: Caller, bank: str, *, beats: bool = False) -> ViewerSession:
        """Open a session. Raises QueueFull when all places are taken, LimitReached for those of one key."""
        self.sweep()
        with self._lock:
            most, own = self.bounds.viewer_sessions, self.bounds.viewer_key_sessions
            if len(self._sessions) >= most:
                raise QueueFull(
                    f"All {most} viewer sessions are in use. Close one, or retry later.", retry_after=30.0
                )
            if sum(s.owner == caller.name for s in self._sessions.values()) >= own:
                raise LimitReached(
                    f"Key {caller.name!r} already has {own} viewer sessions, its limit. Close one.",
                    retry_after=30.0,
                )
            now = self._clock()
            session = ViewerSession(secrets.token_urlsafe(32), protocol, caller.name, bank, beats, now, now)
            self._sessions[session.token] = session
        return session

    def get(self, protocol: str, token: str, caller: Caller, *, use: bool = True) -> ViewerSession:
        """Return a session of this key. Raises UnknownSession.

        use: False for a heartbeat, which shows that the viewer lives and does not postpone the idle end
        """
        self.sweep()
        with self._lock:
            session = self._sessions.get(token)
            if session is None or session.protocol != protocol or session.owner != caller.name:
                raise UnknownSession("The viewer's session has ended. Connect again.")
            session.seen = self._clock()
            if use:
                session.used = session.seen
            return session

    def of(self, protocol: str, caller: Caller, bank: str) -> list[ViewerSession]:
        """Return the sessions of a key for one protocol and bank, the oldest first."""
        self.sweep()
        with self._lock:
            mine = (caller.name, protocol, bank)
            return [s for s in self._sessions.values() if (s.owner, s.protocol, s.bank) == mine]

    def hold(self, session: ViewerSession, nbytes: int) -> None:
        """State the bytes that a session holds. Raises TooLarge, LimitReached when all sessions hold more."""
        with self._lock:
            others = [s for s in self._sessions.values() if s is not session]
            own = nbytes + sum(s.nbytes for s in others if s.owner == session.owner)
            total = nbytes + sum(s.nbytes for s in others)
            if own > self.bounds.viewer_key_bytes:
                raise TooLarge(
                    f"The viewer sessions of key {session.owner!r} would hold {own} bytes, the limit is "
                    f"{self.bounds.viewer_key_bytes} (VESSA_VIEWER_KEY_BYTES). Close another one, or crop "
                    "the volume."
                )
            if total > self.bounds.viewer_bytes:
                raise LimitReached(
                    f"All viewer sessions would hold {total} bytes, the limit is {self.bounds.viewer_bytes} "
                    "(VESSA_VIEWER_BYTES). Retry when another viewer has closed.",
                    retry_after=30.0,
                )
            session.nbytes = nbytes

    @contextlib.contextmanager
    def upload(self, caller: Caller) -> Iterator[Callable[[int], None]]:
        """Yield a function that states how many more bytes of an upload have come; all are freed at the end.

        It raises LimitReached when all uploads of the key, or of all keys, would hold more than its sessions
        may.
        """
        held = 0

        def grow(nbytes: int) -> None:
            nonlocal held
            with self._lock:
                own, total = self._uploads[caller.name] + nbytes, self._uploads.total() + nbytes
                key_limit, limit = self.bounds.viewer_key_bytes, self.bounds.viewer_bytes
                if own > key_limit or total > limit:
                    raise LimitReached(
                        f"Uploads of viewers would hold {own} bytes of key {caller.name!r} and {total} of "
                        f"all, the limits are {key_limit} (VESSA_VIEWER_KEY_BYTES) and {limit} "
                        "(VESSA_VIEWER_BYTES). Retry when another one has ended.",
                        retry_after=10.0,
                    )
                self._uploads[caller.name] += nbytes
                held += nbytes

        try:
            yield grow
        finally:
            with self._lock:
                self._uploads[caller.name] -= held

    def close(self, session: ViewerSession) -> None:
        """End a session."""
        with self._lock:
            self._sessions.pop(session.token, None)

    def erase_group(self, group: str) -> int:
        """End the sessions that show a patient, or may show it because they name none; return how many."""
        with self._lock:
            gone = [token for token, s in self._sessions.items() if s.group in ("", group)]
            for token in gone:
                del self._sessions[token]
        return len(gone)

    def remaining(self, session: ViewerSession) -> float:
        """Return the seconds until an unused session ends."""
        return max(0.0, self.bounds.viewer_idle_s - (self._clock() - session.used))

    def sweep(self) -> int:
        """End the sessions that were idle for too long or whose viewer crashed; return how many."""
        with self._lock:
            now = self._clock()
            gone = [
                token
                for token, s in self._sessions.items()
                if not s.lock.locked()
                and (now - s.used > self.bounds.viewer_idle_s or (s.beats and now - s.seen > LIVENESS_S))
            ]
            for token in gone:
                del self._sessions[token]
        return len(gone)

    def end_revoked(self, caller_of: Callable[[str], Caller | None]) -> int:
        """End the sessions of revoked keys; returns how many.

        caller_of: returns the caller that a key's name stands for now, None when the key was revoked
        """
        revoked = {owner for owner in {s.owner for s in self._snapshot()} if caller_of(owner) is None}
        with self._lock:
            gone = [token for token, s in self._sessions.items() if s.owner in revoked]
            for token in gone:
                del self._sessions[token]
        return len(gone)

    async def sweep_forever(self, caller_of: Callable[[str], Caller | None]) -> None:
        """Sweep again and again, so that pixels of patients do not stay until the next request."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep()
            with contextlib.suppress(StoreUnavailable):  # the keys cannot be read now; the next round tries
                await asyncio.to_thread(self.end_revoked, caller_of)

    def _snapshot(self) -> list[ViewerSession]:
        with self._lock:
            return list(self._sessions.values())
