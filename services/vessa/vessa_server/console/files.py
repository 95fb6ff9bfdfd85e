"""The console's static files, read once at start: no path of a request ever reaches the disk."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# NiiVue draws with WebGL and loads its fonts and shaders from data and blob URLs of its own.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; "
    "style-src 'self'; script-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
_STATIC = Path(__file__).with_name("static")
_MEDIA = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class StaticFile:
    """One file. encoding: gzip for a file that is kept compressed, else empty."""

    content: bytes
    media_type: str
    encoding: str
    etag: str


@cache
def _files() -> dict[str, StaticFile]:
    found = {}
    for path in sorted(p for p in _STATIC.rglob("*") if p.is_file()):
        name = path.relative_to(_STATIC).as_posix()
        encoding = "gzip" if path.suffix == ".gz" else ""
        name = name.removesuffix(".gz")
        media = _MEDIA.get(Path(name).suffix)
        if media is None:
            continue  # licences and vendor.json are for readers of the repository
        content = path.read_bytes()
        found[name] = StaticFile(content, media, encoding, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


def static_file(name: str) -> StaticFile | None:
    """Return a file by its path below the static folder; None for any other name."""
    return _files().get(name)
