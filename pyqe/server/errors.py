"""Errors as OpenAI's clients know them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: of HTTP.
        message: what is wrong.
        param: the option that is wrong.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers

    def to_dict(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class QueueFullError(ApiError):
    """There is no room for a request's rows."""

    def __init__(self) -> None:
        super().__init__(429, "too many requests wait already; try again later", headers={"Retry-After": "1"})


class ClosedError(ApiError):
    """The server stops."""

    def __init__(self) -> None:
        super().__init__(503, "the server is shutting down")


class ServerError(ApiError):
    """Something failed; the log says what."""

    def __init__(self) -> None:
        super().__init__(500, "the server failed; its log says more")
