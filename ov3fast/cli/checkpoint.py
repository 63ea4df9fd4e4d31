"""ov3fast checkpoint: verify, compare and export the checkpoints of a training run.

ov3fast checkpoint verify runs/base                        check every byte of a run's checkpoints
ov3fast checkpoint diff runs/a runs/b                      list the tensors that differ
ov3fast checkpoint export runs/base --out base-1200/       write a model folder for from_pretrained
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ov3fast.cli.options import parse

if TYPE_CHECKING:
    from ov3fast.training.checkpoint import Checkpoint, Folder

BROKEN = 1
PATH = tyro.conf.arg(metavar="PATH")


@dataclass
class Verify:
    """Check every byte of a checkpoint, or of all checkpoints of a run. Exits with 1 if something is missing, truncated or changed."""

    path: Annotated[str, tyro.conf.Positional, PATH]
    """A run, a folder of checkpoints, a single checkpoint, or an fsspec URL of any of these."""


@dataclass
class Diff:
    """List the tensors in which two checkpoints differ, and by how much. Exits with 1 if there are any."""

    a: Annotated[str, tyro.conf.Positional, PATH]
    """A run (its newest checkpoint), a checkpoint, or an fsspec URL of one."""
    b: Annotated[str, tyro.conf.Positional, PATH]
    """Likewise."""


@dataclass
class Export:
    """Write a checkpoint's model as a folder for from_pretrained: config.json, model.safetensors and the tokenizer."""

    path: Annotated[str, tyro.conf.Positional, PATH]
    """A run (its newest checkpoint), a checkpoint, or an fsspec URL of one."""
    out: Path
    """Folder to write."""
    average: bool = True
    """Export the EMA of the weights, if the run keeps one, instead of the weights themselves."""


def run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: ov3fast checkpoint verify|diff|export PATH ...", __doc__.partition("\n")[2], sep="\n")
        return 0
    actions = {"verify": _verify, "diff": _diff, "export": _export}
    action, *rest = arguments
    if action not in actions:
        raise ValueError(f"checkpoint takes {', '.join(actions)}; got {action!r}")
    return actions[action](rest)


def _verify(arguments: list[str]) -> int:
    from ov3fast.training import checkpoint

    broken = 0
    for folder in _folders(parse(Verify, arguments, "checkpoint verify").path):
        try:
            found = checkpoint.load(folder)
        except ValueError as error:
            broken += 1
            manifest = folder.read_json(checkpoint.MANIFEST) if folder.has(checkpoint.MANIFEST) else None
            print("\n".join(checkpoint.problems(folder, manifest)) if manifest else str(error))
        else:
            print(f"{folder}: intact, " + ("written by an earlier version" if found.former else f"{len(found.saved)} tensors"))
    return BROKEN if broken else 0


def _diff(arguments: list[str]) -> int:
    from ov3fast.training import checkpoint

    given = parse(Diff, arguments, "checkpoint diff")
    first, second = _newest(given.a), _newest(given.b)
    found = checkpoint.difference(first, second)
    for name, how in found:
        print(f"{name}: {how}")
    print(f"{len(found)} tensors differ between {first.folder} and {second.folder}")
    return BROKEN if found else 0


def _export(arguments: list[str]) -> int:
    from ov3fast.io import check_writable_folder

    given = parse(Export, arguments, "checkpoint export")
    out = check_writable_folder(given.out, "--out")
    found = _newest(given.path)
    export_model(found, out, given.average)
    print(f"{found.folder} -> {out}")
    return 0


def export_model(found: Checkpoint, out: Path, average: bool = True) -> None:
    """Writes the checkpoint's model to the folder `out`."""
    from ov3fast.models import pretrained
    from ov3fast.models.openvision3 import OpenVision3
    from ov3fast.models.tokenizer import CONFIG_FILE, load_tokenizer
    from ov3fast.recipes import Recipe
    from ov3fast.training.progress import TOKENIZER

    recipe = Recipe.from_dict(found.state["recipe"]).resolve()
    candidates = [recipe.run_dir / TOKENIZER]
    if found.folder.local:
        candidates.insert(0, found.path.parent.parent / TOKENIZER)
    folder = next((path for path in candidates if (path / CONFIG_FILE).is_file()), None)
    if folder is None:
        raise FileNotFoundError(f"checkpoint export: found no tokenizer of the run in {', '.join(map(str, candidates))}")
    tokenizer = load_tokenizer(folder)
    config = recipe.model.for_tokenizer(tokenizer) if recipe.restrict_vocabulary else recipe.model
    with pretrained.without_values():
        model = OpenVision3(config, tokenizer=tokenizer)
    weights = {**found.tensors["model"], **(found.tensors.get("ema", {}) if average else {})}
    pretrained.load_state(model, weights, f"checkpoint export {found.folder}", assign=True)
    model.save_pretrained(out)


def _folders(path: str) -> list[Folder]:
    """The checkpoints that `path` refers to."""
    from ov3fast.training import checkpoint

    for candidate in (path, f"{path}/checkpoints"):
        folder = checkpoint.Folder(candidate)
        if checkpoint.STEP.fullmatch(folder.name) and folder.fs.isdir(folder.root):
            return [folder]
        if found := checkpoint.steps(folder):
            return [folder / f"{checkpoint.PREFIX}{step:08d}" for step in found]
    raise FileNotFoundError(f"{path} has no checkpoint; give a run, a folder of checkpoints or a single checkpoint")


def _newest(path: str) -> Checkpoint:
    from ov3fast.training import checkpoint

    return checkpoint.load(_folders(path)[-1])
