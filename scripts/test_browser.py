"""Run the console's tests: unit tests by node, types by tsc, pages in chromium; ends in one line of JSON.

python scripts/test_browser.py [--screenshots FOLDER]

Whatever the machine lacks (chromium, node, npm) is skipped with one line that names it.
"""

import argparse
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".venv" / "browser"
# Test tools, never served: package and version. Archives are compared with the registry's integrity.
AXE = ("axe-core", "4.14.1")
TYPESCRIPT = ("typescript", "5.9.3")


def package(name: str, version: str) -> Path | None:
    """Return the unpacked folder of an npm package, None where npm or the registry is missing."""
    folder = CACHE / f"{name}-{version}"
    if folder.is_dir():
        return folder
    if shutil.which("npm") is None:
        return None
    CACHE.mkdir(parents=True, exist_ok=True)
    spec = f"{name}@{version}"
    view = subprocess.run(
        ["npm", "view", spec, "dist.integrity"], capture_output=True, text=True, check=False
    )
    packed = subprocess.run(["npm", "pack", spec], cwd=CACHE, capture_output=True, text=True, check=False)
    if view.returncode or packed.returncode:
        return None
    archive = CACHE / packed.stdout.split()[-1]
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if view.stdout.strip() != f"sha512-{digest}":
        raise ValueError(f"{spec}: the archive does not match the registry's integrity {view.stdout.strip()}")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
    return folder


def run(what: str, command: list[str]) -> int:
    """Run a command and say how it ended; returns 1 for a failure."""
    failed = subprocess.run(command, cwd=ROOT, check=False).returncode != 0
    print(f"{what}: {'failed' if failed else 'passed'}", flush=True)
    return int(failed)


def main() -> int:
    """Run all parts and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--screenshots",
        type=Path,
        default=ROOT / "build" / "browser",
        help="folder for a picture of each page; default: build/browser",
    )
    options = parser.parse_args()
    result = {"passed": 0, "failed": 0, "skipped": 0}
    if shutil.which("node") is None:
        print("skipped: no node on this machine, so the unit tests of the console's modules did not run")
    else:
        failed = run("unit tests", ["node", "--test", "tests/console/"])
        compiler = package(*TYPESCRIPT)
        if compiler is None:
            print("skipped: npm cannot fetch typescript here, so the types were not checked")
        else:
            tsc = [str(compiler / "package" / "bin" / "tsc"), "-p", "tests/console/tsconfig.json"]
            failed += run("types", ["node", *tsc])
        result["failed"] += failed
    if shutil.which("chromium") is None:
        print("skipped: no chromium on this machine; apt-get install chromium")
        print(json.dumps(result))
        return int(result["failed"] > 0)
    axe = package(*AXE)
    if axe is None:
        print("skipped: npm cannot fetch axe-core here, so accessibility was not checked")
    CACHE.mkdir(parents=True, exist_ok=True)
    report, figures = CACHE / "report.xml", CACHE / "figures.json"
    environment = os.environ | {"VESSA_BROWSER_FIGURES": str(figures)}
    if axe is not None:
        environment["VESSA_AXE"] = str(axe / "package" / "axe.min.js")
    environment["VESSA_SCREENSHOTS"] = str(options.screenshots.resolve())
    command = [sys.executable, "-m", "pytest", "-q", "-m", "browser", f"--junitxml={report}", "tests/browser"]
    subprocess.run(command, cwd=ROOT, env=environment, check=False)
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None  # pytest writes one
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    result["failed"] += counts["failures"] + counts["errors"]
    result["skipped"] = counts["skipped"]
    result["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    print(json.dumps(result | json.loads(figures.read_text())))
    return int(result["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
