"""ov3fast serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ov3fast.cli.options import ModelOptions, parse


@dataclass(kw_only=True)
class Serve(ModelOptions):
    """Serve a model over HTTP: /encode, /reconstruct, /caption, /similarity, a page at / and the API description at /docs. On SIGTERM the server finishes
    requests in flight, then exits. If OV3FAST_API_KEY is set, every request must carry that key. MODEL may also be a released vision tower's folder."""

    host: str = "127.0.0.1"
    """Address to listen on; the default accepts local connections only."""
    port: int = 8000
    """0 picks a free port."""
    max_batch: int = 32
    """Largest batch."""
    max_wait_ms: float = 5.0
    """How long an image may wait for its batch to fill."""
    threads: int | None = None
    """Threads of the model; default: PyTorch's."""
    decoders: int = 2
    """Threads for decoding images."""
    texts: Path | None = None
    """File of texts, one per line, that /similarity uses if a request has none."""
    url_hosts: tuple[str, ...] = ()
    """Hosts that images may be fetched from by URL; default: none."""
    max_image_mb: float = 20.0
    """Largest image file."""
    max_request_mb: float = 64.0
    """Largest request body."""
    max_megapixels: float = 32.0
    """Largest image, checked before decoding."""
    max_frames: int = 64
    """Most frames in an animation, of which the first is used."""
    max_images: int = 64
    """Most images in one request."""
    max_queue: int = 512
    """Most images waiting; beyond that the answer is 503 with Retry-After. One client may fill half of the queue (429)."""
    drain_seconds: float = 30.0
    """How long requests in flight may take after SIGTERM."""


def run(arguments: list[str]) -> int:
    given = parse(Serve, arguments, "serve")
    if not 0 <= given.port < 1 << 16:
        raise ValueError(f"serve: port must be in 0..65535, got {given.port}")
    texts = read_texts(given.texts) if given.texts is not None else ()
    import torch

    from ov3fast.inference import load_model
    from ov3fast.serving.options import MIB, Limits, Options, key_of_environment
    from ov3fast.serving.server import serve

    options = Options(
        max_batch=given.max_batch,
        max_wait_ms=given.max_wait_ms,
        decoders=given.decoders,
        url_hosts=given.url_hosts,
        texts=texts,
        api_key=key_of_environment(),
        limits=Limits(
            max_image_bytes=int(given.max_image_mb * MIB),
            max_request_bytes=int(given.max_request_mb * MIB),
            max_pixels=int(given.max_megapixels * MIB),
            max_frames=given.max_frames,
            max_images=given.max_images,
            max_queue=given.max_queue,
        ),
    )
    if given.threads is not None:
        if given.threads < 1:
            raise ValueError(f"serve: threads must be at least 1, got {given.threads}")
        torch.set_num_threads(given.threads)
    model = load_model(given.model, vae=given.vae, device=given.device)
    serve(
        model, options, host=given.host, port=given.port, name=given.model, drain_seconds=given.drain_seconds,
        listening=lambda url: print(f"{given.model} at {url}", flush=True),
    )  # fmt: skip
    return 0


def read_texts(path: Path) -> tuple[str, ...]:
    """The file's non-blank lines. Raises ValueError if there are none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"serve: --texts {path} is not UTF-8 ({error.reason} at byte {error.start})") from None
    texts = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not texts:
        raise ValueError(f"serve: --texts {path} has no text in it")
    return texts
