"""Adaptation of banks in the background of a running service; one at a time."""

import logging
import threading
from contextlib import AbstractContextManager
from dataclasses import replace

from vessa.errors import QueueFull, UnknownBank, VessaError
from vessa.schemas import AdaptationInfo
from vessa_server.model.vessa import Vessa
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.retrieval import Bank

log = logging.getLogger(__name__)


class _Stopped(Exception):
    """The service shuts down."""


class AdaptationRunner:
    """Runs adaptations in a thread of their own, one at a time. All methods may be called from any thread.

    A kept adaptation is stored with its bank; the states of all others are kept here, in memory.

    digest: of the model's weights; decoder_lock: held while the mask decoder is copied
    """

    def __init__(
        self,
        banks: TemplateBanks,
        model: Vessa,
        digest: str,
        decoder_lock: AbstractContextManager[object],
    ) -> None:
        self._banks, self._model, self._digest, self._decoder_lock = banks, model, digest, decoder_lock
        self._states: dict[tuple[str, str | None], AdaptationInfo] = {}  # by bank and owner
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, name: str, seconds: float) -> AdaptationInfo:
        """Begin to adapt to a bank, for at most `seconds`; UnknownBank, QueueFull while another one runs."""
        bank = self._banks.get(name)
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                raise QueueFull("another bank is being adapted to; try again later", retry_after=30.0)
            self._states[_key(bank)] = AdaptationInfo(bank=name, state="running")
            self._thread = threading.Thread(
                target=self._run, args=(bank, seconds), name="vessa-adapt", daemon=True
            )
            self._thread.start()
            return self._states[_key(bank)]

    def info(self, name: str) -> AdaptationInfo:
        """Return how it goes, or went; UnknownBank."""
        bank = self._banks.get(name)
        known = self._states.get(_key(bank))
        if known is not None:
            return known
        if bank.adaptation is not None:
            return AdaptationInfo(bank=name, state="done", progress=1.0, figures=bank.adaptation.figures)
        return AdaptationInfo(bank=name, state="none")

    def forget(self, name: str) -> None:
        """Serve a bank by the common weights again; UnknownBank, QueueFull while it is being adapted to."""
        if self.info(name).state == "running":
            raise QueueFull("the bank is being adapted to; try again later", retry_after=30.0)
        bank = self._banks.get(name)
        self._banks.adapt(name, None)
        self._states.pop(_key(bank), None)

    def stop(self, seconds: float) -> None:
        """Give up what runs, and wait for the end of its step for at most `seconds`."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, bank: Bank, seconds: float) -> None:
        def progress(share: float, step: int, dice: float) -> None:
            if self._stopping.is_set():
                raise _Stopped
            self._states[_key(bank)] = AdaptationInfo(
                bank=bank.name, state="running", progress=min(share, 1.0)
            )

        # Imported here: it brings all of Stage 1's data code, which a worker that never adapts need not load.
        from vessa_server.adaptation.finetune import adapt

        try:
            found, figures = adapt(
                self._model,
                replace(bank, adaptation=None),
                self._digest,
                seconds=seconds,
                lock=self._decoder_lock,
                progress=progress,
            )
            log.info("bank %s: adaptation %s", bank.name, figures)
            if found is not None:
                self._banks.adapt(bank.name, found, learned_from=bank)
                del self._states[_key(bank)]
                return
            state = AdaptationInfo(bank=bank.name, state="done", progress=1.0, figures=figures)
        except _Stopped:
            return
        except UnknownBank as error:
            state = AdaptationInfo(bank=bank.name, state="failed", error=f"the bank was deleted: {error}")
        except VessaError as error:
            state = AdaptationInfo(bank=bank.name, state="failed", error=str(error))
        except Exception:
            log.exception("adaptation to bank %s failed", bank.name)
            state = AdaptationInfo(bank=bank.name, state="failed", error="the service's log says why")
        self._states[_key(bank)] = state


def _key(bank: Bank) -> tuple[str, str | None]:
    """Whose adaptation it is: a bank that another key makes under the same name is another one."""
    return bank.name, bank.owner
