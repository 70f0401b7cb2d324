"""vLLM's endpoint plugin: scores over HTTP, for ``vllm serve``."""

from __future__ import annotations

import math
import os
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel, Field

from pyqe_vllm.client import default_signals


class Wanted(BaseModel):
    """A finished request: its ``vllm_xargs["pyqe"]`` and the ``token_ids`` of its answer."""

    key: str = Field(min_length=1, max_length=128)
    token_ids: list[int] = Field(max_length=1_000_000)


class ScoresEndpoint:
    """``POST /v1/plugins/pyqe/scores``; the head is the folder that the environment's ``PYQE_HEAD`` names.

    Below ``/v1``, as vLLM's ``--api-key`` guards nothing else.
    """

    name = "pyqe"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route."""

        @app.post("/v1/plugins/pyqe/scores")
        async def scores(wanted: Wanted, request: Request) -> dict[str, list[float | None]]:
            engine = request.app.state.pyqe_engine
            ((answer,),) = await engine.collective_rpc("pyqe_scores", args=([(wanted.key, wanted.token_ids)],))
            if "error" in answer:
                raise HTTPException(404, answer["error"])
            return {
                f"token_{signal}": [None if math.isnan(value) else value for value in values]
                for signal, values in answer.items()
            }

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Load the head into the engine."""
        head = os.environ.get("PYQE_HEAD")
        await engine_client.collective_rpc("pyqe_attach", args=(head, default_signals(head)))
        state.pyqe_engine = engine_client
