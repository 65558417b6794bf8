"""Text that UTF-8 and tokenizers take."""

from __future__ import annotations


def whole_text(text: str) -> str:
    """`text` with U+FFFD in place of every half of a surrogate pair; halves that belong together become their character."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
