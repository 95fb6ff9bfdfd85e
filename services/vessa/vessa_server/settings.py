"""Read the service's settings from `VESSA_*` environment variables or the command line.

Settings are read by group (`settings.limits.max_items`) and given by their own name: the variable is
`VESSA_MAX_ITEMS`, the argument `Settings(max_items=8)`.
"""

import os
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from vessa.errors import InvalidConfig

LOOPBACK = {"127.0.0.1", "::1", "localhost"}
MEGABYTE = 1024 * 1024
DAY_S = 86400.0
SHORTEST_KEY = 16

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]


Protocol = Literal["nninteractive", "monailabel", "labelstudio"]


def _names(value: Any) -> Any:
    """Split a list of names by comma."""
    if not isinstance(value, str):
        return value
    return frozenset(part for part in (p.strip() for p in value.split(",")) if part)


def default_store() -> str:
    """Return the folder store under the user's data folder (`$XDG_DATA_HOME` or `~/.local/share`)."""
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return f"folder:{Path(base).expanduser() / 'vessa' / 'banks'}"


class _Group(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="VESSA_", extra="forbid", hide_input_in_errors=True, env_ignore_empty=False
    )


class Limits(_Group):
    """Bound what one request, one key and all connections may take."""

    max_body_bytes: Positive = Field(64 * MEGABYTE, description="size of one request body")
    max_answer_bytes: Positive = Field(256 * MEGABYTE, description="size of one answer")
    max_pixels: Positive = Field(4096 * 4096, le=80_000_000, description="height x width of one image")
    max_items: Positive = Field(64, description="images in one request")
    max_points: Positive = Field(64, description="points for one class of one image")
    max_candidates: Positive = Field(10_000, description="images that one suggestion is chosen from")
    max_requests: Positive = Field(32, description="segment and template requests in progress at once")
    key_requests: Positive = Field(
        32, description="of them by one key without a limit of its own; never more than 3/4 of max_requests"
    )
    max_reads: Positive = Field(4, description="GET requests that draw, read or list, in progress at once")
    key_reads: Positive = Field(16, description="GET requests of one key in progress or waiting")
    key_changes_per_minute: Natural = Field(
        240, description="changes of banks and jobs by one key that is no admin; 0: any number"
    )
    failed_keys_per_minute: Natural = Field(
        60, description="wrong keys of one address before it gets 429; 0: any number"
    )
    max_connections: Positive = Field(512, description="open connections")
    key_images_per_minute: Natural = Field(
        0, description="images by one key without a limit of its own; 0: any number"
    )
    request_timeout_s: Seconds = Field(120.0, description="from the complete body to the answer")
    body_timeout_s: Seconds = Field(30.0, description="for the whole head, and the whole body, to arrive")
    write_timeout_s: Seconds = Field(
        30.0, description="for the client to read an answer, plus 1 s for each 256 KiB of it"
    )
    max_unread_bytes: Positive = Field(
        1024 * MEGABYTE, description="answers that clients have not read yet, in memory, of all connections"
    )
    suggest_timeout_s: Seconds = Field(60.0, description="longest computation of one suggestion")
    adapt_s: Seconds = Field(3600.0, description="longest adaptation to a bank that may be requested")


class Queue(_Group):
    """Bound the queue in front of the worker and its batches."""

    queue_items: Positive = Field(256, description="items waiting for the worker")
    max_batch: Positive = Field(8, description="items in one batch")
    max_batch_pixels: Positive = Field(
        4096 * 4096, description="height x width of all images of a batch; one image alone may have more"
    )
    batch_wait_s: float = Field(
        0.005, ge=0, le=1, description="longest wait for items that are expected to fill a batch"
    )
    hang_s: Seconds = Field(300.0, description="a worker silent for longer fails /readyz")
    drain_s: Seconds = Field(30.0, description="for requests in progress after SIGTERM")


class JobSettings(_Group):
    """Bound the volume jobs and say where they are stored."""

    jobs_folder: Path | None = Field(None, description="folder of the jobs; default: in the store's folder")
    max_jobs: Positive = Field(64, description="stored jobs")
    job_share: float = Field(
        0.75, gt=0, le=1, description="share of the stored jobs and of their bytes that one key may hold"
    )
    max_jobs_bytes: Positive = Field(4096 * MEGABYTE, description="size of all jobs on disk")
    job_age_s: Seconds = Field(7 * DAY_S, description="finished jobs older than this are deleted")
    max_job_bytes: Positive = Field(256 * MEGABYTE, description="size of the files of one job")
    max_job_voxels: Positive = Field(512**3, description="voxels of one job's volume")
    max_job_slices: Positive = Field(2048, description="slices, and files, of one job's volume")


