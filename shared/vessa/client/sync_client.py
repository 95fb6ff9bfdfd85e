"""Clients of the annotator, sync and async.

Requests are built and answers read by plain functions, in `vessa.client.endpoints` above all; the two clients
only send. What may be repeated safely is repeated, waiting as long as Retry-After says.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import TypeVar, Unpack

import httpx
import stamina

from vessa.client import endpoints, job_endpoints, suggest_run
from vessa.client.endpoints import Call
from vessa.client.segment_run import Progress, SegmentRun
from vessa.client.transport import Connection, RepeatableError, failure_of, result_of
from vessa.client.types import Annotation, Image, SegmentOptions
from vessa.errors import Retryable, VessaError
from vessa.schemas import AdaptationInfo, BankInfo, JobInfo, ServiceInfo, Suggestions, TemplateInfo
from vessa.tracing import trace_headers

_T = TypeVar("_T")


def _trace(request: httpx.Request) -> None:
    request.headers.update(trace_headers())


class AnnotatorClient(Connection):
    """Talks to one annotator. Safe to share between threads.

    url: None takes VESSA_URL, else port 8700 of this machine; api_key: None looks in VESSA_API_KEY,
    then in the local key file; transport: an httpx transport in place of the network; timeout: seconds
    a request may take; attempts: tries that a repeatable request gets; in_flight: requests of one call of
    `segment` under way at once, so that the service reads one while it works on another. Every method raises
    VessaError subclasses, among them Unreachable when nobody answers.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        transport: httpx.BaseTransport | None = None,
        timeout: float = 60.0,
        attempts: int = 4,
        wait_initial: float = 0.2,
        in_flight: int = 2,
    ) -> None:
        """Open a client; use it as a context manager or `close` it."""
        super().__init__(url, api_key, timeout, attempts, wait_initial, in_flight)
        self._http = httpx.Client(transport=transport, event_hooks={"request": [_trace]}, **self._options)

    def __enter__(self) -> "AnnotatorClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def _send(self, call: Call[_T]) -> _T:
        try:
            for attempt in stamina.retry_context(**self._retry):
                with attempt:
                    try:
                        response = self._http.request(call.method, call.path, **call.options)
                    except httpx.RequestError as error:
                        raise failure_of(self.url, self._timeout, call, error) from error
                    return result_of(call, response)
        except RepeatableError as error:
            raise error.error from error.__cause__
        raise AssertionError("stamina gives at least one attempt")

    def info(self) -> ServiceInfo:
        """What is running there."""
        return self._send(endpoints.info())

    def ready(self) -> bool:
        """Whether it takes requests now."""
        try:
            return self._send(endpoints.ready())
        except VessaError:
            return False

    def banks(self) -> list[BankInfo]:
        """All template banks."""
        return self._send(endpoints.banks())

    def bank(self, name: str) -> BankInfo:
        """One template bank. Raises UnknownBank."""
        return self._send(endpoints.bank(name))

    def templates(self, bank: str) -> list[TemplateInfo]:
        """The templates of a bank."""
        return self._send(endpoints.templates(bank))

    def add_templates(
        self,
        bank: str,
        images: Sequence[Image],
        masks: Sequence[Image],
        classes: Mapping[int, str],
        groups: Sequence[str],
    ) -> list[TemplateInfo]:
        """Add annotated images; the same image, mask, classes and group are added once.

        images: uint8 (H, W[, 3]); masks: uint8 (H, W) class ids; groups: the patient of each.
        """
        calls = endpoints.add_templates(bank, images, masks, classes, groups)
        return endpoints.in_order(len(images), ((call, self._send(call)) for call in calls))

    def delete_template(self, bank: str, template: str) -> None:
        """Remove one template. Raises UnknownTemplate."""
        self._send(endpoints.delete_template(bank, template))

    def delete_bank(self, name: str) -> None:
        """Remove a bank with all its templates. Raises UnknownBank."""
        self._send(endpoints.delete_bank(name))

    def adapt(self, bank: str, seconds: float = 120.0) -> AdaptationInfo:
        """Let the annotator learn from a bank's templates for at most `seconds`, in the background.

        Raises UnknownBank, InvalidRequest for a bank with too few templates or too long a time, QueueFull
        while another bank is being adapted to. `adaptation` tells how it goes.
        """
        return self._send(endpoints.adapt(bank, seconds))

    def adaptation(self, bank: str) -> AdaptationInfo:
        """How the adaptation of a bank goes, or went. Raises UnknownBank."""
        return self._send(endpoints.adapt(bank))

    def forget_adaptation(self, bank: str) -> None:
        """Serve a bank by the common weights again. Raises UnknownBank."""
        self._send(endpoints.forget_adaptation(bank))

    def segment(
        self,
        images: Sequence[Image] | None = None,
        *,
        bank: str,
        image_ids: Sequence[str] | None = None,
        by_id: bool = False,
        progress: Progress | None = None,
        **options: Unpack[SegmentOptions],
    ) -> list[Annotation]:
        """Segment images, or images the service has seen, by their ids.

        images: uint8 (H, W[, 3]), sizes may differ; image_ids: of images of one size; by_id: send the ids of
        `images` first, and pixels only of those that the service does not hold; progress(done, total): called
        after each answer; further options: classes, groups, prompts, template_choice, seed, probabilities,
        see `client.types.SegmentOptions`. Any number of images is split into requests; answers are in the
        order of the images. Items that failed for the moment are sent again, alone. One that failed for good
        has its `error` set; the others are not touched by it.
        """
        run = SegmentRun(images, bank, image_ids, by_id, self._attempts, progress, options)
        while (calls := run.calls()) is not None:
            time.sleep(run.wait(self._wait_initial))
            for call, answers in self._stream(calls):
                run.receive(call, answers)
        return run.annotations()

    def annotation(self, identity: str) -> Annotation:
        """What was answered under an `annotation_id`, with its provenance, while the service keeps it.

        Its confidence is not kept. Raises UnknownAnnotation, also for another key's.
        """
        return self._send(endpoints.annotation(identity))

    def suggest(
        self,
        bank: str,
        images: Sequence[Image],
        *,
        groups: Sequence[str | None] | None = None,
        count: int = 10,
        progress: suggest_run.Progress | None = None,
    ) -> Suggestions:
        """Rank unlabeled images, or patients, by what annotating them would bring to a bank.

        images: uint8 (H, W[, 3]), a list or anything that reads them when they are asked for by number: each
        is read for its id, and once more if the service has not looked at it by now; groups: the patient of
        each, whose images are annotated together; None for one alone; count: of suggestions, at most;
        progress(done, total): of images that were looked at. The bank may be a new one. Raises TooLarge for
        more candidates than the service takes, before it is sent any of them.
        """
        run = suggest_run.SuggestRun(bank, images, groups, count, progress)
        while (answer := self._send(run.ranking())).unknown:
            for call, _ in self._stream(run.looks(answer)):
                run.receive(call)
        return answer

    def segment_volume(
        self,
        path: Path,
        *,
        bank: str = "default",
        classes: Sequence[str] | None = None,
        group: str | None = None,
        axis: str = "auto",
        result: str | None = None,
        progress: Callable[[JobInfo], None] = lambda info: None,
    ) -> bytes:
        """Segment a NIfTI or DICOM file, or a folder with a DICOM series, and wait for it.

        axis: auto, axial, coronal or sagittal; result: nifti or dicom-seg, None for what fits the input.
        Returns the .nii.gz or DICOM SEG file. Ctrl-C cancels the job.
        """
        info = self._send(
            job_endpoints.create(path, bank=bank, classes=classes, group=group, axis=axis, result=result)
        )
        heard = time.monotonic()
        try:
            while info.state in ("queued", "running"):
                progress(info)
                time.sleep(job_endpoints.POLL_S)
                try:
                    info, heard = self._send(job_endpoints.info(info.id)), time.monotonic()
                except Retryable as error:
                    job_endpoints.bear(error, info.id, heard)
            progress(info)
            data = self._send(job_endpoints.result(info.id))
        finally:
            with contextlib.suppress(VessaError):  # what came, or why nothing did, matters more
                self._send(job_endpoints.cancel(info.id))  # it is needed there no more
        return data

    def _stream(self, calls: Iterable[Call[_T]]) -> Iterator[tuple[Call[_T], _T]]:
        """Send with `in_flight` requests under way; a body is made when its turn comes."""
        calls = iter(calls)
        first = list(itertools.islice(calls, self._in_flight))
        if len(first) == 1:  # needs no thread of its own
            for call in itertools.chain(first, calls):
                yield call, self._send(call)
            return
        with ThreadPoolExecutor(self._in_flight, "vessa-client") as pool:
            running = {pool.submit(self._send, call): call for call in first}
            while running:
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    call, answer = running.pop(done), done.result()
                    running |= {pool.submit(self._send, more): more for more in itertools.islice(calls, 1)}
                    yield call, answer
