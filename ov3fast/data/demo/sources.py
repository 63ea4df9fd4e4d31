"""The pictures inside each package file, one generator per source.

Photos are yielded as (name, image), captioned pictures as (name, caption, image), emoji as (text, image) where `text` is
the emoji itself without U+FE0F. Images are Pillow images opened lazily: they are decoded where they are used, so a pool
of threads can share the work. Everything is in archive order.
"""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from ov3fast.data.demo.archives import members, rcc_files

GCOMPRIS_PHOTOS = ("categorization", "explore_monuments", "erase", "explore_world_animals", "explore_farm_animals")
SKIMAGE_PHOTOS = (
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png",
    "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
NOTO_SIZE = 109  # the font's only bitmap strike


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


# ---- photos ----------------------------------------------------------------------------------------------------------


def gcompris_photos(path: str | Path) -> Iterator[tuple[str, Image.Image]]:
    """Photos of animals, monuments, tools and the like (320 to 1920 px); the name is "<activity>/<folder>/<file>"."""
    bundles = tuple(f"/{name}.rcc" for name in GCOMPRIS_PHOTOS)
    for _, bundle in members(path, lambda name: name.endswith(bundles)):
        for name, data in rcc_files(bundle):
            drawn = "/images/numbers/" in name or "/images/alphabets/" in name
            if name.endswith(".webp") and not drawn:
                parts = name.removeprefix("/gcompris/src/activities/").removesuffix(".webp").split("/")
                yield "/".join(part for part in parts if part not in ("resource", "images")), _open(data)


def skimage_photos(path: str | Path) -> Iterator[tuple[str, Image.Image]]:
    """scikit-image's colour photos, read from its wheel (the right motorcycle repeats the left one and is left out)."""
    for name, data in members(path, lambda name: name.startswith("skimage/data/") and name.endswith(SKIMAGE_PHOTOS)):
        yield Path(name).stem, _open(data)


def foolbox_photos(path: str | Path) -> Iterator[tuple[str, Image.Image]]:
    """foolbox's 20 ImageNet-labelled photos, read from its wheel."""
    for name, data in members(path, lambda name: re.fullmatch(r"foolbox/data/imagenet_.*\.jpg", name) is not None):
        yield Path(name).stem, _open(data)


# ---- pictures with captions ------------------------------------------------------------------------------------------


def tuxpaint_stamps(path: str | Path) -> Iterator[tuple[str, str, Image.Image]]:
    """Tux Paint's stamps with their English captions, without the folder `symbols`; RGBA, about 130 px."""
    root = "usr/share/tuxpaint/stamps/"

    def wanted(name: str) -> bool:
        return name.startswith(root) and not name.startswith(root + "symbols/") and name.endswith((".png", ".txt"))

    waiting: dict[str, dict[str, bytes]] = {}
    for name, data in members(path, wanted):
        stem, kind = name.removeprefix(root).rsplit(".", 1)
        both = waiting.setdefault(stem, {})
        both[kind] = data
        if len(both) == 2:
            lines = waiting.pop(stem)["txt"].decode("utf-8", "replace").splitlines()
            if lines and lines[0].strip():
                yield stem, lines[0].strip(), _open(both["png"])


# ---- emoji -----------------------------------------------------------------------------------------------------------


def bare(text: str) -> str:
    """The emoji without U+FE0F (variation selector 16), which sources use inconsistently."""
    return text.replace("\ufe0f", "")


def has_skin_tone(text: str) -> bool:
    return any(0x1F3FB <= ord(char) <= 0x1F3FF for char in text)


def emoji_names(path: str | Path) -> dict[str, str]:
    """English name of each fully qualified emoji without skin tone, from the wheel of the pip package `emoji`."""
    [(_, table)] = members(path, lambda name: name == "emoji/unicode_codes/emoji.json")
    names = {}
    for text, entry in json.loads(table).items():
        if entry["status"] == 2 and not has_skin_tone(text):
            names[bare(text)] = entry["en"].strip(":").replace("_", " ")
    return names


def _from_code_points(stem: str) -> str | None:
    """Text of a stem such as "1f468-200d-1f373"; None if the stem is of another form."""
    if not re.fullmatch(r"[0-9a-f]{4,6}(-[0-9a-f]{4,6})*", stem):
        return None
    return "".join(chr(int(code, 16)) for code in stem.split("-"))


def fluent(path: str | Path) -> Iterator[tuple[str, Image.Image]]:
    """Fluent 3D emoji: RGBA, 256 px, without skin tones and without the few irregular file names."""
    for name, data in members(path, lambda name: re.fullmatch(r"package/assets/.*\.webp", name) is not None):
        text = _from_code_points(Path(name).stem)
        if text and not has_skin_tone(text):
            yield bare(text), _open(data)


def twitter(path: str | Path) -> Iterator[tuple[str, Image.Image]]:
    """Twemoji: RGBA, 64 px, flat drawings, without skin tones."""
    for name, data in members(path, lambda name: re.fullmatch(r"package/img/twitter/64/.*\.png", name) is not None):
        text = _from_code_points(Path(name).stem)
        if text and not has_skin_tone(text):
            yield bare(text), _open(data)


def emoji_categories(path: str | Path) -> dict[str, str]:
    """Category of each emoji, such as "food & drink", from emoji.json in the package emoji-datasource-twitter."""
    [(_, table)] = members(path, lambda name: name == "package/emoji.json")
    return {bare(_from_code_points(e["unified"].lower())): e["category"].lower() for e in json.loads(table)}


def emoji_short_names(path: str | Path) -> dict[str, str]:
    """Names from emoji.json's short names ("red_apple" -> "red apple"): the second choice after `emoji_names`."""
    [(_, table)] = members(path, lambda name: name == "package/emoji.json")
    return {bare(_from_code_points(e["unified"].lower())): re.sub("[_-]", " ", e["short_name"]) for e in json.loads(table)}


def noto(path: str | Path, texts: list[str]) -> Iterator[tuple[str, Image.Image]]:
    """Noto colour emoji drawn with Pillow: RGBA, 136 x 128 px. Glyphs that are blank or fall apart into several are left out.

    Needs Pillow with Raqm for the emoji made of several code points; without it those are left out as well.
    """
    [(_, font_file)] = members(path, lambda name: name.endswith("/NotoColorEmoji.ttf"))
    raqm = features.check("raqm")
    engine = ImageFont.Layout.RAQM if raqm else ImageFont.Layout.BASIC
    font = ImageFont.truetype(io.BytesIO(font_file), NOTO_SIZE, layout_engine=engine)
    for text in texts:
        if not raqm and len(text) > 1:
            continue
        left, top, right, bottom = font.getbbox(text)
        width, height = round(right - left), round(bottom - top)
        if not (0 < width <= 1.2 * 136 and 0 < height):
            continue
        image = Image.new("RGBA", (width, height))
        ImageDraw.Draw(image).text((-left, -top), text, font=font, embedded_color=True)
        if image.getbbox() is not None:
            yield text, image


# ---- symbols (what pip alone can give) -------------------------------------------------------------------------------

DEJAVU_STYLES = {
    "DejaVuSans.ttf": "sans", "DejaVuSans-Bold.ttf": "bold sans", "DejaVuSans-Oblique.ttf": "oblique sans",
    "DejaVuSansMono.ttf": "monospaced", "DejaVuSerif.ttf": "serif",
}  # fmt: skip
SYMBOL_BLOCKS = (  # arrows to technical signs, enclosed signs to shapes, pictographs and dingbats, more arrows, emoji
    (0x2190, 0x2430), (0x2460, 0x2500), (0x2580, 0x27C0), (0x2900, 0x2C00), (0x1F0A0, 0x1FB00),
)  # fmt: skip
SYMBOLS = [code for first, end in SYMBOL_BLOCKS for code in range(first, end)]


def dejavu_fonts(path: str | Path) -> dict[str, bytes]:
    """Style -> font file, from matplotlib's wheel."""
    fonts = members(path, lambda name: "/fonts/ttf/" in name and Path(name).name in DEJAVU_STYLES)
    return {DEJAVU_STYLES[Path(name).name]: data for name, data in fonts}


def dejavu(path: str | Path, size: int = 96) -> Iterator[tuple[str, str, Image.Image]]:
    """(style, symbol, glyph) for the named symbols of the DejaVu fonts; the glyph is black on transparency, RGBA."""
    for style, data in sorted(dejavu_fonts(path).items()):
        font = ImageFont.truetype(io.BytesIO(data), size, layout_engine=ImageFont.Layout.BASIC)
        missing = font.getmask("\U0010fffe")
        missing = (missing.size, bytes(missing))
        for code in SYMBOLS:
            text = chr(code)
            mask = font.getmask(text)
            if not unicodedata.name(text, "") or mask.getbbox() is None or (mask.size, bytes(mask)) == missing:
                continue
            left, top, right, bottom = font.getbbox(text)
            image = Image.new("RGBA", (int(right - left) + 1, int(bottom - top) + 1))
            ImageDraw.Draw(image).text((-left, -top), text, font=font, fill="black")
            yield style, text, image


def symbol_name(text: str) -> str:
    """Unicode's name of a symbol, lower-case."""
    return unicodedata.name(text).lower()


def tinted(glyph: Image.Image, colour: str) -> Image.Image:
    """The glyph (its alpha channel) in another colour, RGBA."""
    image = Image.new("RGBA", glyph.size, colour)
    image.putalpha(glyph.getchannel("A"))
    return image
