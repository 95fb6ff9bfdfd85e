"""Run the tests with real clients of other programs; ends in one line of JSON.

python scripts/test_viewers.py [--screenshots FOLDER]

Clients that the machine cannot have are skipped with one line that names them. They lie in .venv/viewers, not
in the environment: nothing of ours depends on them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from test_browser import package

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".venv" / "viewers"
OHIF = ("@ohif/app", "3.13.2")
# Packages whose own code drives us, each in a folder of its own and without its dependencies.
WHEELS = {"monailabel": "0.8.5", "label-studio-sdk": "2.1.2", "cvat-sdk": "2.80.0"}
# MONAI Label's client imports `cgi`, which Python 3.13 no longer has.
IMPORTED = ["cvat-sdk"]
if sys.version_info >= (3, 13):
    WHEELS["legacy-cgi"] = "2.6.4"
    IMPORTED.append("legacy-cgi")
# Where each package's own code lies in it; installers differ in where they put a wheel's data files.
CODE = {
    "monailabel": ("VESSA_MONAILABEL_CLIENT", "MONAILabelLib/client.py"),
    "label-studio-sdk": ("VESSA_LABELSTUDIO_BRUSH", "converter/brush.py"),
}
CLIENTS = {
    "test_nninteractive": "nnInteractive client (3D Slicer, MITK, napari)",
    "test_monailabel": "MONAI Label client of 3D Slicer",
    "test_labelstudio": "Label Studio SDK",
    "test_cvat": "CVAT SDK",
    "test_dicomweb": "Orthanc by DICOMweb",
    "test_ohif": "OHIF in chromium",
    "test_notebook": "Jupyter",
}


def wheel(name: str, version: str) -> Path | None:
    """Return the folder of a package, None where the index is missing."""
    folder = CACHE / f"{name}-{version}"
    if folder.is_dir():
        return folder
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    fresh = folder.with_name(f".{folder.name}")
    shutil.rmtree(fresh, ignore_errors=True)
    command = [uv, "pip", "install", "--quiet", "--no-deps", "--target", str(fresh), f"{name}=={version}"]
    if subprocess.run([*command, "--python", sys.executable], check=False).returncode:
        print(f"skipped: the index has no {name} {version} here, so its tests did not run")
        return None
    fresh.rename(folder)
    return folder


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Return the variables that tell the tests where each client lies."""
    CACHE.mkdir(parents=True, exist_ok=True)
    found = dict(os.environ)
    folders = {name: wheel(name, version) for name, version in WHEELS.items()}
    for name, (variable, place) in CODE.items():
        if (folder := folders[name]) is not None:
            found[variable] = str(next(folder.rglob(place)))
    paths = [str(folders[name]) for name in IMPORTED if folders[name] is not None]
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *paths]))
    viewer = package(*OHIF) if shutil.which("chromium") else None
    if viewer is not None:
        found["VESSA_OHIF"] = str(viewer / "package" / "dist")
    else:
        print("skipped: no chromium, or npm cannot fetch OHIF here, so no browser showed a DICOM SEG")
    found["VESSA_SCREENSHOTS"] = str(options.screenshots.resolve())
    return found


def main() -> int:
    """Run the tests and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--screenshots",
        type=Path,
        default=ROOT / "build" / "viewers",
        help="folder for a picture of OHIF with our DICOM SEG; default: build/viewers",
    )
    variables = environment(parser.parse_args())
    report = CACHE / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "viewer", f"--junitxml={report}", "tests/viewers"]
    ended = subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode
    if not report.is_file():
        print(json.dumps({"clients": 0, "passed": 0, "failed": 1}))
        return 1
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    passed = [case for case in cases if case not in failed and case not in skipped]
    drove = {case.get("classname", "").rpartition(".")[2] for case in passed}
    names = [name for module, name in CLIENTS.items() if module in drove]
    wrong = max(len(failed), int(ended != 0))  # an interrupted run fails, too
    counts = {"passed": len(passed), "failed": wrong, "skipped": len(skipped)}
    print(json.dumps({"clients": len(names), **counts, "names": names}))
    return int(bool(wrong) or not passed)


if __name__ == "__main__":
    sys.exit(main())
