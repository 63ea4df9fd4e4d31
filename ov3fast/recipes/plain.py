"""Nested frozen dataclasses to JSON's plain values, and back with every field's type checked."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal

from ov3fast.models.config import renamed


def to_plain(value: Any) -> Any:
    """A dataclass as nested dicts, lists and scalars; paths as strings."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def build(kind: Any, value: Any, where: str) -> Any:
    """A value of the annotated type `kind` from JSON's plain values. ValueError says where it doesn't fit."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: takes a dict of fields, got {type(value).__name__}")
        hints = typing.get_type_hints(kind)
        value = renamed(kind, value)
        known = [f.name for f in dataclasses.fields(kind)]
        for key in value:
            if key not in known:
                raise ValueError(f"{where}: unknown key {key!r}; it takes {', '.join(known)}")
        needed = [f.name for f in dataclasses.fields(kind) if f.default is MISSING and f.default_factory is MISSING]
        if missing := [name for name in needed if name not in value]:
            raise ValueError(f"{where}: needs {', '.join(missing)}")
        return kind(**{key: build(hints[key], item, f"{where}.{key}") for key, item in value.items()})
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            kinds = typing.get_args(option)
            kinds = (kinds[0],) * len(value) if len(kinds) == 2 and kinds[1] is Ellipsis else kinds
            if len(kinds) == len(value):
                return tuple(build(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, value, strict=True)))
        elif option is Path and isinstance(value, str | Path):
            return Path(value)
        elif _fits(option, value):
            return value
    raise ValueError(f"{where}: takes {' or '.join(map(_named, options))}, got {value!r}")


def _named(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        return "a list" if Ellipsis in kinds else f"a list of {len(kinds)}"
    return str({type(None): "null", Path: "a path"}.get(kind, kind.__name__))


def _fits(kind: Any, value: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return False
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything that is neither dict nor list of dicts."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for i, item in enumerate(value):
            yield from leaves(item, f"{name}.{i}")
    else:
        yield name, value
