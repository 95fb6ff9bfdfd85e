"""Draw docs/images/overlay.jpg: templates, unseen patients and the annotator's masks, on phantoms.

The script makes phantoms, starts an annotator with the shipped weights on a free port, fills one
template bank per organ with one patient and segments a patient of the test split.

    python scripts/readme_picture.py
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vessa.client import AnnotatorClient
from vessa.datasets import open_dataset
from vessa.masks.overlay import overlay
from vessa.metrics import dice

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "overlay.jpg"
SIDE, GAP, CAPTION = 224, 8, 24  # px
COLUMNS = ("Template: patient {template}", "New patient {query}", "VESSA, mean Dice {dice:.2f}", "Reference")


def row(client: AnnotatorClient, folder: Path) -> Image.Image:
    """Segment one slice of a test patient from the templates of another patient, and draw four panels."""
    data = open_dataset(folder)
    (template,), query = data.split("splits/labeled_1.txt"), data.split("splits/test.txt")[0]
    shown = {group: [item for item in data.slices() if item.group == group] for group in (template, query)}
    client.add_templates(
        data.name,
        [data.image(item) for item in shown[template]],
        [data.mask(item) for item in shown[template]],
        data.classes,
        [template] * len(shown[template]),
    )
    middle = len(shown[query]) // 2
    image, truth = data.image(shown[query][middle]), data.mask(shown[query][middle])
    answer = client.segment([image], bank=data.name, groups=[query])[0]
    scores = [dice(answer.labels == i, truth == i) for i in data.classes if i]
    example, example_mask = data.image(shown[template][middle]), data.mask(shown[template][middle])
    panels = (overlay(example, example_mask), image, overlay(image, answer.labels), overlay(image, truth))
    mean = float(np.mean([score for score in scores if score is not None]))
    words = {"template": template, "query": query, "dice": mean}
    strip = Image.new("RGB", (4 * SIDE + 3 * GAP, SIDE + CAPTION), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(14)
    for place, (panel, title) in enumerate(zip(panels, COLUMNS, strict=True)):
        left = place * (SIDE + GAP)
        draw.text((left + SIDE // 2, 4), title.format(**words), "black", font, anchor="ma")
        square = Image.fromarray(panel).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        strip.paste(square, (left, CAPTION))
    return strip


def main() -> None:
    """Write the picture."""
    with tempfile.TemporaryDirectory() as home, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        probe.close()
        place = {"HOME": home, "XDG_CONFIG_HOME": f"{home}/config", "XDG_DATA_HOME": f"{home}/data"}
        os.environ.update(place, VESSA_API_KEY="picture", VESSA_PORT=address.rpartition(":")[2])
        phantoms = ["vessa-server", "phantoms", f"{home}/phantoms", "--patients", "6", "--slices", "5"]
        subprocess.run(phantoms, check=True)
        server = subprocess.Popen(["vessa-server", "serve"], stdout=sys.stderr)
        try:
            with AnnotatorClient(address) as client:
                while not client.ready():
                    if server.poll() is not None:
                        raise SystemExit("The annotator ended before it was ready. Read its log above.")
                    time.sleep(0.5)
                rows = [row(client, Path(home, "phantoms", organ)) for organ in ("heart", "abdomen")]
        finally:
            server.terminate()
            server.wait()
    width, height = rows[0].size
    picture = Image.new("RGB", (width, 2 * height + GAP), "white")
    for place, strip in enumerate(rows):
        picture.paste(strip, (0, place * (height + GAP)))
    picture.save(PICTURE, quality=88, optimize=True, subsampling=0)
    print(f"{PICTURE}: {PICTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