class LanguageBackend(_Group):
    """Say where the language model runs (docs/how-to/vllm.md)."""

    language: Literal["in_process", "vllm"] = Field(
        "in_process", description="backend of the language model; `vllm` needs VESSA_VLLM_URL"
    )
    vllm_url: str = Field("", pattern=r"^(https?://[^/?#@\s]+/?)?$", description="http://host:port of vLLM")
    vllm_key: SecretStr = Field(SecretStr(""), description="key of vLLM, sent as a bearer token")
    vllm_timeout_s: Seconds = Field(30.0, description="longest wait for vLLM's answer to one batch")


class Audit(_Group):
    """Say where the audit log is and how much of it is stored."""

    audit_file: Path | None = Field(None, description="file of the audit log; default: in the store's folder")
    audit_bytes: Positive = Field(16 * MEGABYTE, description="size of one file of the audit log")
    audit_files: int = Field(8, ge=2, description="files of the audit log that are always stored")
    audit_days: Seconds = Field(90.0, description="days for which more files are stored")


class Storage(_Group):
    """Say where the template banks are and how much they may hold."""

    store: str = Field(default_factory=default_store, description="folder:PATH or redis://...")
    max_templates: Positive = Field(10_000, description="templates in one bank")
    key_banks: Natural = Field(1000, description="banks that one key may own; 0: any number")
    key_templates: Natural = Field(100_000, description="templates in all banks of one key; 0: any number")
    key_bank_bytes: Natural = Field(
        64 * 1024 * MEGABYTE, description="size of the templates in all banks of one key; 0: any size"
    )


class Console(_Group):
    """Say what the browser console shows and how much its worklists may hold."""

    serve_console: bool = Field(True, description="serve the browser console at /")
    runs_folder: Path | None = Field(None, description="folder of training runs that the console shows")
    worklists_folder: Path | None = Field(
        None, description="folder of the console's worklists; default: in the store's folder"
    )
    worklist_bytes: Positive = Field(
        2048 * MEGABYTE, description="images and labels in the worklists of one key, on disk"
    )


