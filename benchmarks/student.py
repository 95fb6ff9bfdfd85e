"""Train a student with VESSA's labels and compare it with VESSA alone and with UniMatch V2.

    make bench-student ARGS="--data FOLDER"

The annotator with the shipped weights runs beside the training. Schedule, split and seeds are those of
`vessa-trainer compare --config quick`; selection is on validation patients, figures are of test patients. A
stopped run resumes with the same --out. The last line is one JSON object: vessa_assisted_dice,
vessa_alone_dice, unimatch_v2_dice, assisted_over_alone (difference), seconds.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from rich.console import Console
from serving import annotator

from vessa_trainer.config import load_config, shipped
from vessa_trainer.experiments.compare import compare


def main() -> None:
    """Run the comparison and print its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, help="data folder with split files")
    parser.add_argument("--schedule", default="quick", help="quick, standard or full")
    parser.add_argument("--weights", default="nano", help="weights of the annotator")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-student"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of the trainer; the annotator has one")
    parser.add_argument("--set", action="append", default=[], help="override, as section.key=value")
    given = parser.parse_args()
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        annotator(Path(folder), VESSA_WEIGHTS=given.weights, VESSA_THREADS="1") as served,
    ):
        place = [f"data.root={given.data}", f"out={given.out}", f"threads={given.threads}"]
        service = [
            f"annotator.url={served.url}",
            f"annotator.api_key={served.key}",
            f"cache.url=folder:{given.out}/labels",
        ]
        config = load_config(shipped(given.schedule), [*place, *service, *given.set])
        result = compare(
            config,
            seeds=given.seeds,
            resume_line="the same command",
            console=Console(stderr=True),
            urls=[served.url],
        )
    figures = {k: result[k] for k in ("vessa_assisted_dice", "vessa_alone_dice", "unimatch_v2_dice")}
    figures["assisted_over_alone"] = round(result["vessa_assisted_dice"] - result["vessa_alone_dice"], 4)
    print(json.dumps(figures | {"schedule": given.schedule, "seconds": round(time.monotonic() - started)}))


if __name__ == "__main__":
    main()
