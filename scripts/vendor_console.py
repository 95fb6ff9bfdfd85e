"""Fetch the console's vendored JavaScript from npm and write vendor.json.

npm packs each package, its archive is compared with the registry's sha512, and only the named files are
copied, with their licence texts. Run it to change a version: python scripts/vendor_console.py
"""

import base64
import gzip
import hashlib
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

VENDOR = Path(__file__).resolve().parents[1] / "services/vessa/vessa_server/console/static/vendor"
# package, version, file in the package, name here, licence, file with the licence's text (None: ours below)
PIECES = [
    ("htm", "3.1.1", "preact/standalone.module.js", "preact-htm.js", "Apache-2.0", "LICENSE"),
    ("preact", "10.5.13", None, None, "MIT", "LICENSE"),  # bundled in htm's standalone file
    ("uplot", "1.6.32", "dist/uPlot.esm.js", "uPlot.js", "MIT", "LICENSE"),
    ("uplot", "1.6.32", "dist/uPlot.min.css", "uPlot.min.css", "MIT", "LICENSE"),
    ("@niivue/niivue", "0.69.0", "dist/index.js", "niivue.js.gz", "BSD-2-Clause", None),
]


def npm(*words: str, folder: Path | None = None) -> str:
    """Run npm and return what it prints."""
    return subprocess.run(
        ["npm", *words], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def packed(package: str, version: str, folder: Path) -> tuple[Path, str]:
    """Return the archive of a package and its integrity; raises ValueError when they do not match."""
    integrity = npm("view", f"{package}@{version}", "dist.integrity")
    archive = folder / npm("pack", f"{package}@{version}", folder=folder).splitlines()[-1]
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if integrity != f"sha512-{digest}":
        raise ValueError(f"{package}@{version}: expected {integrity}, got sha512-{digest}")
    return archive, integrity


def main() -> None:
    """Fetch all pieces."""
    licences = VENDOR / "licences"
    licences.mkdir(parents=True, exist_ok=True)
    entries = []
    for package, version, inside, name, licence, text in PIECES:
        with tempfile.TemporaryDirectory() as scratch:
            archive, integrity = packed(package, version, Path(scratch))
            with tarfile.open(archive) as tar:
                if text is not None:
                    member = tar.extractfile(f"package/{text}")
                    assert member is not None
                    (licences / f"{package.split('/')[-1]}.txt").write_bytes(member.read())
                if inside is None or name is None:
                    continue
                member = tar.extractfile(f"package/{inside}")
                assert member is not None
                data = member.read()
        if name.endswith(".gz"):
            data = gzip.compress(data, 9, mtime=0)
        (VENDOR / name).write_bytes(data)
        entries.append(
            {
                "name": package,
                "version": version,
                "integrity": integrity,
                "source": inside,
                "file": name,
                "sha256": hashlib.sha256(data).hexdigest(),
                "licence": licence,
            }
        )
    (VENDOR / "vendor.json").write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
