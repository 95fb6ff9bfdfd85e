"""Sessions of viewers end by themselves, and are bounded per key and in total."""

from __future__ import annotations

import asyncio

import pytest

from vessa.errors import LimitReached, QueueFull, StoreUnavailable, TooLarge, UnknownSession
from vessa_server.auth.keys import Caller, Role
from vessa_server.settings import Viewers
from vessa_server.viewers import sessions as module
from vessa_server.viewers.sessions import LIVENESS_S, ViewerSessions

ANNA, BEN = Caller("anna", Role.annotate), Caller("ben", Role.annotate)


class Clock:
    """A clock that tests move."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_places_are_bounded_in_total_and_per_key() -> None:
    sessions = ViewerSessions(Viewers(viewer_sessions=3, viewer_key_sessions=2))
    first = [sessions.open("p", ANNA, "bank") for _ in range(2)]
    with pytest.raises(LimitReached, match="its limit"):
        sessions.open("p", ANNA, "bank")
    sessions.open("p", BEN, "bank")
    with pytest.raises(QueueFull, match="All 3 viewer sessions"):
        sessions.open("p", BEN, "bank")
    sessions.close(first[0])
    sessions.open("p", BEN, "bank")
    assert sessions.of("p", ANNA, "bank") == [first[1]]


def test_bytes_are_bounded_in_total_and_per_key() -> None:
    sessions = ViewerSessions(Viewers(viewer_bytes=100, viewer_key_bytes=70))
    one, two, other = (sessions.open("p", who, "bank") for who in (ANNA, ANNA, BEN))
    sessions.hold(one, 40)
    with pytest.raises(TooLarge, match="VESSA_VIEWER_KEY_BYTES"):
        sessions.hold(two, 31)
    sessions.hold(two, 30)
    with pytest.raises(LimitReached, match="VESSA_VIEWER_BYTES"):
        sessions.hold(other, 31)
    sessions.hold(one, 10)
    sessions.hold(other, 31)


def test_idle_and_crashed_viewers_lose_their_session() -> None:
    clock = Clock()
    sessions = ViewerSessions(Viewers(viewer_idle_s=1000), clock)
    quiet, beating = sessions.open("p", ANNA, "b", beats=True), sessions.open("p", ANNA, "b", beats=True)
    upload = sessions.open("q", ANNA, "b")
    for clock.now in (100.0, 150.0, 250.0):
        sessions.get("p", beating.token, ANNA, use=False)
    assert clock.now - 150 < LIVENESS_S < clock.now
    with pytest.raises(UnknownSession, match="Connect again"):
        sessions.get("p", quiet.token, ANNA)
    assert sessions.remaining(beating) == 750
    assert sessions.get("q", upload.token, ANNA) is upload
    clock.now = 1251.0
    assert sessions.sweep() == 2  # heartbeats do not postpone the idle end; the upload was used at 250


def test_a_session_belongs_to_its_key_and_protocol() -> None:
    sessions = ViewerSessions(Viewers())
    session = sessions.open("p", ANNA, "bank")
    for protocol, caller in (("p", BEN), ("q", ANNA)):
        with pytest.raises(UnknownSession):
            sessions.get(protocol, session.token, caller)


def test_a_session_in_work_is_not_swept() -> None:
    async def check() -> None:
        clock = Clock()
        sessions = ViewerSessions(Viewers(viewer_idle_s=1), clock)
        session = sessions.open("p", ANNA, "bank")
        async with session.lock:
            clock.now = 5.0
            assert sessions.sweep() == 0
        assert sessions.sweep() == 1

    asyncio.run(check())


def test_sessions_of_a_revoked_key_end() -> None:
    sessions = ViewerSessions(Viewers())
    kept = sessions.open("p", ANNA, "bank")
    sessions.open("p", BEN, "bank")
    known = {"anna": ANNA}
    assert sessions.end_revoked(known.get) == 1
    assert (sessions.of("p", ANNA, "bank"), sessions.of("p", BEN, "bank")) == ([kept], [])


def test_sweeping_goes_on_while_the_keys_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions, asked = ViewerSessions(Viewers()), []
    sessions.open("p", ANNA, "bank")
    monkeypatch.setattr(module, "SWEEP_S", 0.001)

    def caller_of(name: str) -> Caller | None:
        asked.append(name)
        if len(asked) < 3:
            raise StoreUnavailable("Redis is away")
        return None

    async def until_it_ends() -> None:
        sweeping = asyncio.create_task(sessions.sweep_forever(caller_of))
        while sessions.of("p", ANNA, "bank"):
            await asyncio.sleep(0.001)
        sweeping.cancel()

    asyncio.run(asyncio.wait_for(until_it_ends(), 20))
    assert len(asked) == 3


def test_uploads_are_bounded_per_key_and_in_total() -> None:
    sessions = ViewerSessions(Viewers(viewer_key_bytes=10, viewer_bytes=15))
    with sessions.upload(ANNA) as first, sessions.upload(ANNA) as second, sessions.upload(BEN) as other:
        first(6)
        second(4)
        with pytest.raises(LimitReached, match="11 bytes of key 'anna'"):
            second(1)
        other(5)
        with pytest.raises(LimitReached, match="16 of all"):
            other(1)
    with sessions.upload(ANNA) as again:
        again(10)
