"""An annotator in a process of its own: computing and HTTP need not share one interpreter.

What is asked and answered goes through two pipes, for what computes and for what must not wait behind it. A
process that dies (killed for its memory, a driver's fault) is started again; the queue tries what it died of
in halves, so that it harms nobody else.
"""

import atexit
import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vessa.errors import InternalError, NotReady, VessaError
from vessa.schemas import AdaptationInfo
from vessa_server.observability.logs import log_to_stderr
from vessa_server.serving.batch_queue import is_out_of_memory
from vessa_server.serving.worker import About, LocalDevice, load
from vessa_server.settings import Settings
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.store import open_store
from vessa_server.template_bank.template import Template

if TYPE_CHECKING:
    from vessa_server.types import DescribeItem, SegmentItem, TemplateItem

log = logging.getLogger(__name__)

_RETRY_S = 2.0
_ASIDE_S = 10.0  # how long what does not compute may take to be answered
# The computing thread asks for the interpreter after every operation: while a bank is adapted to, it must not
# wait for a whole 5 ms.
_SWITCH_S = 0.0005


class _GoneError(Exception):
    """The process has ended, or its pipe has."""


@dataclass(frozen=True)
class _State:
    """What changed while something was computed. added, dropped: ids of images that are held."""

    added: frozenset[str]
    dropped: frozenset[str]
    seconds: dict[str, float]
    nbytes: dict[str, int]


