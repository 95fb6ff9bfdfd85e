"""The client for asyncio; `vessa.client` has the other one, and what both are about."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from functools import partial
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


async def _trace_async(request: httpx.Request) -> None:
    request.headers.update(trace_headers())


class AsyncAnnotatorClient(Connection):
    """The same client for asyncio; see `vessa.client.AnnotatorClient`."""

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
        """Open a client; use it as an async context manager or `aclose` it."""
        super().__init__(url, api_key, timeout, attempts, wait_initial, in_flight)
        hooks = {"request": [_trace_async]}
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

    async def info(self) -> ServiceInfo:
        """What is running there."""
        return await self._send(endpoints.info())

    async def ready(self) -> bool:
        """Whether it takes requests now."""
        try:
            return await self._send(endpoints.ready())
        except VessaError:
            return False

    async def banks(self) -> list[BankInfo]:
        """All template banks."""
        return await self._send(endpoints.banks())

    async def bank(self, name: str) -> BankInfo:
        """One template bank. Raises UnknownBank."""
        return await self._send(endpoints.bank(name))

    async def templates(self, bank: str) -> list[TemplateInfo]:
        """The templates of a bank."""
        return await self._send(endpoints.templates(bank))

    async def add_templates(
        self,
        bank: str,
        images: Sequence[Image],
        masks: Sequence[Image],
        classes: Mapping[int, str],
        groups: Sequence[str],
    ) -> list[TemplateInfo]:
        """Add annotated images; see AnnotatorClient."""
        calls = endpoints.add_templates(bank, images, masks, classes, groups)
        return endpoints.in_order(len(images), [(call, await self._send(call)) for call in calls])

    async def delete_template(self, bank: str, template: str) -> None:
        """Remove one template. Raises UnknownTemplate."""
        await self._send(endpoints.delete_template(bank, template))

    async def delete_bank(self, name: str) -> None:
        """Remove a bank with all its templates. Raises UnknownBank."""
        await self._send(endpoints.delete_bank(name))

    async def adapt(self, bank: str, seconds: float = 120.0) -> AdaptationInfo:
        """See AnnotatorClient.adapt."""
        return await self._send(endpoints.adapt(bank, seconds))

    async def adaptation(self, bank: str) -> AdaptationInfo:
        """How the adaptation of a bank goes, or went. Raises UnknownBank."""
        return await self._send(endpoints.adapt(bank))

    async def forget_adaptation(self, bank: str) -> None:
        """Serve a bank by the common weights again. Raises UnknownBank."""
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
        """Segment images; see AnnotatorClient."""
        run = SegmentRun(images, bank, image_ids, by_id, self._attempts, progress, options)
        while (calls := run.calls()) is not None:
            await asyncio.sleep(run.wait(self._wait_initial))
            async for call, answers in self._stream(calls):
                run.receive(call, answers)
        return run.annotations()

    async def annotation(self, identity: str) -> Annotation:
        """See AnnotatorClient.annotation."""
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
        """See AnnotatorClient.suggest."""
        run = await asyncio.to_thread(suggest_run.SuggestRun, bank, images, groups, count, progress)
        while (answer := await self._send(run.ranking())).unknown:
            async for call, _ in self._stream(run.looks(answer)):
                run.receive(call)
        return answer

    async def segment_volume(
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
        """See AnnotatorClient.segment_volume. Cancelling the task cancels the job."""
        create = partial(
            job_endpoints.create, path, bank=bank, classes=classes, group=group, axis=axis, result=result
        )
        info = await self._send(await asyncio.to_thread(create))
        heard = time.monotonic()
        try:
            while info.state in ("queued", "running"):
                progress(info)
                await asyncio.sleep(job_endpoints.POLL_S)
                try:
                    info, heard = await self._send(job_endpoints.info(info.id)), time.monotonic()
                except Retryable as error:
                    job_endpoints.bear(error, info.id, heard)
            progress(info)
            data = await self._send(job_endpoints.result(info.id))
        finally:
            with contextlib.suppress(VessaError):  # what came, or why nothing did, matters more
                await self._send(job_endpoints.cancel(info.id))  # it is needed there no more
        return data

    async def _stream(self, calls: Iterable[Call[_T]]) -> AsyncIterator[tuple[Call[_T], _T]]:
        calls = iter(calls)
        running: dict[asyncio.Task[_T], Call[_T]] = {}
        try:
            while True:
                free = itertools.islice(calls, self._in_flight - len(running))
                for call in await asyncio.to_thread(list, free):  # bodies are made, images may be read
                    running[asyncio.create_task(self._send(call))] = call
                if not running:
                    return
                for done in (await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))[0]:
                    yield running.pop(done), done.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
