"""What a tokenizer's chat template puts around the turns, found by rendering a conversation of place holders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

_MARKS = ("FIRSTTURN", "SECONDTURN", "THIRDTURN")


@dataclass(frozen=True)
class ChatFrame:
    """Token ids around the turns of a conversation.

    Attributes:
        opening: before the first user turn.
        answer: between a user turn and the answer.
        follow_up: between an answer and the next user turn.
    """

    opening: tuple[int, ...]
    answer: tuple[int, ...]
    follow_up: tuple[int, ...]


def chat_frame(tokenizer: Any) -> ChatFrame | None:
    """The frame of a tokenizer's chat template; None where it has none, or one that cannot be taken apart."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    first, second, third = _MARKS
    conversation = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": second},
        {"role": "user", "content": third},
    ]
    try:
        rendered = tokenizer.apply_chat_template(conversation, tokenize=False)
        asked = tokenizer.apply_chat_template(conversation[:1], tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError, KeyError):
        return None
    if any(rendered.count(mark) != 1 for mark in _MARKS) or asked.count(first) != 1:
        return None
    opening, rest = rendered.split(first)
    follow_up = rest.split(second)[1].split(third)[0]
    parts = (opening, asked.split(first)[1], follow_up)
    frame = ChatFrame(*(tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts))
    return frame if frame.answer and frame.follow_up else None
