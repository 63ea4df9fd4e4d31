"""Refusals: error responses to clients."""

from __future__ import annotations

from typing import Any

from ov3fast.data.images import ImageError

STATUS = {"too_large": 413, "too_many_frames": 413, "unsupported_format": 415}
"""Reason of an ImageError -> status; all others are 422."""


class Refusal(Exception):
    """The response's status and headers; code is a word for programs to compare, the message one line for people."""

    def __init__(self, status: int, code: str, message: str, *, retry_after: float | None = None, **details: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.details = status, code, details
        self.headers = {} if retry_after is None else {"Retry-After": str(max(1, round(retry_after)))}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        return {"error": {"code": self.code, "message": str(self), **self.details}}


def of_image(error: ImageError, number: int, name: str) -> Refusal:
    """number, name: identify the request's image."""
    called = f"image {number}" + (f" ({name})" if name else "")
    return Refusal(STATUS.get(error.reason, 422), error.reason, f"{called}: {error}", image=number)
