"""Show answers and progress in Jupyter notebooks. Nothing here needs Jupyter; elsewhere it stays silent."""

import base64
import html
import importlib
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image

from vessa.masks.colors import class_hex

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def png_of(pixels: Pixels) -> bytes:
    """Return a picture, uint8 (H, W[, 3]), as the bytes of a PNG file."""
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def answer_html(
    head: Sequence[str], rows: Sequence[tuple[int, Sequence[str]]], picture: bytes | None, note: str = ""
) -> str:
    """Return a table of classes beside a picture.

    head: titles of the columns, the class's name first
    rows: class id and cells of each class; its color marks the row
    """
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    lines = "".join(
        f'<tr><td><span style="color:{class_hex(class_id)}">&#9632;</span> '
        + "</td><td>".join(html.escape(cell) for cell in cells)
        + "</td></tr>"
        for class_id, cells in rows
    )
    source = "" if picture is None else base64.b64encode(picture).decode()
    image = f'<img src="data:image/png;base64,{source}" style="max-width:24rem">' if source else ""
    about = f"<p>{html.escape(note)}</p>" if note else ""
    return (
        f'<div style="display:flex;gap:1rem;align-items:start">{image}'
        f"<div><table><tr>{titles}</tr>{lines}</table>{about}</div></div>"
    )


def notebook_progress(what: str) -> Callable[[int, int], None]:
    """Return progress(done, total), which draws a bar in the cell of a notebook and nothing elsewhere."""
    if not in_notebook():
        return lambda done, total: None
    shown: Any = importlib.import_module("IPython.display")

    def bar(done: int, total: int) -> Any:
        text = f"{html.escape(what)}: {done} of {total}"
        return shown.HTML(f'<progress value="{done}" max="{max(total, 1)}"></progress> {text}')

    handle = shown.display(bar(0, 1), display_id=True)

    def show(done: int, total: int) -> None:
        handle.update(bar(done, total))

    return show


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config
