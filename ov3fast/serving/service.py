"""Shared by the endpoints: requests through the decoders and the model's thread, and refusals."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from ov3fast.data.images import ImageError
from ov3fast.inference.load import VisionTower
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.serving.answers import Answer
from ov3fast.serving.batching import Batcher, Closed, Full
from ov3fast.serving.errors import Refusal, of_image
from ov3fast.serving.intake import Body, Budget, Sent, discard, receive
from ov3fast.serving.jobs import Jobs, prepare
from ov3fast.serving.metrics import Metrics
from ov3fast.serving.options import Options

CLIENT_LEFT = 499
"""Status in the metrics for a request whose client left; it is never sent."""
KEPT_TEXTS = 4096


class Service:
    """One model behind a queue. `start` warms it up in the background; until that is done, requests are refused with 503."""

    def __init__(self, model: OpenVision3 | VisionTower, options: Options) -> None:
        self.options, self.limits = options, options.limits
        self.metrics, self.budget = Metrics(), Budget(options.limits.max_received_bytes)
        self.jobs = Jobs(model, options.max_batch)
        self.decoders = ThreadPoolExecutor(options.decoders, "ov3fast-decode")
        self.batcher: Batcher | None = None
        self.ready, self.draining, self.failure = False, False, ""
        self._texts: OrderedDict[str, Tensor] = OrderedDict()
        self.metrics.watch("queue_length", "Waiting images and texts.", lambda: self.batcher.waiting if self.batcher else 0)
        self.metrics.watch("received_bytes", "Of request bodies in memory.", lambda: self.budget.used)
        self.metrics.watch("ready", "Whether requests are accepted.", lambda: float(self.ready and not self.draining))

    async def start(self) -> None:
        try:
            await asyncio.to_thread(self.jobs.warm_up)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            raise
        self.batcher = Batcher(
            self.jobs.runs(),
            max_batch=self.jobs.max_batch,
            max_wait=self.options.max_wait_ms / 1000,
            max_queue=self.limits.max_queue,
            client_queue=self.limits.client_queue,
            done=self._ran,
        )
        self.ready = True

    async def stop(self) -> None:
        """Runs the waiting items, then stops the threads."""
        self.draining = True
        if self.batcher is not None:
            await asyncio.to_thread(self.batcher.close)
        self.decoders.shutdown(cancel_futures=True)

    # A request

    async def respond(self, request: Request, work: Callable[[Sent], Awaitable[Answer]], job: str) -> Response:
        """Receives the body and responds with the result of `work`, or with a refusal."""
        body = Body(request, self.limits, self.budget)
        began = time.monotonic()
        response: Response
        try:
            self.admit(request, job)
            answer = await work(await receive(body, self.options))
            response = Response(answer.body, media_type=answer.media_type)
        except Refusal as refusal:
            response = await self.refuse(request, refusal)
        except Full as full:
            code, whose = (429, "your share of the queue") if full.client else (503, "the queue")
            message = f"{whose} is full; try again after the seconds in Retry-After"
            response = await self.refuse(request, Refusal(code, "overloaded", message, retry_after=full.retry_after))
        except Closed:
            response = await self.refuse(request, Refusal(503, "draining", "the server is shutting down", retry_after=5))
        except ClientDisconnect:
            self.metrics.disconnected.inc()
            response = Response(status_code=CLIENT_LEFT)
        finally:
            body.close()
        self.metrics.requests.labels(request.url.path, response.status_code).inc()
        self.metrics.seconds.labels(request.url.path).observe(time.monotonic() - began)
        return response

    def admit(self, request: Request, job: str = "") -> None:
        """Refusal for a wrong key, while the model is not ready, and for unsupported calls."""
        if (key := self.options.api_key) is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            given = given.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
            if not hmac.compare_digest(given.encode(), key.encode()):
                raise Refusal(401, "unauthorized", "send the server's key as `Authorization: Bearer KEY` or `X-API-Key: KEY`")
        if job and not self.ready:
            raise Refusal(503, "not_ready", "the model is warming up", retry_after=2)
        if job and job not in self.jobs.names:
            raise Refusal(
                501,
                "not_supported",
                "this model is a released vision tower: it encodes, and has neither a decoder nor a text encoder",
            )

    async def refuse(self, request: Request, refusal: Refusal) -> Response:
        self.metrics.refused.labels(refusal.code).inc()
        await discard(request)
        return JSONResponse(refusal.body(), refusal.status, refusal.headers)

    def image_size(self, size: int | None) -> int:
        """The side in pixels of a request's `size`."""
        size = self.jobs.default_size if size is None else size
        if size < self.jobs.stride or size % self.jobs.stride or size > self.limits.max_size:
            raise Refusal(
                422,
                "bad_parameter",
                f"size must be a multiple of {self.jobs.stride} pixels, at most {self.limits.max_size}; got {size}",
            )
        return size

    async def run(self, request: Request, job: str, bucket: Hashable, sent: Sent, size: int) -> list[Any]:
        """One result per image of the request."""
        if not sent.images:
            raise Refusal(400, "no_image", 'the request has no image; send a file in the field "image", or base64')
        assert self.batcher is not None
        client = self.client(request)
        self.batcher.check_room(len(sent.images), client)
        pictures = await self._decoded(sent, size)
        sent.images = [(name, b"") for name, _ in sent.images]
        return await self._wait(request, self.batcher.submit(job, bucket, pictures, client))

    async def texts(self, request: Request, texts: Sequence[str]) -> list[Tensor]:
        """The feature [E] of each text, with a cache of recent ones."""
        assert self.batcher is not None
        known = {text: self._texts[text] for text in texts if text in self._texts}
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            found = await self._wait(request, self.batcher.submit("text", None, new, self.client(request)))
            known |= zip(new, found, strict=True)
        for text, feature in known.items():
            self._texts[text] = feature.clone()  # a copy: a view would keep the whole batch alive
            self._texts.move_to_end(text)
        while len(self._texts) > KEPT_TEXTS:
            self._texts.popitem(last=False)
        return [known[text] for text in texts]

    @staticmethod
    def client(request: Request) -> str:
        return request.client.host if request.client else ""

    async def _decoded(self, sent: Sent, size: int) -> list[Tensor]:
        loop = asyncio.get_running_loop()
        tasks = [loop.run_in_executor(self.decoders, partial(prepare, data, size, self.limits)) for _, data in sent.images]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        for number, (picture, (name, _)) in enumerate(zip(found, sent.images, strict=True), 1):
            if isinstance(picture, ImageError):
                raise of_image(picture, number, name)
            if isinstance(picture, BaseException):
                raise picture
        return found  # type: ignore[return-value]

    async def _wait(self, request: Request, futures: Sequence[Future]) -> list[Any]:
        """The futures' results, or ClientDisconnect as soon as the client leaves; its waiting items are then dropped."""
        leaving = asyncio.ensure_future(_gone(request))
        results = asyncio.gather(*map(asyncio.wrap_future, futures))
        results.add_done_callback(
            lambda done: done.cancelled() or done.exception()
        )  # otherwise asyncio complains about an exception that was never retrieved
        try:
            both: set[asyncio.Future[Any]] = {leaving, results}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not results.done():
                raise ClientDisconnect
            return results.result()
        except ValueError as error:
            raise Refusal(422, "bad_request", str(error)) from None
        finally:
            results.cancel()
            leaving.cancel()

    def _ran(self, job: str, size: int, seconds: float) -> None:
        self.metrics.items.labels(job).inc(size)
        self.metrics.batch.labels(job).observe(size)
        self.metrics.model_seconds.labels(job).inc(seconds)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
