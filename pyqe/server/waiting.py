"""A request's side of the engine: its rows' news in the event loop, its deadline, and the client that may go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from pyqe.server.errors import ApiError
from pyqe.server.rows import Row


class Deadline:
    """When a request that comes now has to be answered: ``time``, by the clock of the event loop."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.time = asyncio.get_running_loop().time() + seconds


class Answers:
    """News of a request's rows, from the engine's thread, until all are done.

    What ends the wait comes the same way as an exception: the engine's failure, the deadline, the client's leaving.

    Args:
        rows: not submitted yet.
        deadline: by the clock of the event loop.
    """

    def __init__(self, rows: Sequence[Row], deadline: Deadline) -> None:
        self._rows = rows
        self._news: asyncio.Queue[Any] = asyncio.Queue()
        self._deadline = deadline
        loop = asyncio.get_running_loop()

        def report(item: Any) -> None:
            with suppress(RuntimeError):  # of a loop that is closed: nobody waits
                loop.call_soon_threadsafe(self._news.put_nowait, item)

        for row in rows:
            row.report = report

    async def news(self) -> AsyncGenerator[Any, None]:
        """What the rows report.

        Raises:
            ApiError: it came to nothing.
        """
        late = ApiError(504, f"no complete answer within {self._deadline.seconds:g} seconds")
        alarm = asyncio.get_running_loop().call_at(self._deadline.time, self._news.put_nowait, late)
        waiting = len(self._rows)
        try:
            while waiting:
                item = await self._news.get()
                if isinstance(item, ApiError):
                    raise item
                waiting -= item.is_last
                yield item
        finally:
            alarm.cancel()
            self.cancel()

    def cancel(self) -> None:
        """Nobody waits any more; rows that are done do not mind."""
        for row in self._rows:
            row.cancelled = True

    async def all(self, receive: Callable[[], Awaitable[Any]]) -> list[Any]:
        """All news, unless the client goes.

        Args:
            receive: of ASGI, after the request's body.

        Raises:
            ApiError: it came to nothing.
        """

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._news.put_nowait(ApiError(499, "the client has gone"))

        watcher = asyncio.create_task(watch())
        try:
            return [item async for item in self.news()]
        finally:
            watcher.cancel()
