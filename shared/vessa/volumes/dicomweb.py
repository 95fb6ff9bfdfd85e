"""Talk to a DICOMweb archive: find a series, retrieve its files, store a segmentation."""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pydicom

from vessa.errors import InvalidConfig, InvalidImage, InvalidRequest, Unreachable, VessaError
from vessa.redaction import redact, remember_secret

_T = TypeVar("_T")
NO_IMAGES = {"SEG", "SR", "PR", "KO", "RTSTRUCT", "RTPLAN", "DOC", "REG"}
_TIMEOUT_S = 60


@dataclass(frozen=True)
class ArchiveSeries:
    """A series as an archive lists it. count: of its files, empty where the archive does not say."""

    study: str
    uid: str
    modality: str
    description: str
    count: str


class Archive:
    """One DICOMweb archive, closed by `close` or a `with` block. Not to be shared between threads.

    url: its root; token: bearer token; user, password: for basic authentication. Raises InvalidConfig
    without the library dicomweb-client, or for half a pair of credentials.
    """

    def __init__(
        self, url: str, token: str | None = None, user: str | None = None, password: str | None = None
    ) -> None:
        """Prepare the connection; nothing is sent yet."""
        try:
            from dicomweb_client.api import DICOMwebClient
            from dicomweb_client.session_utils import create_session, create_session_from_user_pass
        except ImportError as error:
            raise InvalidConfig(
                "DICOMweb needs the extra `dicomweb`: pip install 'vessa[dicomweb]'"
            ) from error
        for secret in (token, password):
            if secret:
                remember_secret(secret)
        if (user is None) != (password is None) or (token and user):
            raise InvalidConfig("the archive's credentials are a token, or a user with a password")
        if user is not None and password is not None:
            session = create_session_from_user_pass(user, password)
        else:
            session = create_session()
        headers = {"Authorization": f"Bearer {token}"} if token else None
        self._url, self._session = url, session
        self._client = DICOMwebClient(url, session=session, headers=headers, timeout=_TIMEOUT_S)
        # The library's five attempts would take half a minute until a wrong address is named.
        self._client.set_http_retry_params(max_attempts=3, wait_exponential_multiplier=250)

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._session.close()

    def series_since(self, date: str) -> list[ArchiveSeries]:
        """Return all series of the studies from a date on, YYYYMMDD (QIDO-RS)."""
        found = []
        search = partial(
            self._client.search_for_studies, search_filters={"StudyDate": f"{date}-"}, get_remaining=True
        )
        for study in self._ask(search):
            uid = _value(study, "0020000D")
            for entry in self._ask(partial(self._client.search_for_series, uid)):
                modality, description, count = (
                    _value(entry, tag) for tag in ("00080060", "0008103E", "00201209")
                )
                found.append(ArchiveSeries(uid, _value(entry, "0020000E"), modality, description, count))
        return found

    def only_series(self, study: str) -> str:
        """Return the UID of the one series of images in a study; InvalidRequest lists them when several."""
        found = []
        for entry in self._ask(lambda: self._client.search_for_series(study)):
            modality, number, uid = (_value(entry, tag) for tag in ("00080060", "00200011", "0020000E"))
            if modality not in NO_IMAGES:
                found.append((uid, f"{modality or 'no modality'}, series number {number or 'none'}: {uid}"))
        if not found:
            raise InvalidRequest("the study holds no series of images, or the archive does not know it")
        if len(found) > 1:
            listed = "\n".join(f"  {text}" for _, text in found)
            raise InvalidRequest(f"the study holds {len(found)} series; choose one (--series UID):\n{listed}")
        return found[0][0]

    def retrieve(self, study: str, series: str, folder: Path) -> int:
        """Write the files of a series into a new folder, and return how many there are."""
        folder.mkdir(parents=True)
        count = 0

        def fetch() -> int:
            nonlocal count
            for dataset in self._client.iter_series(study, series, media_types=(("application/dicom", "*"),)):
                count += 1
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # about values, which they quote
                    dataset.save_as(folder / f"{count:06d}.dcm", enforce_file_format=True)
            return count

        if not self._ask(fetch):
            raise InvalidRequest("the archive has no files of this series")
        return count

    def store(self, data: bytes) -> str:
        """Store one DICOM file and return the UID of its series."""
        dataset = pydicom.dcmread(io.BytesIO(data))  # one of ours
        answer = self._ask(lambda: self._client.store_instances([dataset]))
        if "FailedSOPSequence" in answer and answer.FailedSOPSequence:
            reason = int(answer.FailedSOPSequence[0].get("FailureReason", 0))
            raise InvalidRequest(f"the archive refused the DICOM SEG (failure reason {reason:#06x})")
        return str(dataset.SeriesInstanceUID)

    def _ask(self, work: Callable[[], _T]) -> _T:
        import requests

        try:
            return work()
        except requests.HTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            hint = {
                401: "check its credentials",
                403: "check its credentials",
                404: "check the UIDs and the URL",
            }
            raise InvalidRequest(
                f"the archive answered with HTTP {status}; {hint.get(status, 'see its log')}"
            ) from None
        except (requests.RequestException, OSError):
            raise Unreachable(
                f"no DICOMweb archive answers at {redact(self._url)}; check the URL and the network"
            ) from None
        except VessaError:
            raise
        except Exception as error:
            # The libraries raise many kinds for a damaged answer, with words that may quote a patient.
            raise InvalidImage(
                f"the archive sent an answer or a file that cannot be read ({type(error).__name__})"
            ) from None


def _value(entry: dict[str, Any], tag: str) -> str:
    values = entry.get(tag, {}).get("Value") or [""]
    return str(values[0])
