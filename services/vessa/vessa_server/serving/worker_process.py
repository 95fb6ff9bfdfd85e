"""An annotator in a process of its own, so that computing and HTTP do not share one interpreter.

Two pipes lead to the process: one for what computes, one for control calls that must not wait behind it. A
worker process that dies (killed for its memory, a driver fault) is started again. The batch it died of is
halved by the queue, so that only the item to blame fails.
"""

import atexit
import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from vessa.errors import InternalError, NotReady
from vessa.schemas import AdaptationInfo
from vessa_server.serving.worker_main import WorkerState, run_worker
from vessa_server.settings import Settings
from vessa_server.types import Item, ModelInfo

log = logging.getLogger(__name__)

_RETRY_S = 2.0
_CONTROL_S = 10.0  # limit of a control call


class _ProcessEndedError(Exception):
    """The worker process has ended, or its pipe has been closed."""


class _Pipe:
    """Calls over one pipe, one at a time, from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._number = 0

    def call(self, method: str, *arguments: Any, seconds: float | None = None) -> Any:
        """Return the result of a method of the worker, or raise its error.

        Raises _ProcessEndedError, and NotReady after `seconds`.
        """
        with self._lock:
            try:
                self._number += 1
                self._connection.send((self._number, method, arguments))
                return self._receive(seconds)
            except (EOFError, OSError) as error:
                raise _ProcessEndedError from error

    def _receive(self, seconds: float | None) -> Any:
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._connection.poll(left):
                raise NotReady(f"the worker process did not answer within {_CONTROL_S:g} s", retry_after=5.0)
            number, answer = self._connection.recv()
            if number == self._number:  # any other number is the late answer of a call that timed out
                if isinstance(answer, Exception):
                    raise answer
                return answer

    def close(self) -> None:
        """Close this end, which ends the loop at the other end."""
        self._connection.close()


class WorkerProcess:
    """A `Worker` whose annotator runs in another process, which is started again when it dies.

    The process opens the store of the banks itself and sees their changes as every other process does.
    """

    def __init__(self, settings: Settings) -> None:
        """Start the process and wait until it has loaded; raises the error of a failed start."""
        self._settings = settings
        self._closing, self._up = threading.Event(), threading.Event()
        self._held: set[str] = set()
        self._seconds: dict[str, float] = {}
        self._nbytes: dict[str, int] = {}
        self._info = self._start()
        self._up.set()
        threading.Thread(target=self._watch, name="vessa-worker-watch", daemon=True).start()

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""
        return self._info

    @property
    def pid(self) -> int | None:
        """Id of the worker process."""
        return self._process.pid

    def compute(self, items: list[Item]) -> list[Any]:
        """Return one result or VessaError for each item, in order."""
        return list(self._compute("compute", items))

    def release_memory(self, everything: bool) -> None:
        """Return free memory to the device; everything: drop cached images and templates too."""
        self._compute("release_memory", everything)

    def holds(self, image_id: str) -> bool:
        """Whether the features of an image are cached, so that a request needs no pixels."""
        return image_id in self._held

    def held_images(self) -> frozenset[str]:
        """Return the ids of all images with cached features."""
        return frozenset(self._held)

    def stage_seconds(self) -> Mapping[str, float]:
        """Return the time spent in each stage of inference since the start, s."""
        return self._seconds

    def bytes_held(self) -> Mapping[str, int]:
        """Return the bytes in use, by where they are held."""
        return self._nbytes

    def adapt(self, bank: str, seconds: float, images: np.ndarray | None = None) -> AdaptationInfo:
        """Start to adapt to a bank, for at most `seconds`; UnknownBank, QueueFull while another one runs.

        images: unlabeled gray squares, uint8 (M, S, S)
        """
        info: AdaptationInfo = self._control_call("adapt", bank, seconds, images)
        return info

    def adaptation(self, bank: str) -> AdaptationInfo:
        """Return the state of a bank's adaptation; UnknownBank."""
        info: AdaptationInfo = self._control_call("adaptation", bank)
        return info

    def forget_adaptation(self, bank: str) -> None:
        """Serve a bank by the common weights again; UnknownBank, QueueFull while it is being adapted to."""
        self._control_call("forget_adaptation", bank)

    def check(self) -> None:
        """Raise NotReady while the process is down, LanguageUnavailable while the language model is."""
        self._control_call("check")

    def close(self, seconds: float) -> None:
        """End the process; results that are not computed within `seconds` are lost."""
        self._closing.set()
        self._up.set()  # wakes the batch thread, which then sees `_closing`
        self._computing.close()
        self._control.close()
        self._process.join(seconds)
        self._kill()

    def _compute(self, method: str, argument: Any) -> Any:
        """Run a computing method; RuntimeError when the process died meanwhile: the queue then halves."""
        self._up.wait()
        if self._closing.is_set():
            raise NotReady("the service is shutting down", retry_after=5.0)
        try:
            answer, state = self._computing.call(method, argument)
        except _ProcessEndedError:
            if not self._closing.is_set():
                self._up.clear()  # at once, or the next batch would be blamed for the same death
            raise RuntimeError("the worker process ended during this batch") from None
        self._update(state)
        return answer

    def _update(self, state: WorkerState) -> None:
        self._held |= state.added
        self._held -= state.dropped
        self._seconds, self._nbytes = state.seconds, state.nbytes

    def _control_call(self, method: str, *arguments: Any) -> Any:
        if not self._up.is_set():
            raise _restarting()
        try:
            return self._control.call(method, *arguments, seconds=_CONTROL_S)
        except _ProcessEndedError:
            raise _restarting() from None

    def _start(self) -> ModelInfo:
        """Start the process and return its model; raises the error of a failed start."""
        context = get_context("spawn")  # a fork would copy the threads' locks, and CUDA cannot be forked
        computing, inner_computing = context.Pipe()
        control, inner_control = context.Pipe()
        self._process = context.Process(
            target=run_worker,
            args=(self._settings, inner_computing, inner_control),
            name="vessa-worker",
            daemon=True,
        )
        self._process.start()
        # The worker ignores SIGTERM, with which multiprocessing would end it at exit.
        atexit.register(self._kill)
        inner_computing.close()
        inner_control.close()
        self._computing, self._control = _Pipe(computing), _Pipe(control)
        try:
            info: ModelInfo = self._computing.call("info")
        except _ProcessEndedError:
            self._process.join()
            raise InternalError(
                f"the worker process ended while it loaded, with exit code {self._process.exitcode}"
            ) from None
        except BaseException:
            self._kill()
            raise
        return info

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
            log.error("the worker process ended with exit code %s; starting it again", code)
            while not self._closing.is_set():
                try:
                    if self._start() != self._info:
                        self._kill()
                        raise InternalError("the weights changed since startup; restart the service")
                except Exception as error:
                    log.error("the worker process does not start: %s", error)
                    self._closing.wait(_RETRY_S)
                    continue
                self._held.clear()
                log.info("the worker process is back")
                self._up.set()
                break


def _restarting() -> NotReady:
    return NotReady("the worker process ended and is being started again; retry later", retry_after=5.0)
