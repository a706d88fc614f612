"""Text of unknown origin, shown so that it can neither hide, reorder nor forge what stands around it."""

from __future__ import annotations

import unicodedata

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def visible(text: str, keep: str = "\n\t\u200d") -> str:
    """`text` with control characters, lone surrogates and the like spelled out: `⟨U+202E⟩`; those in `keep` stay."""
    return "".join(
        f"⟨U+{ord(character):04X}⟩"
        if character not in keep and unicodedata.category(character) in _HIDDEN
        else character
        for character in text
    )


def one_line(text: str, length: int = 500) -> str:
    """`visible` with the line breaks spelled out too, cut to `length` characters."""
    text = visible(text[: length + 1], keep="\u200d")
    return text if len(text) <= length else f"{text[:length]}..."
