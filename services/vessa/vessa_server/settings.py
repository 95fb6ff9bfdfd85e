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
    cuda:N or auto. store: folder:PATH or redis://...; threads: CPU threads of the device thread, 0 = torch's
    choice. without: parts of the annotator to leave out, as in the paper's ablations (Table 4):
    VESSA_WITHOUT=language, memory or language,memory.
    """

    model_config = SettingsConfigDict(env_prefix="VESSA_", extra="ignore", hide_input_in_errors=True)

    host: str = "127.0.0.1"
    port: int = Field(8700, ge=0, le=65535)
    api_key: SecretStr = SecretStr("")
    key_file: Path | None = Field(
        None, description="where the generated key is kept; the client's default place"
    )
    insecure: bool = False
    weights: str = "nano"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")
    store: str = Field(default_factory=default_store)
    threads: int = Field(0, ge=0)
    without: Annotated[frozenset[Literal["language", "memory"]], NoDecode] = frozenset()
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$")

    max_body_bytes: Positive = Field(64 * MEGABYTE, description="size of one request body")
    max_answer_bytes: Positive = Field(256 * MEGABYTE, description="size of one answer")
    max_pixels: Positive = Field(4096 * 4096, le=80_000_000, description="height x width of one image")
    max_items: Positive = Field(64, description="images in one request")
    max_points: Positive = Field(64, description="points for one class of one image")
    max_templates: Positive = Field(10_000, description="templates in one bank")
    max_requests: Positive = Field(32, description="segment and template requests in work at once")
    queue_items: Positive = Field(256, description="items waiting for the device")
    max_batch: Positive = Field(8, description="items on the device at once")
    batch_wait_s: float = Field(0.005, ge=0, le=1)
    request_timeout_s: Seconds = Field(120.0, description="from the complete body to the answer")
    body_timeout_s: Seconds = Field(30.0, description="for the whole body to arrive")
    hang_s: Seconds = Field(300.0, description="a device thread silent for longer fails /readyz")
    drain_s: Seconds = Field(30.0, description="for requests in work after SIGTERM")
    adapt_s: Seconds = Field(600.0, description="longest adaptation to a bank that may be asked for")
    feature_cache_bytes: int = Field(512 * MEGABYTE, ge=0)

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
