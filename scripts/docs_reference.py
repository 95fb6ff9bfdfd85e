"""Generate the reference tables of the documentation from the code (an mkdocs hook).

A page holds a marker such as `<!-- generated: settings -->`; mkdocs calls `on_page_markdown`, which
puts the table in its place. A setting without a description is an error, so the build fails.
"""

import dataclasses
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import latex2mathml.converter
import typer
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

MARKER = re.compile(r"^<!-- generated: ([a-z ]+) -->$", re.MULTILINE)
MATH = re.compile(r"^\$\$(.+?)\$\$$|\$`(.+?)`\$", re.DOTALL | re.MULTILINE)  # as GitHub writes formulas
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the generated tables of a page and turn its formulas into MathML (called by mkdocs)."""
    markdown = MARKER.sub(lambda match: TABLES[match[1]](), markdown)
    parts = FENCE.split(markdown)  # every second part is a code block
    return "".join(part if i % 2 else MATH.sub(_mathml, part) for i, part in enumerate(parts))


def _mathml(match: re.Match[str]) -> str:
    block = match[1] is not None
    formula = latex2mathml.converter.convert(
        (match[1] or match[2]).strip(), display="block" if block else "inline"
    )
    return f'<div class="formula">{formula}</div>' if block else f"<span>{formula}</span>"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    cells = ([re.sub(r"\s+", " ", cell).replace("|", "\\|").strip() for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def required(name: str, text: str | None) -> str:
    """Return a description. Raises ValueError that names the setting where there is none."""
    if not text or not text.strip():
        raise ValueError(f"{name} has no description; describe it where it is defined")
    return text.strip()


# Settings of the annotator -------------------------------------------------------------------------


def settings_fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """Yield (environment variable, field) of a settings class and of its groups."""
    for name, info in model.model_fields.items():
        kind = info.annotation
        variable = info.validation_alias if isinstance(info.validation_alias, str) else prefix + name.upper()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from settings_fields(kind, prefix)  # a group's settings are named without the group
        else:
            yield variable, info


def settings_table() -> str:
    """Return the table of the annotator's settings."""
    from vessa_server.settings import Settings

    prefix = Settings.model_config.get("env_prefix") or ""
    rows = [
        (
            f"`{name}`",
            f"`{type_name(info.annotation)}`",
            _default(info.get_default(call_default_factory=info.default_factory is not None)),
            required(name, info.description),
        )
        for name, info in settings_fields(Settings, prefix)
    ]
    return table(("variable", "type", "default", "meaning"), rows)


def _default(value: Any) -> str:
    if value is None or isinstance(value, SecretStr):
        return ""
    home = str(Path.home())
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1024 and value % 1024 == 0:
        amount, unit = next(
            (value >> s, u) for s, u in ((30, "Gi"), (20, "Mi"), (10, "Ki")) if not value % (1 << s)
        )
        return f"`{value}` ({amount} {unit})"
    text = str(value).replace(home, "~") if not isinstance(value, frozenset) else ",".join(sorted(value))
    return f"`{text}`" if text else ""


def type_name(kind: Any) -> str:
    """Return how a type is written in a table: `int`, `cpu or cuda`, `list of float`."""
    origin, given = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return type_name(given[0])
    if origin is typing.Literal:
        return ", ".join(str(value) for value in given)
    if origin in (tuple, list, frozenset, set):
        return f"list of {type_name(next(a for a in given if a is not Ellipsis))}"
    if given:  # a union
        return " or ".join(type_name(a) for a in given)
    if kind is type(None):
        return "null"
    return "str" if kind is SecretStr else getattr(kind, "__name__", str(kind))


# Configuration of the trainer ----------------------------------------------------------------------


