"""The web application: endpoints over a Service.

app = create_app(load_model("runs/demo"))       # an ASGI application; `ov3fast serve` runs it in uvicorn
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from importlib import resources
from typing import Annotated, Any, Literal

import torch
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.responses import HTMLResponse, JSONResponse, Response

import ov3fast
from ov3fast.inference.encode import about
from ov3fast.inference.load import VisionTower
from ov3fast.inference.similarity import cosines
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.serving import answers, metrics
from ov3fast.serving.answers import JSON, NPY, PNG, SAFETENSORS, Answer
from ov3fast.serving.errors import Refusal
from ov3fast.serving.intake import Sent
from ov3fast.serving.options import Options
from ov3fast.serving.service import Service

Size = Annotated[int | None, Query(description="Side in pixels to which images are resized and cropped; default: the model's.")]
Encoding = Annotated[
    Literal["list", "base64"], Query(description="How arrays are encoded in JSON: numbers, or little-endian bytes in base64.")
]


def create_app(model: OpenVision3 | VisionTower, options: Options | None = None, *, name: str = "") -> FastAPI:
    """An ASGI application for a model in eval mode; its lifespan warms the model up and stops its threads. name: the model's, for /ready."""
    service = Service(model, options or Options())

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(service.start())
        yield
        await asyncio.wait({starting})
        await service.stop()

    app = FastAPI(
        title="ov3fast", version=ov3fast.__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="OpenVision 3: images to vectors, tokens, reconstructions and captions.",
    )  # fmt: skip
    app.state.service = service

    @app.exception_handler(RequestValidationError)
    async def bad_parameter(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        message = f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}; got {str(first.get('input'))[:100]!r}"
        return await service.refuse(request, Refusal(422, "bad_parameter", message))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        """Its traceback goes to standard error, not to the client."""
        service.metrics.refused.labels("internal").inc()
        return JSONResponse({"error": {"code": "internal", "message": f"the server failed ({type(error).__name__})"}}, 500)

    @app.post("/encode", responses=_answers(JSON, NPY, SAFETENSORS), openapi_extra=_BODY)
    async def encode(
        request: Request, size: Size = None, output: Literal["pooled", "tokens", "both"] = "pooled", encoding: Encoding = "list"
    ) -> Response:
        """Pooled vectors [E] and tokens [N, D] of images. As .safetensors, the response is a file that `ov3fast search` reads."""

        async def work(sent: Sent) -> Answer:
            side, kind = service.image_size(size), answers.negotiate(_accept(request), (JSON, NPY, SAFETENSORS))
            if kind == NPY and output == "both":
                raise Refusal(406, "not_acceptable", "a .npy file holds one array; ask for output=pooled or tokens")
            rows = await service.run(request, "encode", side, sent, side)
            return await asyncio.to_thread(make, sent, rows, side, kind)

        def make(sent: Sent, rows: list[Any], side: int, kind: str) -> Answer:
            wanted = ("pooled", "tokens") if output == "both" else (output,)
            if kind == JSON:
                images = [
                    {"name": name, **{field: answers.values(getattr(row, field), encoding) for field in wanted}}
                    for (name, _), row in zip(sent.images, rows, strict=True)
                ]
                return answers.as_json({"image_size": side, "images": images})
            arrays = {field: torch.stack([getattr(row, field) for row in rows]) for field in wanted}
            if kind == NPY:
                return answers.as_npy(arrays[wanted[0]])
            arrays["pooled"] = torch.stack([row.pooled for row in rows])
            words = {"names": json.dumps(_unique([name for name, _ in sent.images])), "skipped": "{}", **about(model, side)}
            return answers.as_safetensors(arrays, words)

        return await service.respond(request, work, "encode")

    @app.post("/reconstruct", responses=_answers(JSON, PNG, NPY, SAFETENSORS), openapi_extra=_BODY)
    async def reconstruct(
        request: Request, size: Size = None, view: Literal["reconstruction", "side_by_side"] = "reconstruction"
    ) -> Response:
        """Images through the encoder and both decoders, with PSNR in dB. side_by_side: original, reconstruction and four times their
        difference in one picture."""

        async def work(sent: Sent) -> Answer:
            side, kind = service.image_size(size), answers.negotiate(_accept(request), (JSON, PNG, NPY, SAFETENSORS))
            if kind == PNG and len(sent.images) > 1:
                raise Refusal(
                    406, "not_acceptable", f"a PNG file holds one image, but the request has {len(sent.images)}; use JSON"
                )
            rows = await service.run(request, "reconstruct", side, sent, side)
            return await asyncio.to_thread(make, sent, rows, side, kind)

        def make(sent: Sent, rows: list[Any], side: int, kind: str) -> Answer:
            if kind in (NPY, SAFETENSORS):
                fields = ("reconstruction",) if kind == NPY else ("reconstruction", "original", "vae")
                arrays = {field: torch.stack([getattr(row, field) for row in rows]) for field in fields}
                words = {"names": json.dumps([name for name, _ in sent.images])}
                return answers.as_npy(arrays["reconstruction"]) if kind == NPY else answers.as_safetensors(arrays, words)
            pictures = [answers.png(row.side_by_side() if view == "side_by_side" else row.image()) for row in rows]
            if kind == PNG:
                return Answer(pictures[0], PNG)
            images = [
                {"name": name, "psnr": answers.finite(row.psnr), "vae_psnr": answers.finite(row.vae_psnr), "png": answers.base64_of(picture)}
                for (name, _), row, picture in zip(sent.images, rows, pictures, strict=True)
            ]  # fmt: skip
            return answers.as_json({"image_size": side, "images": images})

        return await service.respond(request, work, "reconstruct")

    @app.post("/caption", responses=_answers(JSON), openapi_extra=_BODY)
    async def caption(request: Request, size: Size = None, beams: int = 3) -> Response:
        """A caption for each image. beams: 1 is greedy."""

        async def work(sent: Sent) -> Answer:
            side, _ = service.image_size(size), answers.negotiate(_accept(request), (JSON,))
            if not 1 <= beams <= service.limits.max_beams:
                raise Refusal(422, "bad_parameter", f"beams must be in 1..{service.limits.max_beams}, got {beams}")
            rows = await service.run(request, "caption", (side, beams), sent, side)
            images = [{"name": name, "caption": row} for (name, _), row in zip(sent.images, rows, strict=True)]
            return answers.as_json({"image_size": side, "images": images})

        return await service.respond(request, work, "caption")

    @app.post("/similarity", responses=_answers(JSON, NPY, SAFETENSORS), openapi_extra=_BODY)
    async def similarity(request: Request, size: Size = None, top: int = 5, encoding: Encoding = "list") -> Response:
        """The cosine similarity of each image and each text [images, texts], and the `top` nearest texts of each image. Texts are in the fields
        `text` or in JSON's `texts`; the default is the texts that the server was started with."""

        async def work(sent: Sent) -> Answer:
            side, kind = service.image_size(size), answers.negotiate(_accept(request), (JSON, NPY, SAFETENSORS))
            texts = sent.texts or list(service.options.texts)
            if not texts:
                raise Refusal(400, "no_text", 'the request has no texts; send them in fields "text"')
            rows = await service.run(request, "encode", side, sent, side)
            features = await service.texts(request, texts)
            return await asyncio.to_thread(make, sent, rows, texts, features, side, kind)

        def make(sent: Sent, rows: list[Any], texts: list[str], features: list[torch.Tensor], side: int, kind: str) -> Answer:
            scores = cosines(torch.stack([row.pooled for row in rows]), torch.stack(features))
            if kind == NPY:
                return answers.as_npy(scores)
            names = [name for name, _ in sent.images]
            if kind == SAFETENSORS:
                return answers.as_safetensors({"scores": scores}, {"names": json.dumps(names), "texts": json.dumps(texts)})
            images = []
            for name, row in zip(names, scores, strict=True):
                order = torch.sort(row, descending=True, stable=True).indices[: max(top, 0)].tolist()
                nearest = [{"text": texts[i], "score": row[i].item()} for i in order]
                images.append({"name": name, "scores": answers.values(row, encoding), "nearest": nearest})
            return answers.as_json({"image_size": side, "texts": texts, "images": images})

        return await service.respond(request, work, "text")

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Liveness. 500 if the model could not be warmed up."""
        if service.failure:
            return JSONResponse({"status": "failed", "reason": service.failure}, 500)  # type: ignore[return-value]
        return {"status": "ok", "version": ov3fast.__version__}

    @app.get("/ready")
    async def ready() -> Response:
        """Readiness: 503 while the model warms up and while the server drains."""
        state = "draining" if service.draining else "ready" if service.ready else "starting"
        found = {
            "status": state, "model": name, "image_size": service.jobs.default_size, "jobs": service.jobs.names,
            "batch_sizes": service.jobs.proven_sizes(), "texts": len(service.options.texts),
        }  # fmt: skip
        return JSONResponse(found, 200 if state == "ready" else 503)

    @app.get("/metrics")
    async def prometheus(request: Request) -> Response:
        """Counters, latencies and batch sizes in Prometheus' text format."""
        try:
            service.admit(request)
        except Refusal as refusal:
            return await service.refuse(request, refusal)
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)

    for path, file in {"/": "index.html", "/docs": "docs.html"}.items():
        page = (resources.files("ov3fast") / "assets" / "serve" / file).read_text(encoding="utf-8")
        app.get(path, include_in_schema=False, response_class=HTMLResponse)(
            lambda page=page: HTMLResponse(page, headers=_PAGE_HEADERS)
        )
    return app


