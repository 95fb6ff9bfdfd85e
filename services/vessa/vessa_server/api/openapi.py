"""Complete the OpenAPI description beyond the routes' signatures, and render the page of /docs.

The page has no scripts and loads nothing from elsewhere.
"""

from html import escape
from typing import Any

from vessa.errors import ERRORS
from vessa.schemas import ErrorResponse

_FILE = {"type": "string", "format": "binary"}
_TENSORS = {"application/vnd.safetensors": {"schema": _FILE}}


def _form(required: list[str], *, tensors: bool = True, **fields: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "required": required, "properties": fields, "additionalProperties": False}
    content = {"multipart/form-data": {"schema": schema}, **(_TENSORS if tensors else {})}
    return {"requestBody": {"required": True, "content": content}}


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


TEMPLATE_BODY = _form(
    ["image", "mask", "classes", "group"],
    image={**_FILE, "description": "PNG, JPEG, TIFF or DICOM"},
    mask={**_FILE, "description": "PNG of the same size whose values are class ids"},
    classes=_text('JSON {"1": "right ventricle"}'),
    group=_text("whose image it is, such as a patient's id"),
    bank=_text("template bank, made if needed; default: default"),
)
ADAPTATION_BODY = {
    "requestBody": {
        "required": False,
        "content": {
            "application/vnd.safetensors": {
                "schema": {
                    "type": "string",
                    "format": "binary",
                    "description": "images: uint8 (M, 240, 240), gray squares; M at most 400",
                }
            }
        },
    }
}
_VOLUME_FILES = {
    "type": "array",
    "items": _FILE,
    "description": "NIfTI or DICOM; repeated for the files of a series",
}
JOB_BODY = _form(
    ["image"],
    tensors=False,
    image=_VOLUME_FILES,
    bank=_text("template bank; default: default"),
    classes=_text("JSON list of class names; default: all of the bank"),
    group=_text("the volume's own patient, whose templates are not used"),
    axis=_text("auto (default), axial, coronal or sagittal"),
    result=_text("nifti or dicom-seg; default: as the image"),
    clean=_text("1: smooth the labels along z and keep the largest component of classes that have one"),
)
WORKLIST_VOLUME_BODY = _form(
    ["image"],
    tensors=False,
    image=_VOLUME_FILES,
    name=_text("file name that the worklist shows"),
    group=_text("whose volume it is, such as a patient's id"),
)
SLICES_BODY = _form(
    ["image"],
    tensors=False,
    image={**_VOLUME_FILES, "description": "a picture, NIfTI, or the DICOM files of one series"},
)
WORKLIST_ITEM_BODY = _form(
    ["image"],
    tensors=False,
    image={**_FILE, "description": "PNG, JPEG, TIFF or DICOM"},
    name=_text("file name that the worklist shows"),
    group=_text("whose image it is, such as a patient's id"),
)
SUGGEST_BODY = {"requestBody": {"required": True, "content": _TENSORS}}
SEGMENT_BODY = _form(
    ["image"],
    image={**_FILE, "description": "PNG, JPEG, TIFF or DICOM"},
    bank=_text("template bank; default: default"),
    classes=_text("JSON list of class names; default: all of the bank"),
    group=_text("the query's own patient, whose templates are not used"),
    boxes=_text('JSON {"right ventricle": [x1, y1, x2, y2]} in px'),
    points=_text('JSON {"right ventricle": [[x, y], ...]} in px'),
    point_labels=_text('JSON {"right ventricle": [1, 0, ...]}: 1 inside, 0 outside'),
    template_choice=_text("top1 (default), top3 or sample"),
    seed=_text("whole number, for sample"),
    clean=_text("1: keep the largest component of classes that have one in every template"),
)

# Each status that a route with a key may answer when it fails, with the codes that come with it.
FAILURES: dict[int | str, dict[str, Any]] = {
    status: {
        "model": ErrorResponse,
        "description": ", ".join(sorted(code for code, error in ERRORS.items() if error.status == status)),
    }
    for status in sorted({error.status for error in ERRORS.values() if error.status})
}


def answering(*media: str, **more: Any) -> dict[int | str, dict[str, Any]]:
    """Declare the media types of a successful answer; more: model, for its JSON."""
    return {200: {"content": {kind: {} for kind in media}, **more}}


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}"
    "code,pre{font-family:ui-monospace,monospace}pre{white-space:pre-wrap}"
    "h2{margin:2rem 0 .3rem;font-size:1.05rem}td{padding:.1rem 1rem .1rem 0;vertical-align:top}"
)


def docs_page(openapi: dict[str, Any]) -> str:
    """Return HTML that lists every route with its description and form fields."""
    parts = []
    for path, methods in openapi["paths"].items():
        for method, route in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<pre>{escape(route.get('description', route.get('summary', '')))}</pre>")
            parts.append(_fields(route))
    info = openapi["info"]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(info['title'])}</title>"
        f"<style>{_STYLE}</style><h1>{escape(info['title'])} {escape(info['version'])}</h1>"
        f"<p>{escape(info['description'])}</p>{''.join(parts)}</html>"
    )


def _fields(route: dict[str, Any]) -> str:
    content = route.get("requestBody", {}).get("content", {})
    rows = content.get("multipart/form-data", {}).get("schema", {}).get("properties", {})
    cells = [
        f"<tr><td><code>{escape(name)}</code><td>{escape(field.get('description', ''))}"
        for name, field in rows.items()
    ]
    cells += [
        f"<tr><td><code>?{escape(field['name'])}</code><td>{escape(field.get('description', ''))}"
        for field in route.get("parameters", [])
        if field["in"] == "query"
    ]
    return f"<table>{''.join(cells)}</table>" if cells else ""