class Viewers(_Group):
    """Say which viewers' protocols are served and bound their sessions (docs/how-to/viewers.md)."""

    serve_viewers: Annotated[frozenset[Protocol], NoDecode] = Field(
        frozenset(), description="protocols to serve, by comma: nninteractive, monailabel, labelstudio"
    )
    viewer_sessions: Positive = Field(16, description="sessions of viewers at once")
    viewer_key_sessions: Positive = Field(4, description="sessions of viewers of one key")
    viewer_bytes: Positive = Field(
        2048 * MEGABYTE, description="memory of all viewers' sessions, and of all their uploads"
    )
    viewer_key_bytes: Positive = Field(
        1024 * MEGABYTE, description="memory of the sessions of one key, and of its uploads"
    )
    viewer_body_bytes: Positive = Field(512 * MEGABYTE, description="size of one upload of a viewer")
    viewer_body_s: Seconds = Field(120.0, description="for a viewer's whole upload to arrive")
    viewer_voxels: Positive = Field(256 * 1024 * 1024, description="voxels of a viewer's volume")
    viewer_idle_s: Seconds = Field(1800.0, description="a viewer's session that is unused for longer ends")
    viewer_timeout_s: Seconds = Field(
        45.0, description="after which a mask stops to grow through a volume; the next interaction goes on"
    )
    labelstudio_url: str = Field(
        "", pattern=r"^(https?://[^/?#@\s]+/?)?$", description="http://host:port of Label Studio's images"
    )
    labelstudio_token: SecretStr = Field(
        SecretStr(""), description="legacy token of Label Studio, sent to fetch images from it alone"
    )

    @field_validator("serve_viewers", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        return _names(value)


class Caches(_Group):
    """Bound what the service remembers in memory."""

    feature_cache_bytes: Natural = Field(512 * MEGABYTE, description="features of images and templates")
    annotation_bytes: Natural = Field(64 * MEGABYTE, description="annotations for GET /annotations/{id}")


_GROUPS: dict[str, type[_Group]] = {
    "limits": Limits,
    "queue": Queue,
    "jobs": JobSettings,
    "language_model": LanguageBackend,
    "audit": Audit,
    "storage": Storage,
    "caches": Caches,
    "console": Console,
    "viewers": Viewers,
}


class Settings(_Group):
    """All settings of a service. Built by the command line or `create_app`, never at import.

    host: address to bind, loopback by default; api_key: when empty, one is generated and stored in the key
    file; insecure: serve without a key. weights: `nano` or a weights directory; device: cpu, cuda, cuda:N or
    auto; threads: CPU threads that compute, 0 = torch's choice. without: parts of the annotator to leave out,
    as in the ablations of the paper's Table 4: VESSA_WITHOUT=language, memory or language,memory.
    """

    host: str = Field("127.0.0.1", description="address to bind; loopback serves this machine alone")
    port: int = Field(8700, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_key: SecretStr = Field(
        SecretStr(""), description="admin key; default: one is generated and stored in the key file"
    )
    key_file: Path | None = Field(None, description="file of the generated key; default: the client's place")
    keys_file: Path | None = Field(
        None, description="file of the named keys; default: the store's Redis, or beside the key file"
    )
    insecure: bool = Field(False, description="serve everybody, without any key")
    trusted_proxies: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode] = Field(
        (), description="gateways whose X-Forwarded-For is believed: addresses or networks, by comma"
    )
    weights: str = Field("nano", description="`nano`, the shipped weights, or a weights directory")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$", description="cpu, cuda, cuda:N, mps or auto"
    )
    threads: Natural = Field(0, description="CPU threads for computing; 0 leaves the choice to torch")
    without: Annotated[frozenset[Literal["language", "memory"]], NoDecode] = Field(
        frozenset(), description="parts to leave out, as in Table 4: language, memory or both, by comma"
    )
    log_level: str = Field(
        "info", pattern="^(debug|info|warning|error)$", description="debug, info, warning or error"
    )
    log_format: Literal["text", "json"] = Field("text", description="lines for people, or JSON")
    traces: bool = Field(False, description="export OpenTelemetry spans, see OTEL_EXPORTER_OTLP_ENDPOINT")

    limits: Limits
    queue: Queue
    jobs: JobSettings
    language_model: LanguageBackend
    audit: Audit
    storage: Storage
    caches: Caches
    console: Console
    viewers: Viewers

    def __init__(self, **given: Any) -> None:
        """Read the environment; arguments take precedence. InvalidConfig names the setting, not its value.

        given: settings of any group by their own names, or whole groups by the group's name
        """
        try:
            for name, group in _GROUPS.items():
                own = dict(given.pop(name, {}))
                own |= {field: given.pop(field) for field in group.model_fields if field in given}
                given[name] = group(**own)
            super().__init__(**given)
        except ValidationError as error:
            parts = [f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors()]
            raise InvalidConfig("; ".join(parts)) from error

    @field_validator("trusted_proxies", mode="before")
    @classmethod
    def _split_networks(cls, value: Any) -> Any:
        return tuple(p.strip() for p in value.split(",") if p.strip()) if isinstance(value, str) else value

    @field_validator("without", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        return _names(value)

    @model_validator(mode="after")
    def _check_combinations(self) -> "Settings":
        language, limits = self.language_model, self.limits
        if self.key and (len(self.key) < SHORTEST_KEY or not self.key.isascii()):
            raise ValueError(f"api_key needs {SHORTEST_KEY} ASCII characters or more, it has {len(self.key)}")
        if self.insecure and self.key:
            raise ValueError(
                "insecure and api_key exclude each other: remove VESSA_API_KEY or VESSA_INSECURE"
            )
        if (language.language == "vllm") != bool(language.vllm_url):
            raise ValueError("VESSA_LANGUAGE=vllm and VESSA_VLLM_URL=http://host:port belong together")
        if language.language == "vllm" and "language" in self.without:
            raise ValueError("VESSA_LANGUAGE=vllm and VESSA_WITHOUT=language exclude each other")
        if language.language == "vllm" and language.vllm_timeout_s >= limits.request_timeout_s:
            raise ValueError("vllm_timeout_s must be shorter than request_timeout_s")
        if limits.max_answer_bytes > limits.max_unread_bytes:
            raise ValueError(
                f"max_answer_bytes ({limits.max_answer_bytes}) must not exceed max_unread_bytes "
                f"({limits.max_unread_bytes}): the largest answer would be cut off"
            )
        if limits.max_items > self.queue.queue_items:
            raise ValueError(
                f"max_items ({limits.max_items}) must not exceed queue_items ({self.queue.queue_items}): "
                "the largest request would never fit"
            )
        return self

    @classmethod
    def variables(cls) -> set[str]:
        """Return the names of all environment variables that are read."""
        fields = [*cls.model_fields, *(name for group in _GROUPS.values() for name in group.model_fields)]
        return {f"VESSA_{name.upper()}" for name in fields if name not in _GROUPS}

    @property
    def key(self) -> str:
        """Return the configured key, empty when none is."""
        return self.api_key.get_secret_value().strip()

    @property
    def loopback(self) -> bool:
        """Return whether only this machine can connect."""
        return self.host in LOOPBACK

    def public_limits(self) -> dict[str, int]:
        """Return the limits that a client should know, for /info."""
        limits = self.limits
        return {
            "max_body_bytes": limits.max_body_bytes,
            "max_pixels": limits.max_pixels,
            "max_items": limits.max_items,
            "max_points": limits.max_points,
            "queue_items": self.queue.queue_items,
            "max_batch": self.queue.max_batch,
        }
