"""Runs the application in uvicorn: one process, with timeouts that uvicorn lacks, draining on SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import socket
import warnings
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ov3fast.inference.load import VisionTower
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.serving.app import create_app
from ov3fast.serving.options import API_KEY, Options

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    model: OpenVision3 | VisionTower,
    options: Options,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str = "",
    drain_seconds: float = 30.0,
    listening: Callable[[str], None] = lambda url: None,
) -> None:
    """Serves until SIGTERM or Ctrl-C, then finishes requests in flight, for at most drain_seconds.

    port: 0 picks a free one. listening: called with the address once connections are accepted. OSError if the address can't be bound.
    """
    if host not in LOOPBACK and options.api_key is None:
        warnings.warn(f"anyone who can reach {host}:{port} can use the model: {API_KEY} is not set", stacklevel=2)
    with _bound(host, port) as listener:
        port = listener.getsockname()[1]
        server = _Server(create_app(model, options, name=name), options, drain_seconds)
        server.on_start = lambda: listening(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises the signal again after draining
        try:
            server.run([listener])
        finally:
            signal.signal(signal.SIGTERM, before)


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise OSError(getattr(error, "errno", None), f"serve: can't listen on {host}:{port} ({error})") from None


class _Server(uvicorn.Server):
    def __init__(self, app: FastAPI, options: Options, drain_seconds: float) -> None:
        limits = options.limits

        class Protocol(_TimedProtocol):
            head_seconds = limits.receive_seconds

        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                lifespan="on",
                log_level="error",  # one warning per malformed request would let anyone fill the log
                access_log=False,
                server_header=False,
                limit_concurrency=limits.max_connections,
                timeout_graceful_shutdown=max(1, round(drain_seconds)),
                h11_max_incomplete_event_size=1 << 16,
            )
        )
        self.on_start: Callable[[], None] = lambda: None
        self.service = app.state.service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_start()

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.service.draining = True
        super().handle_exit(sig, frame)


class _TimedProtocol(H11Protocol):
    """uvicorn waits indefinitely for a request's head; this class closes the connection after head_seconds."""

    head_seconds = 30.0
    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        in_work = self.cycle is not None and not self.cycle.response_complete
        if in_work or self.transport.is_closing():
            self._unwatch()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(self.head_seconds, self.transport.close)

    def _unwatch(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
