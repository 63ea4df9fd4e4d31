"""A request's body -> image files and texts, within the limits: multipart, JSON with base64, or a single image file."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import urllib.parse
import urllib.request
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from ov3fast.serving.errors import Refusal
from ov3fast.serving.options import MIB, Limits, Options

RAW = ("image/", "application/octet-stream")
TAKES = (
    'multipart/form-data with fields "image", application/json with base64, or one image as image/* or application/octet-stream'
)
DISCARD = 4 * MIB
"""Bytes of a refused body that are read and discarded, so that clients that send everything before reading see the refusal."""


@dataclass
class Sent:
    """A request's contents: (name, bytes) of each image, and texts."""

    images: list[tuple[str, bytes]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)


class Budget:
    """Bytes in memory of all requests being served."""

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0

    def take(self, count: int) -> None:
        if self.used + count > self.most:
            raise Refusal(
                503, "overloaded", "the server has reached its limit of request bytes in memory; try again", retry_after=1
            )
        self.used += count


class Body:
    """A request's body, chunk by chunk; `close` returns its bytes to the budget."""

    def __init__(self, request: Request, limits: Limits, budget: Budget) -> None:
        self.request, self.limits, self.budget, self.size = request, limits, budget, 0

    async def stream(self) -> AsyncGenerator[bytes, None]:
        most = self.limits.max_request_bytes
        length = self.request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            raise _too_long(int(length), most)
        async for chunk in self.request.stream():
            if self.size + len(chunk) > most:
                raise _too_long(self.size + len(chunk), most)
            self.budget.take(len(chunk))
            self.size += len(chunk)
            yield chunk

    async def read(self) -> bytes:
        return b"".join([chunk async for chunk in self.stream()])

    def close(self) -> None:
        self.budget.used -= self.size
        self.size = 0


def _too_long(size: int, most: int) -> Refusal:
    return Refusal(413, "request_too_large", f"the body has at least {size} bytes, the limit is {most}")


async def receive(body: Body, options: Options) -> Sent:
    """Refusal for a malformed, too large or too slow request; ClientDisconnect if the client left."""
    seconds = options.limits.receive_seconds
    try:
        sent = await asyncio.wait_for(_parse(body), seconds)
    except asyncio.TimeoutError:
        raise Refusal(408, "too_slow", f"the body did not arrive within {seconds:g} s") from None
    if sent.urls:
        await _fetch_all(sent, options)
    _check(sent, options.limits)
    return sent


async def discard(request: Request) -> None:
    """Reads the rest of a refused body, up to a limit."""

    async def rest() -> None:
        left = DISCARD
        async for chunk in request.stream():
            left -= len(chunk)
            if left < 0:
                return

    with contextlib.suppress(asyncio.TimeoutError, ClientDisconnect, RuntimeError):  # RuntimeError: it was already read
        await asyncio.wait_for(rest(), 1)


async def _parse(body: Body) -> Sent:
    kind = body.request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _multipart(body)
    data = await body.read()
    if kind == "application/json":
        return await asyncio.to_thread(_json, data, body.limits)
    if not data:
        raise Refusal(400, "no_image", f"the body is empty; it takes {TAKES}")
    if kind.startswith(RAW):
        return Sent([("", data)])
    raise Refusal(415, "unsupported_media_type", f"the content type is {kind or 'missing'}; it takes {TAKES}")


async def _multipart(body: Body) -> Sent:
    limits, sent = body.limits, Sent()
    parser = MultiPartParser(
        body.request.headers, body.stream(), max_files=limits.max_images + 1, max_fields=limits.max_texts + limits.max_images + 2,
        max_part_size=max(4 * limits.max_text_length, 1 << 16),
    )  # fmt: skip
    parser.spool_max_size = limits.max_request_bytes  # in memory, where the budget counts them
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refusal(400, "bad_multipart", f"the body is not a multipart form: {error.message}") from None
    except (KeyError, UnicodeDecodeError, ValueError) as error:
        raise Refusal(400, "bad_multipart", f"the body is not a multipart form: {type(error).__name__} {error}") from None
    try:
        for name, value in form.multi_items():
            if name == "image" and not isinstance(value, str):
                sent.images.append((value.filename or "", await value.read()))
            elif name == "text" and isinstance(value, str):
                sent.texts.append(value)
            elif name == "url" and isinstance(value, str):
                sent.urls.append(value)
            else:
                raise Refusal(
                    400,
                    "unknown_field",
                    f"the form has a field {name[:80]!r}; it takes image (a file), text and url, each repeated",
                )
    finally:
        await form.close()
    return sent


