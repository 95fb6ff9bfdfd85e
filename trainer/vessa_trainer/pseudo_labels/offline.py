"""Keep the annotator's labels in a folder, so that training needs no service: nodes of clusters have none."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import Progress

from vessa import atomic_write
from vessa.client import Annotation, AnnotatorClient
from vessa.datasets import Dataset
from vessa.errors import ClientError, InvalidConfig
from vessa.schemas import BankInfo, ServiceInfo
from vessa_trainer.config import AnnotatorConfig
from vessa_trainer.data.splits import Splits, slices_of
from vessa_trainer.pseudo_labels.cache import FolderCache
from vessa_trainer.pseudo_labels.prefetcher import AnnotationFeed

_FILE = "labels.json"
_CHUNK = 64  # images between two movements of the progress bar


class MissingLabel(ClientError):
    """A folder of labels has none for an image that training needs."""

    code = "missing_label"


class OfflineAnnotator:
    """Answer from a folder of labels in place of a service, as far as training asks one.

    Labels come from the folder's cache before anybody is asked, so a request means that one is missing.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder that `write_labels` filled. Raises InvalidConfig."""
        self.url = str(folder)
        try:
            record: dict[str, Any] = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidConfig(
                f"annotator.labels is {folder}, which holds no {_FILE}. Write it with `vessa-trainer labels`"
            ) from error
        self._info = ServiceInfo.model_validate(record["service"])
        self._bank = BankInfo.model_validate(record["bank"])

    def __enter__(self) -> "OfflineAnnotator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close nothing."""

    def info(self) -> ServiceInfo:
        """Return what the service said when the labels were made."""
        return self._info

    def bank(self, name: str = "") -> BankInfo:
        """Return the bank that the labels came from, whatever its name."""
        return self._bank

    def segment(self, *, bank: str, **options: Any) -> list[Annotation]:
        """Raise MissingLabel: the folder does not hold what is requested."""
        images = options.get("images") or options.get("image_ids") or ()
        raise MissingLabel(
            f"{self.url} holds no labels for {len(images)} images that this run needs: the data, the splits "
            "or the "
            "classes have changed since. Run `vessa-trainer labels` again where the annotator is"
        )


def write_labels(
    client: AnnotatorClient,
    dataset: Dataset,
    splits: Splits,
    bank: BankInfo,
    config: AnnotatorConfig,
    folder: Path,
    *,
    seed: int,
) -> dict[str, Any]:
    """Request the labels of all images that are not labeled and write them to a folder; returns counts.

    Labels that are there already are not requested again, so that a stopped call continues. Raises what
    `AnnotationFeed.get` raises.
    """
    cache = FolderCache(folder)
    names = [s.name for s in slices_of(dataset, [*splits.unlabeled, *splits.val, *splits.test])]
    feed = AnnotationFeed(client, dataset, bank, cache, config, seed=seed)
    try:
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("labels", total=len(names))
            for start in range(0, len(names), _CHUNK):
                part = names[start : start + _CHUNK]
                feed.prefetch(names[start : start + 2 * _CHUNK])
                feed.get(part)
                bar.advance(task, len(part))
    finally:
        feed.close()
    stats = feed.stats()
    service = client.info().model_copy(update={"banks": []})
    record = {"service": service.model_dump(), "bank": bank.model_dump(), "images": len(names)}
    atomic_write.write_text(folder / _FILE, json.dumps(record, indent=1) + "\n")
    return {
        "images": len(names),
        "requested": stats["images"],
        "known": stats["cache_hits"],
        "failed": stats["failed_items"],
        "out": str(folder),
    }
