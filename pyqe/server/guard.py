"""What stands before the routes: the key, limits of bodies, and the count of requests."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pyqe.server.errors import ApiError, ServerError
from pyqe.server.limits import Limits
from pyqe.server.metrics import Metrics
from pyqe.server.responses import JsonResponse

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("pyqe.server")

_ABANDONED = 499  # as nginx says it, where there was nobody to answer


class Guard:
    """ASGI middleware that reads a request's body, within its limits, before the application sees the request.

    Args:
        app: the application.
        limits: of bodies.
        metrics: to count requests with.
        api_key: that requests below /v1 must bring, or None.
    """

    def __init__(self, app: App, limits: Limits, metrics: Metrics, api_key: str | None) -> None:
        self.app = app
        self.limits = limits
        self.metrics = metrics
        self.api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), _ABANDONED

        async def counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._admit(scope, receive, counted)
        except Exception as error:  # whatever it is, the client gets an answer it can read
            logger.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            if status == _ABANDONED:
                await JsonResponse(ServerError().to_dict(), 500)(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # what anybody may make up is no label
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - start)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check_key(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            await JsonResponse(error.to_dict(), error.status, error.headers)(scope, receive, send)
            return
        if body is None:
            return
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, replay, send)

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # as the router has it
        if self.api_key is None or not path.startswith("/v1"):
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, f"Bearer {self.api_key}".encode()):
            headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
            raise ApiError(401, "wrong or missing API key", code="invalid_api_key", headers=headers)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The request's body, or None where the client has gone."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.limits.body_bytes:
            raise self._too_large()
        body = bytearray()

        async def read() -> bytes | None:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body.extend(message.get("body", b""))
                more = message.get("more_body", False)
                if len(body) > self.limits.body_bytes:
                    raise self._too_large()
            return bytes(body)

        try:
            return await asyncio.wait_for(read(), self.limits.body_seconds)
        except asyncio.TimeoutError as error:
            message = f"the request did not arrive within {self.limits.body_seconds:g} seconds"
            raise ApiError(408, message, headers={"Connection": "close"}) from error

    def _too_large(self) -> ApiError:
        message = f"the request is larger than {self.limits.body_bytes} bytes"
        return ApiError(413, message, headers={"Connection": "close"})
