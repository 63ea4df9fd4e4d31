"""Captions of a sample: what counts as one, and picking one by probability.

A caption is text that is not blank, or a list of texts, one of which is picked. Anything else (null, numbers, objects, lists
without text) is not a caption. Text is made well-formed: split surrogate pairs are joined, lone surrogates become U+FFFD.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

Choices = Sequence[tuple[str, float]]  # (caption key, probability), such as (("re_caption", 0.8), ("org_caption", 0.2))
Captions = Mapping[str, "str | tuple[str, ...]"]  # by key: one text, or several of which one is picked

# Text fields of img2dataset's records that describe the image file rather than what it shows.
NOT_CAPTIONS = frozenset(
    ("url", "key", "status", "error_message", "exif", "sha256", "sha512", "md5", "license", "uid", "id", "__key__", "__url__")
)


def check_choices(choices: Choices, argument: str) -> None:
    """Raise ValueError unless there is a key and all probabilities are >= 0 and not all zero."""
    if not choices or any(p < 0 for _, p in choices) or not sum(p for _, p in choices):
        raise ValueError(f"{argument}: got {choices!r}; it takes (key, probability) pairs, not all of probability 0")


def pick_caption(captions: Captions, choices: Choices, u: float) -> str | None:
    """The caption under one of the keys, by probability; u in [0, 1) decides. None if the sample has none of the keys.

    Keys that this sample lacks (or has blank) are left out and the rest renormalised. Several texts under one key are equally
    likely.
    """
    present = [(texts, p) for key, p in choices if p > 0 and (texts := texts_under(captions, key))]
    if not present:
        return None
    mark = u * sum(p for _, p in present)
    for texts, p in present:
        mark -= p
        if mark < 0:
            return texts[min(int((mark + p) / p * len(texts)), len(texts) - 1)]
    return present[-1][0][-1]


def texts_under(captions: Captions, key: str) -> tuple[str, ...]:
    """All texts under a key that are not blank."""
    value = captions.get(key, ())
    return tuple(text for text in ((value,) if isinstance(value, str) else value) if not is_blank(text))


def read_captions(fields: Mapping[str, Any], captions: dict[str, str | tuple[str, ...]], refused: dict[str, str]) -> None:
    """Add every caption among the fields to `captions`, and to `refused` the kind of every field that is not a caption."""
    for key, value in fields.items():
        texts = [well_formed(text) for text in (value if isinstance(value, list | tuple) else [value]) if isinstance(text, str)]
        texts = [text for text in texts if not is_blank(text)]
        if texts:
            captions[key] = texts[0] if len(texts) == 1 else tuple(texts)
            refused.pop(key, None)
        elif key not in captions:
            refused[key] = _kind(value)


def read_record(record: Mapping[str, Any], captions: dict[str, str | tuple[str, ...]], refused: dict[str, str]) -> None:
    """The captions in a sample's JSON object: its fields by name, and those of the object under "captions".

    A text or list under "captions" is the caption `captions`, and also `caption` unless there is such a field.
    """
    inner = record.get("captions")
    fields = {key: value for key, value in record.items() if key not in NOT_CAPTIONS and key != "meta"}
    if isinstance(inner, dict):
        del fields["captions"]
        read_captions(fields, captions, refused)
        read_captions(inner, captions, refused)
    else:
        read_captions(fields, captions, refused)
        if "captions" in captions:
            captions.setdefault("caption", captions["captions"])


def is_blank(text: str) -> bool:
    """Whether nothing in it is visible: only spaces, control characters and zero-width characters."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def well_formed(text: str) -> str:
    """The text without lone surrogates, which JSON allows and no encoding can represent."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def text_of_bytes(data: bytes) -> str:
    """A text file: UTF-8, or UTF-16 if its byte order mark says so; ill-formed sequences become U+FFFD."""
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if utf16 else "utf-8-sig", "replace")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "blank"
    if isinstance(value, list | tuple):
        return "a list without text"
    return f"no text but {type(value).__name__}"


def sidecar(shard: str | Path) -> Path:
    """Path of a shard's joined captions: 00000.tar -> 00000.captions.json."""
    return Path(shard).with_suffix(".captions.json")


def __getattr__(name: str):
    if name == "join_captions":  # its home up to 0.1.0; imported when asked for, so that this file stays a leaf
        return import_module("ov3fast.data.recap").join_captions
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
