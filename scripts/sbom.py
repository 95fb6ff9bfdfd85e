"""Write the software bill of materials (CycloneDX 1.6, JSON) of what the container images hold.

    python scripts/sbom.py [--out build/sbom.cdx.json]

cyclonedx-bom reads the installed environment; uv runs it from an environment of its own at the version below.
Only the locked packages that the images hold are kept, and the three distributions. The console's vendored
JavaScript is added from its vendor.json. The last line is one JSON object.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOL = "cyclonedx-bom==7.3.0"
VENDORED = ROOT / "services/vessa/vessa_server/console/static/vendor/vendor.json"


def environment_bom() -> dict[str, Any]:
    """Return the bill of materials of this interpreter's environment."""
    command = ["-m", "uv", "tool", "run", "--quiet", "--from", TOOL, "cyclonedx-py", "environment"]
    options = ["--output-reproducible", "--output-format", "JSON", "--spec-version", "1.6"]
    done = subprocess.run(
        [sys.executable, *command, *options, sys.executable], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"sbom: {TOOL} failed; it needs a package index at its first run:\n{done.stderr}")
    bom: dict[str, Any] = json.loads(done.stdout)
    return bom


def in_images() -> set[str]:
    """Return the names of the packages that the container images hold."""
    lock = (ROOT / "requirements.lock").read_text()
    (tools,) = re.findall(r"^# Only the tools need: (.+)$", lock, re.MULTILINE)
    locked = set(re.findall(r"^([a-z0-9][a-z0-9.-]*)", lock, re.MULTILINE))
    return locked - set(tools.split()) | {"vessa", "vessa-server", "vessa-trainer"}


def normalized(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def keep(bom: dict[str, Any], names: set[str]) -> int:
    """Remove the other components, with the dependencies on them; return how many."""
    gone = {c["bom-ref"] for c in bom["components"] if normalized(c["name"]) not in names}
    bom["components"] = [c for c in bom["components"] if c["bom-ref"] not in gone]
    bom["dependencies"] = [
        entry
        | ({"dependsOn": [r for r in entry["dependsOn"] if r not in gone]} if "dependsOn" in entry else {})
        for entry in bom.get("dependencies", [])
        if entry["ref"] not in gone
    ]
    return len(gone)


def vendored() -> list[dict[str, Any]]:
    """Return the console's JavaScript files as components."""
    return [
        {
            "type": "library",
            "bom-ref": f"vendored/{entry['file']}",
            "name": entry["name"],
            "version": entry["version"],
            "purl": f"pkg:npm/{entry['name'].replace('@', '%40')}@{entry['version']}",
            "licenses": [{"license": {"id": entry["licence"]}}],
            "hashes": [{"alg": "SHA-256", "content": entry["sha256"]}],
        }
        for entry in json.loads(VENDORED.read_text())
    ]


def main() -> None:
    """Write the file and print its counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "sbom.cdx.json")
    out = parser.parse_args().out
    bom = environment_bom()
    left_out = keep(bom, in_images())
    for component in bom[
        "components"
    ]:  # the distributions lie in this checkout, whose path is nobody's matter
        places = [r for r in component.pop("externalReferences", []) if not r["url"].startswith("file:")]
        component.update({"externalReferences": places} if places else {})
    scripts = vendored()
    packages = len(bom["components"])
    bom["components"] += scripts
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(bom, indent=1) + "\n")
    print(
        json.dumps({"file": str(out), "packages": packages, "vendored": len(scripts), "left_out": left_out})
    )


if __name__ == "__main__":
    main()
