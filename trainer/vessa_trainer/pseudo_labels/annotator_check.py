"""Check that the annotator is the one that a config names, and the same from the first step to the last."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vessa import atomic_write
from vessa.client import AnnotatorClient
from vessa.errors import InvalidConfig, ServiceError, Unreachable
from vessa.schemas import BankInfo, ServiceInfo
from vessa_trainer.config import AnnotatorConfig
from vessa_trainer.pseudo_labels.types import LabelService

ANNOTATOR_FILE = "annotator.json"
_log = logging.getLogger(__name__)
_RECORDED = ("model", "labels_version", "preset", "parts", "trained_on")
_SAME = ("model", "labels_version")  # of what is recorded: a change of these makes other labels
# Parts that take part, and whether Stage 1 must not have been there.
_SERVES: dict[str, tuple[list[str], bool]] = {
    "vessa": (["language", "memory"], False),
    "no_language": (["memory"], False),
    "no_memory": (["language"], False),
    "sam2": (["memory"], True),
    "prompts_only": ([], False),
}


def refusal(info: ServiceInfo, serves: str | None) -> str | None:
    """Say why a service is not what a config names, None when it is; see `AnnotatorConfig`."""
    if serves is None:
        return None
    parts, untrained = _SERVES[serves]
    if sorted(info.parts) != parts:
        ours, theirs = (" and ".join(p) or "prompts alone" for p in (parts, info.parts))
        left_out = ",".join(sorted({"language", "memory"} - set(parts)))
        how = f": start one with VESSA_WITHOUT={left_out}" if left_out else ""
        return f"it answers by {theirs}, '{serves}' means {ours}{how}"
    if untrained and info.trained_on is not None:
        data = ", ".join(info.trained_on)
        return f"its weights went through Stage 1 ({data}), '{serves}' means official SAM 2.1 weights alone"
    return None


def check_served(client: LabelService, config: AnnotatorConfig) -> ServiceInfo:
    """Ask a service who it is. Raises InvalidConfig when it is not what the config names; VessaError."""
    info = client.info()
    if (why := refusal(info, config.serves)) is not None:
        raise InvalidConfig(f"the annotator at {client.url} is not the one of this config: {why}")
    return info


def choose(urls: Sequence[str | None], config: AnnotatorConfig) -> tuple[str | None, ServiceInfo]:
    """Return the first of several addresses whose service is what the config names, and what it says.

    Raises InvalidConfig that tells of each why not; VessaError when the only one does not answer.
    """
    if len(urls) == 1:
        with AnnotatorClient(urls[0], config.api_key) as client:
            return urls[0], check_served(client, config)
    reasons = []
    for url in urls:
        try:
            with AnnotatorClient(url, config.api_key) as client:
                info = client.info()
        except Unreachable as error:
            reasons.append(error.message)
            continue
        if (why := refusal(info, config.serves)) is None:
            return url, info
        reasons.append(f"{url}: {why}")
    raise InvalidConfig("no annotator is the one of this config: " + "; ".join(reasons))


class AnnotatorChanged(ServiceError):
    """The annotator's weights, parts, label version or bank changed during a run."""

    code = "annotator_changed"


def hold_to_annotator(
    run: Path, info: ServiceInfo, bank: BankInfo, config: AnnotatorConfig, *, write: bool
) -> dict[str, Any]:
    """Return what annotates a run; where it was recorded before, compare it with that record.

    write: whether this process records it in the run's folder. Raises AnnotatorChanged when another annotator
    or another state of the bank answers than when the run began, unless `annotator.allow_change` allows it;
    then the record lists the change.
    """
    path = run / ANNOTATOR_FILE
    now = {"bank": bank.model_dump()} | {key: getattr(info, key) for key in _RECORDED}
    record: dict[str, Any] = now | {"changes": []}
    if path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        changes = _differences(record, now)
        if changes and not config.allow_change:
            raise changed(changes)
        if changes:
            _log.warning(
                "the annotator changed since the run began (%s); its report says so", "; ".join(changes)
            )
            record = now | {"changes": [*record["changes"], *changes]}
    if write:
        run.mkdir(parents=True, exist_ok=True)
        atomic_write.write_text(path, json.dumps(record, indent=1) + "\n")
    return record


def record_changes(run: Path, record: dict[str, Any], changes: Sequence[str]) -> None:
    """Add changes of the annotator during training to the record of a run."""
    if changes:
        record["changes"] = [*record["changes"], *changes]
        atomic_write.write_text(run / ANNOTATOR_FILE, json.dumps(record, indent=1) + "\n")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    pairs = [(key, before[key], now[key]) for key in _SAME]
    pairs += [(f"bank {key}", before["bank"][key], now["bank"][key]) for key in ("name", "digest")]
    return [f"{key} was {old} and is {new}" for key, old, new in pairs if old != new]


def changed(changes: Sequence[str]) -> AnnotatorChanged:
    """Make the error that names what changed, and what to do."""
    return AnnotatorChanged(
        f"the annotator is no longer the one that this run began with ({'; '.join(changes)}). Start that one "
        "again "
        "and resume, or allow the change with --set annotator.allow_change=true"
    )