def described(cls: type) -> dict[str, str]:
    """Return the description of each field of a dataclass, as its docstring's `name: text` says it."""
    names = "|".join(field.name for field in dataclasses.fields(cls))
    parts = re.split(rf"\s({names}): ", cls.__doc__ or "")
    return {
        key: re.sub(r"\s+", " ", text).strip().rstrip(".")
        for key, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def config_tables() -> str:
    """Return one table per section of the trainer's configuration."""
    from vessa_trainer.config import Config

    hints = typing.get_type_hints(Config)
    sections: list[tuple[str, type, Any]] = [("", Config, Config())]
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(hints[field.name]):
            sections.append((f"{field.name}.", hints[field.name], getattr(Config(), field.name)))
    pages = []
    for prefix, cls, default in sections:
        meanings, kinds = described(cls), typing.get_type_hints(cls)
        rows = []
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(kinds[field.name]):
                continue
            key, value = prefix + field.name, getattr(default, field.name)
            shown = "null" if value is None else list(value) if isinstance(value, tuple) else value
            meaning = required(key, meanings.get(field.name))
            default_cell = f"`{shown}`" if shown != "" else ""
            rows.append((f"`{key}`", f"`{type_name(kinds[field.name])}`", default_cell, meaning))
        title = f"### `{prefix.rstrip('.')}`" if prefix else "### Run"
        pages.append(f"{title}\n\n{table(('key', 'type', 'default', 'meaning'), rows)}")
    return "\n\n".join(pages)


# Command lines -------------------------------------------------------------------------------------


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """Yield (words on the command line, command) of a command and all below it."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, f"{path} {name}")


def cli_pages() -> str:
    """Return the reference of all three command lines."""
    from vessa.cli import app as vessa
    from vessa_server.cli.main import app as server
    from vessa_trainer.cli import app as trainer

    pages = []
    for name, app in (("vessa", vessa), ("vessa-server", server), ("vessa-trainer", trainer)):
        for path, command in commands(typer.main.get_command(app), name):
            pages.append(f"{'##' if path == name else '###'} {path}\n\n{required(path, command.help)}")
            if rows := [
                _parameter(path, parameter) for parameter in command.params if parameter.name != "help"
            ]:
                pages.append(table(("argument or option", "default", "meaning"), rows))
    return "\n\n".join(pages)


def _parameter(path: str, parameter: click.Parameter) -> tuple[str, ...]:
    if parameter.param_type_name == "option":
        shown, text = ", ".join(f"`{name}`" for name in parameter.opts), parameter.help
    else:
        shown, text = f"`{str(parameter.name).upper()}`", getattr(parameter, "help", None)
    empty = parameter.default is None or callable(parameter.default) or parameter.default in (False, (), [])
    default = "required" if parameter.required else "" if empty else f"`{parameter.default}`"
    return shown, default, required(f"{path} {shown}", text)


# HTTP ----------------------------------------------------------------------------------------------


def routes_table() -> str:
    """Return the table of the annotator's routes, from its OpenAPI description."""
    from vessa_server.app import create_app
    from vessa_server.settings import Settings

    described = create_app(Settings(insecure=True)).openapi()["paths"]
    rows = [
        (f"`{method.upper()}`", f"`{path}`", required(path, route.get("description")).partition("\n\n")[0])
        for path, methods in described.items()
        for method, route in methods.items()
    ]
    return table(("method", "path", "what it does"), rows)


def errors_table() -> str:
    """Return the table of the error codes with their statuses."""
    from vessa import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and "code" in vars(kind)]
    rows = [
        (
            str(kind.status or "client"),
            f"`{kind.code}`",
            required(kind.__name__, kind.__doc__).partition("\n\n")[0],
        )
        for kind in sorted(kinds, key=lambda kind: kind.status or 1000)
    ]
    return table(("status", "code", "meaning"), rows)


def metrics_table() -> str:
    """Return the table of the annotator's Prometheus metrics."""
    from vessa_server.observability.metrics import Metrics

    service = Metrics()
    service.show_annotator(lambda: {}, lambda: {})
    rows = [
        (f"`{family.name}`", family.type, family.documentation)
        for family in service.registry.collect()
        if family.name.startswith("vessa")
    ]
    return table(("metric", "type", "meaning"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings_table,
    "config": config_tables,
    "cli": cli_pages,
    "routes": routes_table,
    "errors": errors_table,
    "service metrics": metrics_table,
}
