"""Draws the README's picture from a run of the demo: reconstructions of held-out photos, and retrieval in an unseen drawing style.

    python tools/readme_picture.py runs/demo        # writes docs/assets/demo.jpg and shows it in README.md

The selection is not hand-picked: photos and queries are evenly spaced over the held-out sets.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ov3fast.evaluation.evaluate import Sources, sources_of
from ov3fast.evaluation.pictures import Pictures, embed_images, embed_texts, read_pictures, spread
from ov3fast.evaluation.reconstruction import to_model_range
from ov3fast.evaluation.retrieval import nearest, similarity
from ov3fast.inference import load_model

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "assets" / "demo.jpg"
MARK = "<!-- picture -->"
ALT = (
    "Held-out photos and their reconstructions; text queries and the pictures they find in a drawing style never seen with them"
)
CELL, GAP, LABEL = 96, 8, 190
PHOTOS, QUERIES, FOUND = 6, 4, 6
LIMIT = 300_000


class Sheet:
    """Rows of pictures with a label on the left."""

    def __init__(self, rows: int, columns: int) -> None:
        self.image = Image.new("RGB", (LABEL + columns * (CELL + GAP), GAP + rows * (CELL + GAP)), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(15)

    def row(self, number: int, label: str, pictures: Tensor, right: list[bool] | None = None) -> None:
        top = GAP + number * (CELL + GAP)
        self.draw.text((GAP, top + CELL / 2), label, "black", self.font, anchor="lm")
        for column, picture in enumerate(pictures):
            left = LABEL + column * (CELL + GAP)
            cell = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((CELL, CELL), Image.Resampling.BICUBIC)
            self.image.paste(cell, (left, top))
            colour = "#2a9d4a" if right and right[column] else "#d0d0d0"
            self.draw.rectangle((left - 2, top - 2, left + CELL + 1, top + CELL + 1), outline=colour, width=2)


def to_uint8(images: Tensor) -> Tensor:
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def held_out(sources: Sources, size: int) -> tuple[Pictures, Pictures]:
    """The photos (or, if there are none, pictures) to reconstruct, and the captioned pictures to search."""
    pairs = sources.pairs.get("style") or next(iter(sources.pairs.values()))
    return read_pictures(sources.photos or pairs, size, limit=PHOTOS), read_pictures(pairs, size)


@torch.inference_mode()
def draw(model, sources: Sources) -> Image.Image:
    size = model.config.vision.image_size
    photos, pictures = held_out(sources, size)
    sheet = Sheet(2 + QUERIES, max(len(photos), FOUND))
    sheet.row(0, "held-out photos", photos.images)
    sheet.row(1, "reconstructed", to_uint8(model.reconstruct(to_model_range(photos.images))))

    texts = pictures.texts()
    queries = spread(len(texts), QUERIES)
    scores = similarity(embed_texts(model, [texts[i] for i in queries]), embed_images(model, pictures.images))
    for number, (query, found) in enumerate(zip(queries, nearest(scores, FOUND).tolist(), strict=True)):
        label = texts[query] if len(texts[query]) <= 22 else texts[query][:21] + "…"
        sheet.row(2 + number, f'"{label}"', pictures.images[found], [texts[i] == texts[query] for i in found])
    return sheet.image


def save(image: Image.Image, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    image.save(out, quality=88, optimize=True)
    if out.stat().st_size > LIMIT:
        raise SystemExit(f"{out} has {out.stat().st_size} bytes, more than {LIMIT}")


def show(readme: Path, out: Path) -> None:
    """Inserts the picture after the README's marker, once."""
    text = readme.read_text(encoding="utf-8")
    line = f"![{ALT}]({out.relative_to(readme.parent).as_posix()})"
    if line not in text:
        readme.write_text(text.replace(MARK, f"{MARK}\n{line}"), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a training run, or of a model")
    parser.add_argument("--data", help="shards to use instead of the demo set's held-out parts")
    parser.add_argument("--out", type=Path, default=OUT, help="README.md is updated only for the default")
    given = parser.parse_args()
    if given.data is None:
        from ov3fast.data.demo import build_demo

        sources = sources_of(build_demo())
    else:
        sources = sources_of(given.data)
    save(draw(load_model(given.run), sources), given.out)
    if given.out.resolve() == OUT:
        show(ROOT / "README.md", OUT)
    print(f"{given.out}: {given.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
