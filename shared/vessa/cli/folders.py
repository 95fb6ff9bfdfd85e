"""`vessa annotate|suggest`: annotate a folder of images, and rank unlabeled images."""

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from vessa.bulk.annotate import MANIFEST, AnnotateOptions, Counts, annotate_folder
from vessa.bulk.unlabeled_pool import Candidate, Pixels, find_candidates
from vessa.cli.options import Bank, Json, Key, Url, complain, console, finish, progress_bar, say
from vessa.cli.segment import Classes, Clean
from vessa.client import AnnotatorClient
from vessa.errors import InvalidDataset, VessaError
from vessa.schemas import Suggestions

_TIMEOUT_S = 150.0  # longer than the service's own limit, so that its error arrives


def annotate(
    folder: Annotated[Path, typer.Argument(help="Folder of PNG, JPEG or TIFF images, with its subfolders.")],
    out: Annotated[
        Path, typer.Option(help="Folder for masks/ and manifest.jsonl; an unfinished job there is resumed.")
    ],
    bank: Bank = "default",
    classes: Classes = None,
    by_folder: Annotated[
        bool,
        typer.Option(
            "--by-folder",
            help="An image's folder is its patient, whose templates are not used.",
        ),
    ] = False,
    clean: Clean = False,
    batch: Annotated[int, typer.Option(help="Images per request.", min=1, max=64)] = 8,
    threads: Annotated[int, typer.Option(help="Requests in progress at once.", min=1)] = 4,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Annotate the files again that failed before.")
    ] = False,
    patience: Annotated[
        float, typer.Option(help="Seconds without a response from any annotator before the job stops.")
    ] = 300.0,
    urls: Annotated[
        list[str] | None,
        typer.Option("--url", help="Address of the annotator; repeatable: replicas share the work."),
    ] = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Annotate a folder of any number of images; a second run annotates only the missing ones."""
    addresses: list[str | None] = [*urls] if urls else [None]
    options = AnnotateOptions(bank, None if classes is None else tuple(classes), by_folder, batch, clean)
    with contextlib.ExitStack() as stack, progress_bar() as bar:
        clients = [
            stack.enter_context(AnnotatorClient(url, api_key, timeout=_TIMEOUT_S, attempts=1))
            for url in addresses
        ]
        task = bar.add_task("annotating", total=None)

        def report(counts: Counts) -> None:
            done = counts.ok + counts.failed
            speed = done / max(counts.seconds, 1e-9)
            text = f"{counts.skipped + done} of at least {counts.files} files, {speed:.1f} per second"
            bar.update(task, description=text)

        counts = annotate_folder(
            folder,
            out,
            options,
            clients,
            threads=threads,
            patience=patience,
            retry=retry_failed,
            report=report,
        )
    say(
        f"{counts.ok} masks written, {counts.skipped} files finished before; "
        f"{out / MANIFEST} has one line per file"
    )
    if counts.damaged:
        complain(f"{counts.damaged} masks of an earlier run were missing or cut off and were requested again")
    if counts.failed or counts.failed_before:
        reasons = ", ".join(f"{code}: {count}" for code, count in counts.errors.most_common())
        complain(
            f"{counts.failed} files failed{reasons and f' ({reasons})'}, {counts.failed_before} failed in an "
            f"earlier run; {out / MANIFEST} has each reason, --retry-failed tries them again"
        )
    names = ("files", "ok", "failed", "failed_before", "skipped", "damaged")
    result = {name: getattr(counts, name) for name in names}
    finish({**result, "seconds": round(counts.seconds, 1)}, as_json)
    if counts.failed or counts.failed_before:
        raise typer.Exit(1)


def suggest(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Data folder, to rank its images without a mask by patient; or any other folder of images, "
            "NIfTI volumes and DICOM series."
        ),
    ],
    bank: Bank = "default",
    count: Annotated[int, typer.Option(help="Number of suggestions, at most.", min=1)] = 10,
    by_folder: Annotated[bool, typer.Option("--by-folder", help="An image's folder is its patient.")] = False,
    split: Annotated[
        str | None, typer.Option(help="Only the groups of this split file of a data folder.")
    ] = None,
    url: Url = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Rank unlabeled images, or patients, by how much annotating them would improve a bank."""
    skipped: list[str] = []

    def skip(name: str, error: VessaError) -> None:
        skipped.append(name)
        complain(f"{name} is skipped: {error}")

    with AnnotatorClient(url, api_key) as client, progress_bar() as bar:
        reading = bar.add_task("reading images", total=None)
        sending = bar.add_task("computing features", total=None)
        found = []
        for one in find_candidates(folder, by_folder=by_folder, split=split, skip=skip):
            found.append(one)
            bar.update(reading, completed=len(found))
        if not found:
            raise InvalidDataset(f"{folder} contains no readable image without a mask: choose another folder")
        bar.update(reading, total=len(found))
        answer = client.suggest(
            bank,
            Pixels(found),
            groups=[one.group for one in found],
            count=count,
            progress=lambda done, total: bar.update(sending, total=total, completed=done),
        )
    ranked = _ranked(answer, found)
    _print_ranking(ranked)
    say(f"best first, of {len(found)} images; gain: share of their distance to bank {bank} that it removes")
    about = {"bank": answer.bank, "bank_version": answer.bank_version, "images": len(found)}
    finish({**about, "skipped": skipped, "suggestions": ranked}, as_json)


def _ranked(answer: Suggestions, candidates: list[Candidate]) -> list[dict[str, Any]]:
    """Replace the image ids of suggestions by the candidates' names."""
    names: dict[tuple[str, str], list[str]] = {}
    for identity, one in zip(answer.image_ids, candidates, strict=True):
        names.setdefault((one.group or identity, identity), []).append(one.name)
    ranked = []
    for best in answer.suggestions:
        images = [names[best.group, identity].pop(0) for identity in best.image_ids]
        group = None if best.group in best.image_ids else best.group
        ranked.append({"group": group, "images": images, "gain": best.gain})
    return ranked


def _print_ranking(ranked: list[dict[str, Any]]) -> None:
    table = Table("", "annotate", "images", "gain")
    for place, one in enumerate(ranked, 1):
        images = one["images"]
        shown = ", ".join(images[:3]) + (f" and {len(images) - 3} more" if len(images) > 3 else "")
        table.add_row(str(place), escape(one["group"] or images[0]), escape(shown), f"{one['gain']:.1%}")
    console.print(table)