def _json(data: bytes, limits: Limits) -> Sent:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "bad_json", f"the body is not JSON: {error}") from None
    fields = {"image", "images", "text", "texts", "url", "urls"}
    if not isinstance(found, dict) or not found.keys() <= fields:
        got = sorted(map(str, found.keys() - fields))[:3] if isinstance(found, dict) else type(found).__name__
        raise Refusal(400, "unknown_field", f"the body takes an object with {', '.join(sorted(fields))}; got {got}")
    images = [(name, _base64(text, number)) for number, (name, text) in enumerate(_images(found), 1)]
    return Sent(images, _strings(found, "text"), _strings(found, "url"))


def _images(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, base64) of each: a string, or an object {"name": ..., "data": ...}."""
    given = found.get("images", found.get("image", []))
    images = []
    for one in given if isinstance(given, list) else [given]:
        name, text = (one.get("name", ""), one.get("data")) if isinstance(one, dict) else ("", one)
        if not isinstance(text, str) or not isinstance(name, str):
            raise Refusal(400, "bad_json", "images must be base64 strings, or objects with name and data")
        images.append((name, text))
    return images


def _strings(found: dict[str, Any], name: str) -> list[str]:
    given = found.get(f"{name}s", found.get(name, []))
    values = given if isinstance(given, list) else [given]
    if not all(isinstance(value, str) for value in values):
        raise Refusal(400, "bad_json", f"{name}s must be strings")
    return values


def _base64(text: str, number: int) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, "bad_base64", f"image {number} is not base64: {error}", image=number) from None


def _check(sent: Sent, limits: Limits) -> None:
    if len(sent.images) > limits.max_images:
        raise Refusal(
            413, "too_many_images", f"{len(sent.images)} images or more in one request, the limit is {limits.max_images}"
        )
    if len(sent.texts) > limits.max_texts:
        raise Refusal(413, "too_many_texts", f"{len(sent.texts)} texts or more in one request, the limit is {limits.max_texts}")
    for number, text in enumerate(sent.texts, 1):
        if len(text) > limits.max_text_length:
            raise Refusal(
                413, "text_too_long", f"text {number} has {len(text)} characters, the limit is {limits.max_text_length}"
            )
    for number, (name, data) in enumerate(sent.images, 1):
        called = f"image {number}" + (f" ({name})" if name else "")
        if not data:
            raise Refusal(422, "empty_image", f"{called} has no bytes", image=number)
        if len(data) > limits.max_image_bytes:
            raise Refusal(
                413, "image_too_large", f"{called} has {len(data)} bytes, the limit is {limits.max_image_bytes}", image=number
            )


# ---- by URL ----------------------------------------------------------------------------------------------------------


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Never contacts a host other than the allowed ones."""

    def redirect_request(self, *_: Any) -> None:
        return None


async def _fetch_all(sent: Sent, options: Options) -> None:
    if not options.url_hosts:
        raise Refusal(400, "urls_off", "this server doesn't fetch images by URL; send the image itself")
    if len(sent.images) + len(sent.urls) > options.limits.max_images:
        raise Refusal(413, "too_many_images", f"more than {options.limits.max_images} images in one request")
    for url in sent.urls:
        sent.images.append((url, await asyncio.to_thread(_fetch, url, options)))


def _fetch(url: str, options: Options) -> bytes:
    try:
        parts = urllib.parse.urlsplit(url)
        host, scheme = parts.hostname, parts.scheme
    except ValueError:
        host = scheme = None
    if scheme not in ("http", "https") or host not in options.url_hosts:
        raise Refusal(
            400,
            "url_refused",
            f"images are fetched only over http and https from {', '.join(options.url_hosts)}; got {url[:200]!r}",
        )
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.HTTPHandler, urllib.request.HTTPSHandler, urllib.request.HTTPErrorProcessor,
        urllib.request.HTTPDefaultErrorHandler, _NoRedirects,
    ):  # fmt: skip
        opener.add_handler(handler())
    try:
        with opener.open(url, timeout=options.limits.receive_seconds) as answer:
            return answer.read(options.limits.max_image_bytes + 1)
    except (OSError, ValueError) as error:
        raise Refusal(422, "url_failed", f"{url[:200]!r} could not be fetched: {error}") from None
