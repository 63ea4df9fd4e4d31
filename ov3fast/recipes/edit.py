"""Recipes from files, and with parts removed or added: what the flags of single fields can't say."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ov3fast.data.config import SourceConfig

from .config import Recipe, Stage
from .plain import build

SUFFIXES = (".json", ".yaml", ".yml")


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a .json or .yaml file, such as a run's recipe.json. FileNotFoundError or ValueError names the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"recipe: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text)
    except ImportError:
        raise ValueError(f"recipe: {path} needs the package PyYAML; install it or give .json") from None
    except Exception as error:  # yaml's errors have a root of their own
        raise ValueError(f"recipe: {path} is not {path.suffix[1:].upper()}: {' '.join(str(error).split())}") from None
    try:
        return Recipe.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"recipe: {path}: {error}") from None


def edit(
    recipe: Recipe,
    *,
    remove_stages: Sequence[str] = (),
    add_stages: Sequence[str] = (),
    remove_sources: Sequence[str] = (),
    add_sources: Sequence[str] = (),
) -> Recipe:
    """The recipe without the stages (by name or number) and sources (by path or number) named, and with others behind those left.

    What is added is "field=value,field=value"; a stage takes the fields that are not given from the last stage.
    """
    stages = _remove(recipe.stages, remove_stages, "--remove-stage", "name")
    sources = _remove(recipe.data.sources, remove_sources, "--remove-source", "path")
    for text in add_stages:
        values = _fields(text, Stage, "--add-stage")
        base = dataclasses.asdict((stages or recipe.stages)[-1])
        for kinds in (("epochs", "steps", "minutes"), ("warmup_epochs", "warmup_steps", "warmup_fraction")):
            if any(kind in values for kind in kinds):
                base |= dict.fromkeys(kinds)
        stages = (*stages, _made(Stage, {**base, **values}, "--add-stage"))
    for text in add_sources:
        sources = (*sources, _made(SourceConfig, _fields(text, SourceConfig, "--add-source"), "--add-source"))
    return dataclasses.replace(recipe, stages=stages, data=dataclasses.replace(recipe.data, sources=sources))


def _remove(items: tuple[Any, ...], names: Sequence[str], flag: str, field: str) -> tuple[Any, ...]:
    known = [getattr(item, field) for item in items]
    for name in names:
        if name not in known and not (name.isdigit() and int(name) < len(items)):
            raise ValueError(f"{flag}: got {name!r}; it takes a number from 0 or one of {', '.join(known)}")
    return tuple(item for i, item in enumerate(items) if str(i) not in names and known[i] not in names)


def _fields(text: str, kind: type, flag: str) -> dict[str, Any]:
    types = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or name not in types:
            raise ValueError(f"{flag}: got {part!r}; it takes field=value with the fields {', '.join(types)}")
        if name == "captions":  # key or key:probability, separated by +
            pairs = [choice.partition(":") for choice in value.split("+")]
            if not all(key for key, _, _ in pairs):
                raise ValueError(f"{flag}: got {part!r}; it takes captions=key or key:probability, several joined by +")
            values[name] = [[key, _literal(p) if p else 1.0] for key, _, p in pairs]
            continue
        values[name] = value if types[name] is str or str in typing.get_args(types[name]) else _literal(value)
    return values


def _literal(value: str) -> Any:
    try:
        return json.loads({"None": "null", "True": "true", "False": "false"}.get(value, value))
    except ValueError:
        return value


def _made(kind: type, values: dict[str, Any], flag: str) -> Any:
    try:
        return build(kind, values, kind.__name__)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
