"""What the server takes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """How much of everything; what goes beyond is refused.

    A row is one answer to write (a prompt with ``n: 3`` has three) or one text to score.

    Attributes:
        batch_size: rows that the model works on at a time.
        batch_tokens: tokens of a batch, padding and the answers' longest possible lengths included; no row is longer.
        queue_size: rows that wait for the model.
        rows: rows of one request.
        max_tokens: tokens of one answer.
        body_bytes: of one request.
        body_seconds: in which a request's body has to arrive.
        seconds: in which a request has to be answered, waiting included.
    """

    batch_size: int = 16
    batch_tokens: int = 16384
    queue_size: int = 256
    rows: int = 32
    max_tokens: int = 1024
    body_bytes: int = 2**18  # a second of some tokenizers
    body_seconds: float = 10.0
    seconds: float = 300.0
