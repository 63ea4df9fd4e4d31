"""ov3fast generate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ov3fast.cli.options import parse


@dataclass(kw_only=True)
class Generate:
    """Generate pictures of a class or a text with a generator trained by `ov3fast train --recipe generate-...`."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The generator's run or folder."""
    class_: Annotated[str | None, tyro.conf.arg(name="class")] = None
    """Name of the class, or "all" for every one; without --class and --text, the classes are listed."""
    text: str | None = None
    """Prompt, for a generator trained on texts."""
    count: int = 16
    """Number of pictures, of each class."""
    seed: int = 0
    """Picture i depends only on the seed and i."""
    steps: int = 50
    guidance: float = 2.0
    """Guidance weight; 1 means none. Internal guidance if the generator has a base head, else classifier-free."""
    worse: str | None = None
    """AutoGuidance: the run of a smaller or less trained generator of the same classes, to guide away from."""
    method: str = "euler"
    """euler or heun."""
    precision: Literal["fp32", "bf16", "int8"] = "fp32"
    """Precision of the generator's matrix products; the state between steps is always float32. int8 needs a CPU with VNNI."""
    batch_size: int = 64
    out: Path | None = None
    """A folder for one PNG per picture, or a .png file for a grid; with --class all, one row per class in the order of the list."""
    model: str | None = None
    """The tokenizer model, if it has moved since the generator was trained."""
    vae: str | None = None
    """VAE to use instead of the tokenizer's."""


def run(arguments: list[str]) -> int:
    given = parse(Generate, arguments, "generate")
    if given.class_ is not None and given.text is not None:
        raise ValueError("generate: give either --class or --text")
    for name in ("count", "steps", "batch_size"):
        if getattr(given, name) < 1:
            raise ValueError(f"generate: --{name.replace('_', '-')} must be at least 1, got {getattr(given, name)}")
    import torch

    from ov3fast.generation.saved import SavedGenerator
    from ov3fast.generation.tokens import text_tokens
    from ov3fast.inference import load_model
    from ov3fast.io import atomic_folder, atomic_write, check_writable, check_writable_folder

    saved = SavedGenerator.load(given.run)
    if given.class_ is None and given.text is None:
        print("\n".join(saved.classes) if saved.classes else "this generator takes --text")
        return 0
    if given.out is None:
        raise ValueError("generate: --out is needed: a folder, or a .png file for a grid")
    if bool(saved.classes) != (given.text is None):
        raise ValueError(f"generate: this generator takes {'--class' if saved.classes else '--text'}")
    worse = None if given.worse is None else SavedGenerator.load(given.worse)
    grid = given.out.suffix == ".png"
    every = given.class_ == "all"
    (check_writable if grid else check_writable_folder)(given.out, "--out")
    labels = range(len(saved.classes)) if every else [] if given.class_ is None else [saved.label_of(given.class_)]
    model = load_model(given.model or saved.model, vae=given.vae)
    rows = torch.tensor(labels) if labels else text_tokens(model, [given.text or ""])
    condition = rows.repeat_interleave(given.count, 0)
    # Picture i of a class depends only on the seed and i, not on the other classes.
    numbers = list(range(given.count)) * len(rows)
    parts = []
    for chosen in torch.arange(len(condition)).split(given.batch_size):
        latents = saved.sample(
            condition[chosen], [numbers[i] for i in chosen], seed=given.seed, steps=given.steps, weight=given.guidance,
            method=given.method, precision=given.precision, worse=worse,
        )  # fmt: skip
        parts.append(saved.pictures(model, latents))
    pictures = torch.cat(parts)
    from PIL import Image

    from ov3fast.generation.report import tiled

    if grid:
        board = tiled(pictures, columns=given.count if every else None)
        with atomic_write(given.out) as temporary:
            Image.fromarray(board.permute(1, 2, 0).numpy()).save(temporary, "PNG")
    else:
        of = [saved.classes[i].replace("/", "-").replace(" ", "-") + "-" for i in labels] if every else [""]
        names = [f"{name}{number:05d}.png" for name in of for number in range(given.count)]
        with atomic_folder(given.out) as folder:
            for name, picture in zip(names, pictures, strict=True):
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / name)
    print(f"{len(pictures)} pictures -> {given.out}")
    return 0
