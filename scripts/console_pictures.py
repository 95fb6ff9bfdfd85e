"""Make the pictures of the console in the documentation, by its own browser tests and from phantoms alone.

python scripts/console_pictures.py [--run FOLDER]

--run names a finished run of `vessa-trainer` on phantoms, for the picture of the page Training. Ends in one
line of JSON with the bytes of each picture.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "images" / "console"
WIDTH, QUALITY = 1000, 62
# The steps of the story, then the pages.
PICTURES = (
    "story-1-start",
    "story-2-bank",
    "story-3-annotate",
    "story-4-correct",
    "story-5-accepted",
    "draw-volume",
    "volume",
    "training-run",
    "admin-dark",
    "tablet-review-dark",
)
TESTS = ("test_start.py", "test_volumes.py", "test_review.py", "test_console.py")


def main() -> int:
    """Run the tests, then compress their screenshots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="a finished run on phantoms")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"VESSA_SCREENSHOTS": folder}
        if options.run is not None:
            environment["VESSA_RUN"] = str(options.run.resolve())
        wanted = "story or slice_of_a_volume or corrected_shown or run_shows or admin_sees or tablet"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "browser", "-k", wanted]
        command += [str(ROOT / "tests" / "browser" / name) for name in TESTS]
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
            return 1
        sizes = {}
        OUT.mkdir(parents=True, exist_ok=True)
        for name in PICTURES:
            shot = Path(folder) / f"{name}.png"
            if not shot.is_file():
                print(f"{name}: not made; the picture in docs stays as it is")
                continue
            with Image.open(shot) as image:
                height = round(image.height * WIDTH / image.width)
                small = image.convert("RGB").resize((min(WIDTH, image.width), min(height, image.height)))
            small.save(OUT / f"{name}.webp", quality=QUALITY, method=6)
            sizes[name] = (OUT / f"{name}.webp").stat().st_size
    print(json.dumps({"bytes": sum(sizes.values()), **sizes}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
