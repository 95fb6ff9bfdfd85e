"""Turn the values of a YAML file into frozen dataclasses, and check every key and type."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from vessa.errors import InvalidConfig


def put(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set one value of a tree by its path. Raises InvalidConfig when the path passes through a value."""
    for depth, key in enumerate(keys[:-1]):
        below = tree.get(key)
        if below is None:
            below = tree[key] = {}
        if not isinstance(below, dict):
            raise InvalidConfig(f"{'.'.join(keys[: depth + 1])} holds a value, not a section")
        tree = below
    tree[keys[-1]] = value


def _known_keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for name, kind in typing.get_type_hints(cls).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            keys += _known_keys(typing.cast(type, kind), f"{prefix}{name}.")
    return keys


def merge(tree: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree whose values another tree replaces, section by section."""
    merged = dict(tree)
    for key, value in over.items():
        there = merged.get(key)
        if isinstance(there, Mapping) and isinstance(value, Mapping):
            value = merge(there, value)
        merged[key] = value
    return merged


def build(cls: type, tree: Any, prefix: str = "", root: type | None = None) -> Any:
    """Make a dataclass from a tree of plain values, checking keys and types.

    prefix: of the section's keys; root: the outermost class, `cls` when None. Raises InvalidConfig, which
    names the key and, for an unknown key, the nearest known one.
    """
    root = root or cls
    if tree is None:
        tree = {}
    if not isinstance(tree, Mapping):
        raise InvalidConfig(f"{prefix.rstrip('.')} must be a section of keys, got {tree!r}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            raise InvalidConfig(f"unknown key {prefix}{key}{_nearest(f'{prefix}{key}', root)}")
        kind = hints[key]
        name = f"{prefix}{key}"
        is_section = dataclasses.is_dataclass(kind)
        values[key] = build(kind, value, f"{name}.", root) if is_section else _convert(kind, value, name)
    return cls(**values)


def _nearest(key: str, root: type) -> str:
    known = _known_keys(root)
    by_leaf = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    close = by_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; the nearest known key is {close[0]}" if close else ""


def _convert(kind: Any, value: Any, name: str) -> Any:
    """Check one value against its annotated type; lists become tuples, whole numbers become floats."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(item for item in arguments if item is not type(None)), value, name)
    if origin is Literal:
        if value not in arguments:
            raise InvalidConfig(f"{name} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (
            arguments[-1] is not ... and len(value) != len(arguments)
        ):
            count = "" if arguments[-1] is ... else f" of {len(arguments)}"
            raise InvalidConfig(f"{name} must be a list{count}, got {value!r}")
        return tuple(_convert(arguments[0], item, name) for item in value)
    if kind is float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
            try:
                value = float(value)
            except ValueError:
                raise InvalidConfig(f"{name} must be a number, got {value!r}") from None
        if isinstance(value, int) and not isinstance(value, bool):
            return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InvalidConfig(f"{name} must be of type {kind.__name__}, got {value!r}")
    return os.path.expanduser(value) if kind is str and value.startswith("~") else value
