"""What the demo scores: everyday English, some of it with a planted error in square brackets, and two prompts."""

from __future__ import annotations

import re

MARKED_SENTENCES = (
    "The library opens at nine in the morning and closes at six in the [banana].",
    "She poured a glass of water and drank it slowly.",
    "Paris is the capital of France, and Berlin is the capital of [Brazil].",
    "The children [was] playing in the garden when it started to rain.",
    "Water boils at one hundred degrees Celsius at sea level.",
    "He has lived in this city [since] ten years and knows every street.",
    "My grandmother taught me how to bake bread when I was a child.",
    "The train to London leaves from platform four in twenty [green] minutes.",
    "We should [of] left earlier, because the traffic is very heavy today.",
    "A triangle has three sides, and a square has [seven].",
    "Please close the window, it is getting cold in here.",
    "The doctor told him to take the medicine twice a day after meals.",
    "They [goes] to the market every Saturday to buy fresh vegetables.",
    "The moon orbits the Earth, and the Earth orbits the [kitchen].",
    "After the meeting we discussed the plan over a cup of coffee.",
    "I am looking forward to [meet] you next week in the office.",
)

CONTEXT = "Here are some sentences in English.\n"  # before each sentence, so that its first words are no surprise

PROMPTS = (
    "What is the capital of France, and what is it known for? Answer in two sentences.",
    "Name three fruits that are red.",
)


def unmark(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without its brackets, and the character spans that were inside them.

    Example:
        >>> unmark("a [b] c")
        ('a b c', [(2, 3)])
    """
    text, spans = "", []
    for i, part in enumerate(re.split(r"[\[\]]", marked)):
        if i % 2:
            spans.append((len(text), len(text) + len(part)))
        text += part
    return text, spans