_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "image": {"type": "array", "items": {"type": "string", "format": "binary"}},
                        "text": {"type": "array", "items": {"type": "string"}},
                    },
                }
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "images": {"type": "array", "items": {"type": "string", "format": "byte"}},
                        "texts": {"type": "array", "items": {"type": "string"}},
                    },
                }
            },
            "image/*": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_REFUSALS = {
    400: "Not a request: no image, broken multipart, JSON or base64",
    401: "A wrong key",
    406: "No acceptable media type",
    408: "The body arrived too slowly",
    413: "Over a limit of bytes, pixels, frames or items",
    415: "Unsupported format",
    422: "An image that can't be read, or a wrong parameter",
    429: "Your share of the queue is full: see Retry-After",
    503: "The queue is full, or the model is not ready: see Retry-After",
}


def _answers(*kinds: str) -> dict[int | str, dict[str, Any]]:
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"description": words, "content": {JSON: {}}} for status, words in _REFUSALS.items()
    }
    return {200: {"description": "By Accept", "content": {kind: {} for kind in kinds}}, **refusals}


def _accept(request: Request) -> str:
    return request.headers.get("accept", "*/*")


def _unique(names: list[str]) -> list[str]:
    """Names for an index: missing and duplicate ones become numbers."""
    return [name if name and names.count(name) == 1 else f"{number}" for number, name in enumerate(names)]
