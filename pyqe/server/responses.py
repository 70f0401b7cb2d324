"""JSON of answers."""

from __future__ import annotations

import json
from typing import Any

from fastapi.responses import JSONResponse


def dumps(content: Any) -> str:
    """As JSON in ASCII, as a request may have named half of a surrogate pair, which UTF-8 cannot hold.

    Raises:
        ValueError: a NaN or an infinity in it.
    """
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


class JsonResponse(JSONResponse):
    """An answer in JSON."""

    def render(self, content: Any) -> bytes:
        return dumps(content).encode("ascii")
