"""The main function of the worker process: load the annotator, then answer calls from two pipes."""

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path

from vessa.errors import VessaError
from vessa_server.observability.logs import log_to_stderr
from vessa_server.serving.batch_runner import is_out_of_memory
from vessa_server.serving.worker import Worker, load
from vessa_server.settings import Settings
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.store import open_store

log = logging.getLogger(__name__)

# The computing thread releases the interpreter after every operation. While a bank is being adapted to, it
# must not wait Python's default of 5 ms to get it back.
_SWITCH_S = 0.0005


@dataclass(frozen=True)
class WorkerState:
    """What changed in the worker during one computing call.

    added, dropped: ids of images whose features came into the cache or left it
    seconds: by stage of inference; nbytes: by where the bytes are held
    """

    added: frozenset[str]
    dropped: frozenset[str]
    seconds: dict[str, float]
    nbytes: dict[str, int]


def run_worker(settings: Settings, computing: Connection, control: Connection) -> None:
    """Load the annotator, then answer calls until the service closes its end of the pipes.

    A call is (number, method of `Worker`, arguments), an answer (number, result or exception).
    """
    # A signal may reach the whole process group; the service alone decides when this process ends.
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    threading.Thread(target=_end_with_service, name="vessa-parent", daemon=True).start()
    log_to_stderr(settings)
    sys.setswitchinterval(_SWITCH_S)
    number = 0
    with contextlib.suppress(EOFError, OSError):
        number, _, _ = computing.recv()
        banks = TemplateBanks(open_store(settings.storage.store), settings.storage.max_templates)
        try:
            worker = load(settings, banks)
        except Exception as error:
            computing.send((number, portable_error(error, "loading failed")))
            return
        banks.model = worker.info.model
        gc.collect()
        gc.freeze()  # loaded objects stay alive, so the collector need not scan them again and again
        threading.Thread(
            target=_serve_control, args=(worker, control), name="vessa-control", daemon=True
        ).start()
        computing.send((number, worker.info))
        _serve_computing(worker, computing)


def _end_with_service() -> None:
    """End this process when the service ends, also while it loads and reads no pipe."""
    service = parent_process()
    assert service is not None  # this is a child process
    service.join()
    os._exit(0)


def _serve_computing(worker: Worker, computing: Connection) -> None:
    known: frozenset[str] = frozenset()
    while True:
        number, method, arguments = computing.recv()
        try:
            answer = getattr(worker, method)(*arguments)
        except Exception as error:
            computing.send((number, portable_error(error, f"{method} failed")))
            continue
        held = worker.held_images()
        nbytes = {**worker.bytes_held(), **_resident_bytes()}
        state = WorkerState(held - known, known - held, dict(worker.stage_seconds()), nbytes)
        known = held
        computing.send((number, (answer, state)))


def _serve_control(worker: Worker, control: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            number, method, arguments = control.recv()
            try:
                answer = getattr(worker, method)(*arguments)
            except Exception as error:
                answer = portable_error(error, f"{method} failed")
            control.send((number, answer))
    os._exit(0)  # the service is gone, and no client waits for the batch at hand


def _resident_bytes() -> dict[str, int]:
    """Return the resident memory of this process where Linux reports it."""
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return {}
    return {"worker_process": int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")}


def portable_error(error: Exception, what: str) -> Exception:
    """Return an error that the service can unpickle without torch, and whose traceback holds no tensors."""
    if isinstance(error, VessaError):
        return error.with_traceback(None)
    if is_out_of_memory(error):
        return MemoryError(str(error))
    log.error("%s", what, exc_info=error)
    return RuntimeError(f"{type(error).__name__}: {error}")
