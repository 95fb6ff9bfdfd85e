"""Run adaptations in the background of a service, one at a time."""

import logging
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vessa.errors import QueueFull, UnknownBank, VessaError
from vessa.schemas import AdaptationFigures, AdaptationInfo
from vessa_server.model.vessa import Vessa
from vessa_server.template_bank.adapted_weights import Adaptation
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.retrieval import Bank

log = logging.getLogger(__name__)

Squares = NDArray[np.uint8]


class _ShutdownError(Exception):
    """The service shuts down."""


class AdaptationRunner:
    """Runs adaptations in a thread of their own, one at a time. All methods may be called from any thread.

    A kept adaptation is stored with its bank; the states of all others are kept here, in memory.

    digest: of the model's weights
    """

    def __init__(self, banks: TemplateBanks, model: Vessa, digest: str) -> None:
        self._banks, self._model, self._digest = banks, model, digest
        self._states: dict[tuple[str, str | None], AdaptationInfo] = {}  # by bank and owner
        self._lock = threading.Lock()
        self._cancelled: set[tuple[str, str | None]] = set()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, name: str, seconds: float, images: Squares | None = None) -> AdaptationInfo:
        """Start to adapt to a bank, for at most `seconds`; UnknownBank, QueueFull while another one runs.

        images: the lab's unlabeled images as gray squares, uint8 (M, S, S); in memory until the end, never
        stored
        """
        bank = self._banks.get(name)
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                raise QueueFull(
                    "another bank is being adapted to, the limit is one at a time; retry later",
                    retry_after=30.0,
                )
            self._cancelled.discard(_key(bank))
            self._states[_key(bank)] = AdaptationInfo(bank=name, state="running")
            self._thread = threading.Thread(
                target=self._run, args=(bank, seconds, images), name="vessa-adapt", daemon=True
            )
            self._thread.start()
            return self._states[_key(bank)]

    def info(self, name: str) -> AdaptationInfo:
        """Return the state of a bank's adaptation; UnknownBank."""
        bank = self._banks.get(name)
        known = self._states.get(_key(bank))
        if known is not None:
            return known
        if bank.adaptation is not None:
            return AdaptationInfo(bank=name, state="done", progress=1.0, figures=bank.adaptation.figures)
        return AdaptationInfo(bank=name, state="none")

    def forget(self, name: str) -> None:
        """Serve a bank by the common weights again, and cancel a running adaptation. Raises UnknownBank."""
        bank = self._banks.get(name)
        with self._lock:
            self._cancelled.add(_key(bank))
        self._banks.adapt(name, None)
        self._states.pop(_key(bank), None)

    def stop(self, seconds: float) -> None:
        """Stop a running adaptation, and wait at most `seconds` for the end of its step."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(seconds)

    def fit(
        self,
        bank: Bank,
        seconds: float,
        images: Squares | None = None,
        progress: Callable[[float, int, float], None] = lambda share, step, dice: None,
    ) -> tuple[Adaptation | None, AdaptationFigures]:
        """Adapt to a bank in the calling thread; nothing is stored.

        progress(share done, step, best held-out Dice): called between steps, may raise to stop
        Returns the adaptation, None when it does not help, and its figures. Raises InvalidRequest.
        """
        # Imported here: it brings all data code of Stage 1, which a worker that never adapts need not load.
        from vessa_server.adaptation.finetune import adapt

        return adapt(
            self._model,
            replace(bank, adaptation=None),
            np.zeros((0, 1, 1), np.uint8) if images is None else images,
            self._digest,
            seconds=seconds,
            progress=progress,
        )

    def _run(self, bank: Bank, seconds: float, images: Squares | None) -> None:
        def progress(share: float, step: int, dice: float) -> None:
            if self._stopping.is_set() or _key(bank) in self._cancelled:
                raise _ShutdownError
            now = self._banks.get(bank.name)  # a deleted bank, or an erased patient, ends it
            if now.owner != bank.owner or not now.entries.keys() >= bank.entries.keys():
                raise UnknownBank("templates that it learns from were removed")
            self._states[_key(bank)] = AdaptationInfo(
                bank=bank.name, state="running", progress=min(share, 1.0)
            )

        try:
            found, figures = self.fit(bank, seconds, images, progress)
            log.info("bank %s: adaptation %s", bank.name, figures)
            if _key(bank) in self._cancelled:
                return
            if found is not None:
                self._banks.adapt(bank.name, found, learned_from=bank)
                del self._states[_key(bank)]
                return
            state = AdaptationInfo(bank=bank.name, state="done", progress=1.0, figures=figures)
        except _ShutdownError:
            return
        except UnknownBank as error:
            state = AdaptationInfo(bank=bank.name, state="failed", error=f"the bank was deleted: {error}")
        except VessaError as error:
            state = AdaptationInfo(bank=bank.name, state="failed", error=str(error))
        except Exception:
            log.exception("adaptation to bank %s failed", bank.name)
            state = AdaptationInfo(
                bank=bank.name, state="failed", error="adaptation failed; see the service's log"
            )
        self._states[_key(bank)] = state


def _key(bank: Bank) -> tuple[str, str | None]:
    """Return the key of a bank's state: another owner's bank of the same name is another bank."""
    return bank.name, bank.owner
