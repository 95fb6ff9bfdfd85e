"""Read the form of POST /jobs."""

from dataclasses import dataclass
from typing import Any, get_args

from vessa.errors import InvalidRequest
from vessa.volumes import AXES
from vessa.volumes.files import LabelFormat
from vessa_server.serialization.fields import read_name, read_strings, read_switch
from vessa_server.serialization.multipart import Form
from vessa_server.serialization.request_parser import DEFAULT_BANK
from vessa_server.template_bank.retrieval import check_name

ResultKind = LabelFormat


@dataclass(frozen=True)
class JobRequest:
    """Hold the fields of a job request.

    axis: see `Volume.axis`; kind: None for what fits the files; clean: clean the labels of the volume
    """

    bank: str
    classes: list[str] | None = None
    group: str | None = None
    axis: str = "auto"
    kind: ResultKind | None = None
    clean: bool = False


JOB_FIELDS = {"image", "bank", "classes", "group", "axis", "result", "clean"}


def read_job(form: Form) -> JobRequest:
    """Return the fields of a job's form. Raises InvalidRequest, TooLarge."""
    classes, group = form.json("classes"), form.text("group", "")
    return JobRequest(
        bank=check_name(form.text("bank", DEFAULT_BANK)),
        classes=None if classes is None else read_strings(classes, "classes", None),
        group=read_name(group, "group") if group else None,
        axis=_one_of(form, "axis", AXES, "auto"),
        kind=_one_of(form, "result", get_args(ResultKind), None),
        clean=read_switch({"clean": form.text("clean", "0")}, "clean"),
    )


def _one_of(form: Form, name: str, allowed: tuple[str, ...], default: str | None) -> Any:
    value = form.text(name, "") or default
    if value is not None and value not in allowed:
        raise InvalidRequest(f"{name} must be one of {', '.join(allowed)}. Got {value[:40]!r}.")
    return value
