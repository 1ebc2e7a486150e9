"""A text to calibrate on for those who bring none, and how passages of a text are picked."""

from typing import Any


def default_calibration_text() -> str:
    """English prose with code: the help topics that every CPython brings along (``pydoc_data.topics``)."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def calibration_tokens(tokenizer: Any, text: str, count: int) -> list[int]:
    """About ``count`` tokens in eight passages spread evenly over a text; all of a shorter text."""
    passages, characters = 8, 8  # a token of English or code has 3 to 5 characters
    size = count // passages
    starts = [i * max(0, len(text) - characters * size) // (passages - 1) for i in range(passages)]
    tokens = [tokenizer(text[start : start + characters * size])["input_ids"][:size] for start in starts]
    return [token for passage in tokens for token in passage]
