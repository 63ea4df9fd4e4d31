"""A server's options and limits."""

from __future__ import annotations

import os
from dataclasses import dataclass

API_KEY = "OV3FAST_API_KEY"
MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Limits per request, per client and for all together; requests over a limit are refused with its name and value."""

    max_image_bytes: int = 20 * MIB
    max_request_bytes: int = 64 * MIB
    max_pixels: int = 32 * MIB
    """Of one image, checked before decoding."""
    max_frames: int = 64
    """Of an animation or a file of several pages, counted before decoding; the first frame is used."""
    max_images: int = 64
    """In one request."""
    max_texts: int = 256
    """In one request."""
    max_text_length: int = 2000
    """Characters of one text."""
    max_size: int = 1024
    """Pixels of `size`."""
    max_beams: int = 8
    receive_seconds: float = 30.0
    """Timeout for a request's head, and for its body."""
    max_queue: int = 512
    """Images and texts waiting for the model; beyond that, requests get 503 with Retry-After."""
    max_client_share: float = 0.5
    """Fraction of the queue that one client may fill; beyond that, its requests get 429 with Retry-After."""
    max_received_bytes: int = 512 * MIB
    """Of all requests in memory at the same time; beyond that, requests get 503."""
    max_connections: int = 512

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"serve: {name} must be positive, got {value}")

    @property
    def client_queue(self) -> int:
        return max(1, int(self.max_queue * self.max_client_share))


@dataclass(frozen=True)
class Options:
    """A server's batching, threads and access."""

    max_batch: int = 32
    max_wait_ms: float = 5.0
    """How long an image may wait for its batch to fill while the model is idle."""
    decoders: int = 2
    """Threads that decode images."""
    url_hosts: tuple[str, ...] = ()
    """Hosts from which images may be fetched; by default, images by URL are refused."""
    texts: tuple[str, ...] = ()
    """Default texts of /similarity."""
    api_key: str | None = None
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        for name in ("max_batch", "decoders"):
            if getattr(self, name) < 1:
                raise ValueError(f"serve: {name} must be at least 1, got {getattr(self, name)}")
        if not self.max_wait_ms >= 0:
            raise ValueError(f"serve: max_wait_ms must be at least 0, got {self.max_wait_ms}")


def key_of_environment() -> str | None:
    """OV3FAST_API_KEY; ValueError if it is set but empty, which would disable the check by mistake."""
    key = os.environ.get(API_KEY)
    if key is not None and not key.strip():
        raise ValueError(f"serve: {API_KEY} is set but empty; unset it, or set a key")
    return key
