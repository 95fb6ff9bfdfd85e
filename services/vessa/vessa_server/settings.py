"""Settings of the service, from `VESSA_*` environment variables or the command line."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from vessa.errors import InvalidConfig

LOOPBACK = {"127.0.0.1", "::1", "localhost"}
MEGABYTE = 1024 * 1024

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


def default_store() -> str:
    """Return the folder store under the user's data folder (`$XDG_DATA_HOME` or `~/.local/share`)."""
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return f"folder:{Path(base).expanduser() / 'vessa' / 'banks'}"


class Settings(BaseSettings):
    """Everything an operator can choose. Built by the command line or `create_app`, never at import.

    host: address to bind, loopback unless told otherwise; api_key: when empty, one is generated and kept in
    the key file; insecure: serve without a key. weights: `nano` or a weights directory; device: cpu, cuda,
    cuda:N or auto. store: folder:PATH or redis://...; threads: CPU threads that compute, 0 = torch's
    choice. without: parts of the annotator to leave out, as in the paper's ablations (Table 4):
    VESSA_WITHOUT=language, memory or language,memory. language: in_process, or vllm at vllm_url with vllm_key
    (docs/how-to/vllm.md).
    """

    model_config = SettingsConfigDict(env_prefix="VESSA_", extra="ignore", hide_input_in_errors=True)

    host: str = Field("127.0.0.1", description="address to bind; loopback serves this machine alone")
    port: int = Field(8700, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_key: SecretStr = Field(
        SecretStr(""), description="admin key; unset, one is generated and kept in the key file"
    )
    key_file: Path | None = Field(
        None, description="where the generated key is kept; the client's default place"
    )
    keys_file: Path | None = Field(
        None,
        description="where named keys are kept; unset: the store's Redis, or beside the key file",
    )
    audit_file: Path | None = Field(None, description="who changed what; unset, in the store's folder")
    insecure: bool = Field(False, description="serve everybody, without any key")
    weights: str = Field("nano", description="`nano`, the shipped weights, or a weights directory")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$", description="cpu, cuda, cuda:N, mps or auto"
    )
    store: str = Field(
        default_factory=default_store, description="template banks: `folder:PATH` or `redis://...`"
    )
    threads: int = Field(0, ge=0, description="CPU threads for computing; 0 leaves the choice to torch")
    without: Annotated[frozenset[Literal["language", "memory"]], NoDecode] = Field(
        frozenset(), description="parts to leave out, as in Table 4: language, memory or both, by comma"
    )
    language: Literal["in_process", "vllm"] = Field(
        "in_process", description="backend of the language model; `vllm` needs VESSA_VLLM_URL"
    )
    vllm_url: str = Field("", pattern=r"^(https?://[^/?#@\s]+/?)?$", description="http://host:port of vLLM")
    vllm_key: SecretStr = Field(SecretStr(""), description="key of vLLM, sent as a bearer token")
    vllm_timeout_s: Seconds = Field(30.0, description="longest wait for vLLM's answer to one batch")
    log_level: str = Field(
        "info", pattern="^(debug|info|warning|error)$", description="debug, info, warning or error"
    )
    log_format: Literal["text", "json"] = Field("text", description="lines for people, or JSON")
    traces: bool = Field(False, description="export OpenTelemetry spans, see OTEL_EXPORTER_OTLP_ENDPOINT")

    max_body_bytes: Positive = Field(64 * MEGABYTE, description="size of one request body")
    max_answer_bytes: Positive = Field(256 * MEGABYTE, description="size of one answer")
    max_pixels: Positive = Field(4096 * 4096, le=80_000_000, description="height x width of one image")
    max_items: Positive = Field(64, description="images in one request")
    max_points: Positive = Field(64, description="points for one class of one image")
    max_candidates: Positive = Field(10_000, description="images that one suggestion is chosen from")
    max_templates: Positive = Field(10_000, description="templates in one bank")
    max_requests: Positive = Field(32, description="segment and template requests in work at once")
    key_requests: Positive = Field(32, description="of them by one key that has no limit of its own")
    key_images_per_minute: int = Field(
        0, ge=0, description="images by one key that has no limit of its own; 0 for any number"
    )
    audit_bytes: Positive = Field(16 * MEGABYTE, description="of one file of the audit log")
    audit_files: int = Field(8, ge=2, description="files of the audit log that are kept")
    queue_items: Positive = Field(256, description="items waiting for the device")
    max_batch: Positive = Field(8, description="items on the device at once")
    max_batch_pixels: Positive = Field(
        4096 * 4096, description="height x width of all of them together; one image alone may have more"
    )
    batch_wait_s: float = Field(
        0.005, ge=0, le=1, description="longest wait for items that are expected to fill a batch"
    )
    request_timeout_s: Seconds = Field(120.0, description="from the complete body to the answer")
    body_timeout_s: Seconds = Field(30.0, description="for the whole head, and the whole body, to arrive")
    hang_s: Seconds = Field(300.0, description="a device silent for longer fails /readyz")
    drain_s: Seconds = Field(30.0, description="for requests in work after SIGTERM")
    adapt_s: Seconds = Field(600.0, description="longest adaptation to a bank that may be asked for")
    jobs_folder: Path | None = Field(None, description="of the jobs; unset, in the store's folder")
    max_jobs: Positive = Field(64, description="jobs that are kept, 3/4 of them of one key at most")
    max_jobs_bytes: Positive = Field(4096 * MEGABYTE, description="all of them together, on disk")
    job_age_s: Seconds = Field(7 * 86400.0, description="finished jobs over it go with the next one")
    max_job_bytes: Positive = Field(256 * MEGABYTE, description="size of the files of one job")
    max_job_voxels: Positive = Field(512**3, description="voxels of one job's volume")
    max_job_slices: Positive = Field(2048, description="slices, and files, of one job's volume")
    feature_cache_bytes: int = Field(
        512 * MEGABYTE, ge=0, description="memory for features of images and templates"
    )
    annotation_bytes: int = Field(
        64 * MEGABYTE,
        ge=0,
        description="annotations kept for GET /annotations/{id}, the latest ones; in memory",
    )

    def __init__(self, **given: Any) -> None:
        """Read the environment; `given` goes before. InvalidConfig names what is wrong, not its value."""
        try:
            super().__init__(**given)
        except ValidationError as error:
            parts = [f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors()]
            raise InvalidConfig("; ".join(parts)) from error

    @field_validator("without", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return frozenset(part for part in (p.strip() for p in value.split(",")) if part)

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.insecure and self.key:
            raise ValueError(
                "insecure and api_key exclude each other: remove VESSA_API_KEY or VESSA_INSECURE"
            )
        if (self.language == "vllm") != bool(self.vllm_url):
            raise ValueError("VESSA_LANGUAGE=vllm and VESSA_VLLM_URL=http://host:port belong together")
        if self.language == "vllm" and "language" in self.without:
            raise ValueError("VESSA_LANGUAGE=vllm and VESSA_WITHOUT=language exclude each other")
        if self.language == "vllm" and self.vllm_timeout_s >= self.request_timeout_s:
            raise ValueError("vllm_timeout_s must be shorter than request_timeout_s")
        if self.max_items > self.queue_items:
            raise ValueError(
                f"max_items ({self.max_items}) must not exceed queue_items ({self.queue_items}): "
                "the largest request would never fit"
            )
        return self

    @property
    def key(self) -> str:
        """The configured key, empty when none is."""
        return self.api_key.get_secret_value().strip()

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in LOOPBACK

    def limits(self) -> dict[str, int]:
        """Return the limits that a client should know, for /info."""
        return {
            "max_body_bytes": self.max_body_bytes,
            "max_pixels": self.max_pixels,
            "max_items": self.max_items,
            "max_points": self.max_points,
            "queue_items": self.queue_items,
            "max_batch": self.max_batch,
        }
