"""Look for known vulnerabilities of the locked dependencies with pip-audit.

    python scripts/audit_dependencies.py

uv runs pip-audit from an environment of its own at the version below. A package index without vulnerability
data answers "none known" to everything, so an old release with known vulnerabilities is asked for first: when
it passes, the audit is skipped in one line. The exit code is 1 when a locked version is vulnerable.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOL = "pip-audit==2.10.1"
KNOWN = "urllib3==1.24.1"  # has known vulnerabilities since 2019


def audit(requirements: Path, *options: str) -> list[dict[str, Any]] | None:
    """Return pip-audit's entries of a requirements file; None when no service answers."""
    command = [sys.executable, "-m", "uv", "tool", "run", "--quiet", "--from", TOOL, "pip-audit"]
    common = ["--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", "15"]
    done = subprocess.run([*command, *common, *options, "-r", requirements], capture_output=True, text=True)
    try:
        entries: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["dependencies"]
    except (ValueError, IndexError, KeyError):
        return None
    return entries


def main() -> int:
    """Print the vulnerable packages and the packages that were not found."""
    with tempfile.TemporaryDirectory() as folder:
        canary = Path(folder) / "requirements.txt"
        canary.write_text(KNOWN + "\n")
        known = audit(canary, "--no-deps")
    if not known or not known[0].get("vulns"):
        print("audit: skipped: no service with vulnerability data answers on this machine")
        return 0
    entries = audit(ROOT / "requirements.lock", "--require-hashes")
    if entries is None:
        print("audit: failed: pip-audit could not read requirements.lock, or its service stopped answering")
        return 1
    vulnerable = {entry["name"]: [v["id"] for v in entry["vulns"]] for entry in entries if entry.get("vulns")}
    unknown = [entry["name"] for entry in entries if "skip_reason" in entry]
    print(json.dumps({"packages": len(entries), "vulnerable": vulnerable, "not_found": unknown}))
    return int(bool(vulnerable))


if __name__ == "__main__":
    sys.exit(main())
