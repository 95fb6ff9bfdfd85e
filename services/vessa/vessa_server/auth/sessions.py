"""Browser sessions: a one-time link or a key becomes a cookie, guarded by a CSRF token.

A session stands for one key. It ends with the key: a revoked key's sessions answer Unauthorized at the next
request. Sessions live in memory alone, so a restart of the service signs everybody out.
"""

import contextlib
import hashlib
import hmac
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from vessa.errors import Forbidden, Unauthorized
from vessa_server.auth.api_key import Access
from vessa_server.auth.keys import LOCAL, Caller, Role

COOKIE = "vessa_session"
CSRF_HEADER = "X-CSRF-Token"
LINK_S = 15 * 60.0
IDLE_S = 12 * 3600.0
MOST_SESSIONS = 256
MOST_KEY_SESSIONS = 32  # one key's sessions must not end those of all others


@dataclass
class Session:
    """One signed-in browser.

    csrf: token that every changing request repeats in the header X-CSRF-Token; digest: SHA-256 of the key
    it was opened with, empty for the admin key "local"; used: when it last served a request, s
    """

    caller: Caller
    csrf: str
    digest: str
    used: float


@dataclass
class Sessions:
    """All sessions of one service. Safe to share between threads.

    access: the keys; clock: seconds, monotonic. The longest unused sessions end at the limits, first those of
    the same key.
    """

    access: Access
    clock: Callable[[], float] = time.monotonic
    _open: OrderedDict[str, Session] = field(default_factory=OrderedDict)
    _links: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def create_link(self) -> str:
        """Return a token that signs one browser in as the admin key "local", once, within 15 minutes."""
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._links[_hashed(token)] = self.clock() + LINK_S
        return token

    def open_by_link(self, token: str) -> tuple[str, Session]:
        """Return the cookie and the session of a one-time link. Raises Unauthorized for a used or old one."""
        with self._lock:
            until = self._links.pop(_hashed(token), None)
            self._links = {key: end for key, end in self._links.items() if end > self.clock()}
        if until is None or until < self.clock():
            raise Unauthorized(
                "this sign-in link was used already or is older than 15 minutes; restart the service for a "
                "new one, or sign in with a key"
            )
        return self._start(Caller(LOCAL, Role.admin), "")

    def open_by_key(self, key: str) -> tuple[str, Session]:
        """Return the cookie and the session of a key's holder. Raises Unauthorized, StoreUnavailable."""
        local = self.access.local(key)
        if local is not None:
            return self._start(local, "")
        caller = self.access.identify(key)
        return self._start(caller, self.access.keys.all()[caller.name].digest)

    def find(self, cookie: str) -> Session:
        """Return the session of a cookie. Raises Unauthorized when it is over or its key was revoked."""
        with self._lock:
            session = self._open.get(_hashed(cookie))
            if session is not None and self.clock() - session.used > IDLE_S:
                del self._open[_hashed(cookie)]
                session = None
        if session is None or not self._key_exists(session):
            raise Unauthorized("the session is over; sign in again")
        session.used = self.clock()
        with self._lock, contextlib.suppress(KeyError):  # it may have been closed meanwhile
            self._open.move_to_end(_hashed(cookie))
        return session

    def close(self, cookie: str) -> None:
        """End a session; one that is over already is left alone."""
        with self._lock:
            self._open.pop(_hashed(cookie), None)

    def _key_exists(self, session: Session) -> bool:
        if not session.digest:
            return True
        key = self.access.keys.all().get(session.caller.name)
        return key is not None and hmac.compare_digest(key.digest, session.digest)

    def _start(self, caller: Caller, digest: str) -> tuple[str, Session]:
        cookie = secrets.token_urlsafe(32)
        session = Session(caller, secrets.token_urlsafe(32), digest, self.clock())
        with self._lock:
            own = [name for name, s in self._open.items() if s.caller.name == caller.name]
            for oldest in own[: len(own) + 1 - MOST_KEY_SESSIONS]:
                del self._open[oldest]
            self._open[_hashed(cookie)] = session
            while len(self._open) > MOST_SESSIONS:
                self._open.popitem(last=False)
        return cookie, session


def check_csrf(session: Session, presented: str | None) -> None:
    """Raise Forbidden unless a changing request repeats the session's CSRF token."""
    if presented is None or not hmac.compare_digest(presented.encode(), session.csrf.encode()):
        raise Forbidden(f"a request of a browser session needs the header {CSRF_HEADER} of that session")


def _hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