class _Pipe:
    """Questions and their answers, one at a time, from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._number = 0

    def ask(self, name: str, *arguments: Any, seconds: float | None = None) -> Any:
        """Return the answer, or raise it when it is an error; _GoneError, NotReady after `seconds`."""
        with self._lock:
            try:
                self._number += 1
                self._connection.send((self._number, name, arguments))
                return self._answer(seconds)
            except (EOFError, OSError) as error:
                raise _GoneError from error

    def _answer(self, seconds: float | None) -> Any:
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._connection.poll(left):
                raise NotReady("the device process does not answer", retry_after=5.0)
            number, answer = self._connection.recv()
            if number == self._number:  # another one is late, and nobody waits for it any more
                if isinstance(answer, Exception):
                    raise answer
                return answer

    def close(self) -> None:
        """Let the other end know that there will be no more."""
        self._connection.close()


class DeviceProcess:
    """A `Device` whose annotator is in another process, which is started again when it dies.

    It opens the store of the banks itself, and sees their changes as every other process does.
    """

    def __init__(self, settings: Settings) -> None:
        """Start the process and wait until it has loaded; raises what made that fail."""
        self._settings = settings
        self._closing, self._up = threading.Event(), threading.Event()
        self._held: set[str] = set()
        self._seconds: dict[str, float] = {}
        self._nbytes: dict[str, int] = {}
        self._about = self._start()
        self._up.set()
        threading.Thread(target=self._watch, name="vessa-device-watch", daemon=True).start()

    @property
    def about(self) -> About:
        """What has been loaded."""
        return self._about

    @property
    def pid(self) -> int | None:
        """The process."""
        return self._process.pid

    def segment(self, items: "list[SegmentItem]") -> list[Any]:
        """Return a SegmentResult or VessaError for each image."""
        return list(self._compute("segment", items))

    def describe(self, items: "list[DescribeItem]") -> list[Any]:
        """Return the feature (D,) of each image."""
        return list(self._compute("describe", items))

    def encode_templates(self, items: "list[TemplateItem]") -> list[Template | VessaError]:
        """Return each example as a template, or why it is none."""
        return list(self._compute("encode_templates", items))

    def release_memory(self, everything: bool) -> None:
        """Give free memory back; everything: forget what is kept of images and templates, too."""
        self._compute("release_memory", everything)

    def holds(self, image_id: str) -> bool:
        """Whether a request by this id needs no pixels."""
        return image_id in self._held

    def seconds(self) -> Mapping[str, float]:
        """Return the time spent in each stage of inference so far, s."""
        return self._seconds

    def bytes_held(self) -> Mapping[str, int]:
        """Return the bytes that are held, by where."""
        return self._nbytes

    def adapt(self, bank: str, seconds: float) -> AdaptationInfo:
        """Begin to adapt to a bank, for at most `seconds`; UnknownBank, QueueFull while another one runs."""
        info: AdaptationInfo = self._ask_aside("adapt", bank, seconds)
        return info

    def adaptation(self, bank: str) -> AdaptationInfo:
        """Return how an adaptation goes, or went; UnknownBank."""
        info: AdaptationInfo = self._ask_aside("adaptation", bank)
        return info

    def forget_adaptation(self, bank: str) -> None:
        """Serve a bank by the common weights again; UnknownBank, QueueFull while it is being adapted to."""
        self._ask_aside("forget_adaptation", bank)

    def check(self) -> None:
        """Raise NotReady while the process is away, LanguageUnavailable while the language model is."""
        self._ask_aside("check")

    def close(self, seconds: float) -> None:
        """End the process; what it computes then is lost after `seconds`."""
        self._closing.set()
        self._up.set()  # nobody waits any more
        self._work.close()
        self._aside.close()
        self._process.join(seconds)
        self._kill()

    def _compute(self, name: str, argument: Any) -> Any:
        """Let the process compute; RuntimeError when it died of it, which the queue takes apart."""
        self._up.wait()
        if self._closing.is_set():
            raise NotReady("the service is shutting down", retry_after=5.0)
        try:
            answer, state = self._work.ask(name, argument)
        except _GoneError:
            if not self._closing.is_set():
                self._up.clear()  # at once, or the next one would be blamed for the same death
            raise RuntimeError("the device process ended amid this") from None
        self._held |= state.added
        self._held -= state.dropped
        self._seconds, self._nbytes = state.seconds, state.nbytes
        return answer

    def _ask_aside(self, name: str, *arguments: Any) -> Any:
        if not self._up.is_set():
            raise _away()
        try:
            return self._aside.ask(name, *arguments, seconds=_ASIDE_S)
        except _GoneError:
            raise _away() from None

    def _start(self) -> About:
        """Start the process and return what it has loaded; raises what made that fail."""
        context = get_context("spawn")  # a fork would copy the threads' locks, and CUDA cannot be forked
        work, inner_work = context.Pipe()
        aside, inner_aside = context.Pipe()
        self._process = context.Process(
            target=_main, args=(self._settings, inner_work, inner_aside), name="vessa-device", daemon=True
        )
        self._process.start()
        atexit.register(self._kill)  # it does not hear SIGTERM, by which multiprocessing would end it
        inner_work.close()
        inner_aside.close()
        self._work, self._aside = _Pipe(work), _Pipe(aside)
        try:
            about: About = self._work.ask("about")
        except _GoneError:
            self._process.join()
            raise InternalError(
                f"the device process ended while it loaded, with exit code {self._process.exitcode}"
            ) from None
        except BaseException:
            self._kill()
            raise
        return about

    def _kill(self) -> None:
        atexit.unregister(self._kill)
        with contextlib.suppress(ValueError):  # it has been closed
            self._process.kill()
            self._process.join()

    def _watch(self) -> None:
        """Start the process again whenever it ends."""
        while True:
            self._process.join()
            if self._closing.is_set():
                return
            self._up.clear()
            code = self._process.exitcode
            log.error("the device process ended with exit code %s; it is started again", code)
            while not self._closing.is_set():
                try:
                    if self._start() != self._about:
                        self._kill()
                        raise InternalError("the weights are others than before; restart the service")
                except Exception as error:
                    log.error("the device process does not start: %s", error)
                    self._closing.wait(_RETRY_S)
                    continue
                self._held.clear()
                log.info("the device process is back")
                self._up.set()
                break


def _away() -> NotReady:
    return NotReady("the device process ended; it is being started again", retry_after=5.0)


def _main(settings: Settings, work: Connection, aside: Connection) -> None:
    """Be the device process: load, then compute what is asked until the service is gone."""
    for received in (signal.SIGINT, signal.SIGTERM):  # a group may get them; the service says when to end
        signal.signal(received, signal.SIG_IGN)
    log_to_stderr(settings)
    sys.setswitchinterval(_SWITCH_S)
    number = 0
    with contextlib.suppress(EOFError, OSError):
        number, _, _ = work.recv()
        banks = TemplateBanks(open_store(settings.storage.store), settings.storage.max_templates)
        try:
            device = load(settings, banks)
        except Exception as error:
            work.send((number, _as_sent(error, "loading failed")))
            return
        banks.model = device.about.model
        gc.collect()
        gc.freeze()  # what has been loaded stays: the collector need not look through it again and again
        threading.Thread(target=_serve_aside, args=(device, aside), name="vessa-aside", daemon=True).start()
        work.send((number, device.about))
        _serve_work(device, work)


def _serve_work(device: LocalDevice, work: Connection) -> None:
    known: frozenset[str] = frozenset()
    while True:
        number, name, arguments = work.recv()
        try:
            answer = getattr(device, name)(*arguments)
        except Exception as error:
            work.send((number, _as_sent(error, f"{name} failed")))
            continue
        held = device.annotator.held_images()
        state = _State(
            held - known, known - held, dict(device.seconds()), {**device.bytes_held(), **_resident()}
        )
        known = held
        work.send((number, (answer, state)))


def _resident() -> dict[str, int]:
    """Return what this process takes of the memory, where Linux tells."""
    told = Path("/proc/self/statm")
    if not told.exists():
        return {}
    return {"device_process": int(told.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")}


def _serve_aside(device: LocalDevice, aside: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            number, name, arguments = aside.recv()
            try:
                answer = getattr(device, name)(*arguments)
            except Exception as error:
                answer = _as_sent(error, f"{name} failed")
            aside.send((number, answer))
    os._exit(0)  # the service is gone, and nobody waits for what is computed now


def _as_sent(error: Exception, what: str) -> Exception:
    """Return an error that the service can read, which has no torch; it keeps no tensors by its traceback."""
    if isinstance(error, VessaError):
        return error.with_traceback(None)
    if is_out_of_memory(error):
        return MemoryError(str(error))
    log.error("%s", what, exc_info=error)
    return RuntimeError(f"{type(error).__name__}: {error}")
