"""Code in Markdown pages."""

from __future__ import annotations

import re


def code_blocks(page: str, language: str) -> list[str]:
    """Code blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)
