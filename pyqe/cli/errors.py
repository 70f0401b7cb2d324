"""Errors that end a command with one line."""

from __future__ import annotations

EXPECTED_ERRORS = (OSError, ValueError, TypeError, RuntimeError, LookupError, ImportError, MemoryError)


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks; its name if it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
