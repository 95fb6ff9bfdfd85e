"""The annotator's client for asyncio. `scripts/make_sync_client.py` generates `sync_client.py` from it.

`vessa.client.endpoints` builds requests and reads responses with plain functions; the client only sends. It
repeats requests that are safe to repeat and waits as long as Retry-After says.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeVar, Unpack

import httpx
import numpy as np
import stamina

from vessa.answers.labeled_volume import LabeledVolume, labels_of
from vessa.answers.notebook import notebook_progress
from vessa.client import endpoints, job_endpoints, suggest_run
from vessa.client.concurrency import in_thread, stream_async
from vessa.client.endpoints import Call
from vessa.client.segment_run import Progress, SegmentRun
from vessa.client.transport import Connection, RepeatableError, failure_of, result_of
from vessa.client.types import Annotation, Image, Prompts, SegmentOptions
from vessa.errors import Retryable, VessaError
from vessa.images import read_image
from vessa.schemas import AdaptationInfo, BankInfo, JobInfo, ServiceInfo, Suggestions, TemplateInfo
from vessa.tracing import trace_headers
from vessa.volumes import read_volume

_T = TypeVar("_T")


async def _add_trace(request: httpx.Request) -> None:
    request.headers.update(trace_headers())


class AsyncAnnotatorClient(Connection):
    """Talk to one annotator. One client serves all tasks of one event loop.

    url: address; None takes VESSA_URL, then port 8700 of this machine
    api_key: None takes VESSA_API_KEY, then the local key file
    transport: an httpx transport in place of the network
    timeout: seconds that a request may take
    attempts: how often a request that is safe to repeat is sent, at most
    wait_initial: seconds before the first retry, doubled with each further one
    in_flight: requests of one call of `segment` in progress at once, so that the service reads one while it
        computes another
    Every method raises subclasses of VessaError, among them Unreachable when the service does not respond.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        timeout: float = 60.0,
        attempts: int = 4,
        wait_initial: float = 0.2,
        in_flight: int = 2,
    ) -> None:
        """Open a client; use it in a `with` block or close it with `aclose`."""
        super().__init__(url, api_key, timeout, attempts, wait_initial, in_flight)
        hooks = {"request": [_add_trace]}
        self._http = httpx.AsyncClient(transport=transport, event_hooks=hooks, **self._options)

    async def __aenter__(self) -> "AsyncAnnotatorClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def _send(self, call: Call[_T]) -> _T:
        try:
            async for attempt in stamina.retry_context(**self._retry):
                with attempt:
                    try:
                        response = await self._http.request(call.method, call.path, **call.options)
                    except httpx.RequestError as error:
                        raise failure_of(self.url, self._timeout, call, error) from error
                    return result_of(call, response)
        except RepeatableError as error:
            raise error.error from error.__cause__
        raise AssertionError("stamina gives at least one attempt")

    def _stream(self, calls: Iterable[Call[_T]]) -> AsyncIterator[tuple[Call[_T], _T]]:
        return stream_async(self._send, calls, self._in_flight)

    async def info(self) -> ServiceInfo:
        """Return the service's version, model and limits."""
        return await self._send(endpoints.info())

    async def ready(self) -> bool:
        """Return whether the service accepts requests now."""
        try:
            return await self._send(endpoints.ready())
        except VessaError:
            return False

    async def banks(self) -> list[BankInfo]:
        """List the template banks."""
        return await self._send(endpoints.banks())

    async def bank(self, name: str) -> BankInfo:
        """Describe one template bank. Raises UnknownBank."""
        return await self._send(endpoints.bank(name))

    async def templates(self, bank: str) -> list[TemplateInfo]:
        """List the templates of a bank."""
        return await self._send(endpoints.templates(bank))

    async def add_templates(
        self,
        bank: str,
        images: Sequence[Image],
        masks: Sequence[Image],
        classes: Mapping[int, str],
        groups: Sequence[str],
    ) -> list[TemplateInfo]:
        """Add annotated images to a bank. Adding the same image, mask, classes and group again has no effect.

        images: uint8 (H, W[, 3]), sizes may differ
        masks: uint8 (H, W) class ids, 0 is background
        classes: class id to name
        groups: the patient of each image
        """
        calls = endpoints.add_templates(bank, images, masks, classes, groups)
        return endpoints.in_order(len(images), [(call, await self._send(call)) for call in calls])

    async def delete_template(self, bank: str, template: str) -> None:
        """Delete one template. Raises UnknownTemplate."""
        await self._send(endpoints.delete_template(bank, template))

    async def delete_bank(self, name: str) -> None:
        """Delete a bank with all its templates. Raises UnknownBank."""
        await self._send(endpoints.delete_bank(name))

    async def adapt(self, bank: str, seconds: float = 1200.0, images: Image | None = None) -> AdaptationInfo:
        """Start to train the annotator on a bank's templates, in the background, for at most `seconds`.

        images: unlabeled images of the lab, uint8 (M, 240, 240) with M at most 400; `vessa.bulk.adapt_bank`
            makes them of any images and waits for the end
        `adaptation` returns the progress. Raises UnknownBank, InvalidRequest when the bank has too few
        templates or the time is too long, QueueFull while the annotator adapts to another bank.
        """
        return await self._send(endpoints.adapt(bank, seconds, images))

    async def adaptation(self, bank: str) -> AdaptationInfo:
        """Return the progress or the result of a bank's adaptation. Raises UnknownBank."""
        return await self._send(endpoints.adaptation(bank))

    async def forget_adaptation(self, bank: str) -> None:
        """Delete a bank's adapted weights; the common weights serve it again. Raises UnknownBank."""
        await self._send(endpoints.forget_adaptation(bank))

    async def segment(
        self,
        images: Sequence[Image] | None = None,
        *,
        bank: str,
        image_ids: Sequence[str] | None = None,
        by_id: bool = False,
        progress: Progress | None = None,
        **options: Unpack[SegmentOptions],
    ) -> list[Annotation]:
        """Segment any number of images; returns one annotation per image, in their order.

        images: uint8 (H, W[, 3]), sizes may differ
        image_ids: in place of `images`, ids of images of one size that the service still holds
        by_id: send the ids of `images` first, and pixels only for ids that the service does not hold
        progress: called as progress(done, total) after each response
        options: classes, groups, prompts, template_choice, seed, probabilities, clean; see
            `client.types.SegmentOptions`
        An item that fails with a Retryable error is sent again, alone. An item that fails for good has its
        `error` set; it does not affect the others.
        """
        run = SegmentRun(images, bank, image_ids, by_id, self._attempts, progress, options)
        while (calls := run.calls()) is not None:
            await asyncio.sleep(run.wait(self._wait_initial))
            async for call, answers in self._stream(calls):
                run.receive(call, answers)
        return run.annotations()

    async def segment_image(
        self,
        image: Image | Path | str,
        *,
        bank: str = "default",
        classes: Sequence[str] | None = None,
        group: str | None = None,
        prompts: Prompts | None = None,
        clean: bool = False,
    ) -> Annotation:
        """Segment one image; the annotation has the image, so that it can draw its overlay.

        image: uint8 (H, W[, 3]), or the path of a PNG, JPEG or TIFF file
        classes: names to segment; None: all classes of the bank
        group: the patient of the image, whose templates are not used
        clean: see `client.types.SegmentOptions`
        Raises InvalidImage when the file cannot be read, and the error of the image.
        """
        pixels = image if isinstance(image, np.ndarray) else await in_thread(read_image, Path(image))
        options: SegmentOptions = {
            "classes": classes,
            "groups": [group],
            "prompts": [prompts],
            "clean": clean,
        }
        (found,) = await self.segment([pixels], bank=bank, **options)
        if found.error is not None:
            raise found.error
        return replace(found, image=pixels)

    async def annotation(self, identity: str) -> Annotation:
        """Return a cached annotation by its `annotation_id`, with provenance but without confidence.

        Raises UnknownAnnotation when it is no longer in the cache or belongs to another key.
        """
        return await self._send(endpoints.annotation(identity))

    async def suggest(
        self,
        bank: str,
        images: Sequence[Image],
        *,
        groups: Sequence[str | None] | None = None,
        count: int = 10,
        progress: suggest_run.Progress | None = None,
    ) -> Suggestions:
        """Rank unlabeled images, or patients, by how much annotating them would improve a bank.

        bank: may be a new one
        images: uint8 (H, W[, 3]); a list, or any sequence that reads an image when it is indexed. Each image
            is read once for its id, and once more if the service does not have its features.
        groups: the patient of each image; images of one patient are annotated together; None: the image is
            ranked alone
        count: suggestions, at most
        progress: called as progress(done, total) with the images whose features the service has
        Raises TooLarge when there are more candidates than the service accepts, before any image is sent.
        """
        run = await in_thread(suggest_run.SuggestRun, bank, images, groups, count, progress)
        while (answer := await self._send(run.ranking())).unknown:
            async for call, _ in self._stream(run.feature_calls(answer)):
                run.receive(call)
        return answer

    async def label_volume(
        self,
        path: Path | str,
        *,
        bank: str = "default",
        classes: Sequence[str] | None = None,
        group: str | None = None,
        axis: str = "auto",
        series: int | None = None,
        progress: Progress | None = None,
    ) -> LabeledVolume:
        """Segment a volume; the result has the image, so that it can draw overlays and save any format.

        path: NIfTI or DICOM file, or a folder with a DICOM series
        progress: called as progress(done, total) about once a second; None: a bar in notebooks
        The other arguments are those of `segment_volume`.
        """
        path = Path(path)
        volume = await in_thread(partial(read_volume, path, series=series))
        show = progress or notebook_progress(path.name)
        notes: list[str] = []

        def follow(info: JobInfo) -> None:
            notes[:] = info.notes
            show(info.done, info.slices)

        chosen = {"bank": bank, "classes": classes, "group": group, "axis": axis, "series": series}
        data = await self.segment_volume(path, result="nifti", progress=follow, **chosen)  # type: ignore[arg-type]
        labels = await in_thread(labels_of, data, volume.shape)
        known = (await self.bank(bank)).classes
        names = {key: name for key, name in known.items() if classes is None or name in classes}
        return LabeledVolume(labels, volume, names, (await self.info()).model, notes)

    async def segment_volume(
        self,
        path: Path,
        *,
        bank: str = "default",
        classes: Sequence[str] | None = None,
        group: str | None = None,
        axis: str = "auto",
        result: str | None = None,
        series: int | None = None,
        clean: bool = False,
        progress: Callable[[JobInfo], None] = lambda info: None,
    ) -> bytes:
        """Segment a NIfTI or DICOM file, or a folder with a DICOM series, and wait for the result.

        axis: auto, axial, coronal or sagittal
        result: nifti, dicom-seg or nrrd; None: the format of the input
        series: place of one of several DICOM series in a folder, from 1
        clean: smooth the labels along z, keep the largest component of classes that have one
        progress: called with the job's state about once a second; its `notes` name what was repaired
        Returns the bytes of the file. Ctrl-C, or a cancelled task, cancels the job.
        """
        create = partial(
            job_endpoints.create,
            path,
            bank=bank,
            classes=classes,
            group=group,
            axis=axis,
            result=result,
            series=series,
            clean=clean,
        )
        info = await self._send(await in_thread(create))
        answered = time.monotonic()
        try:
            while info.state in ("queued", "running"):
                progress(info)
                await asyncio.sleep(job_endpoints.POLL_S)
                try:
                    info, answered = await self._send(job_endpoints.info(info.id)), time.monotonic()
                except Retryable as error:
                    job_endpoints.check_patience(error, info.id, answered)
            progress(info)
            data = await self._send(job_endpoints.result(info.id))
        finally:
            # The result, or the error on its way, matters more than a failure to delete the job.
            with contextlib.suppress(VessaError):
                await self._send(job_endpoints.cancel(info.id))
        return data
