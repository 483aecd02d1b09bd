"""Text of others, as it can be shown: what a reader would not see is written out."""

from __future__ import annotations

import re

UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ud800-\udfff\ufeff]"
)
"""Control characters, what turns the direction of text around, and halves of characters."""


def visible(text: str) -> str:
    r"""Return text in which everything can be seen, and that any output can take.

    >>> visible("a\x1b[31mb\u202ec\ud800")
    'a␛[31mb<U+202E>c<U+D800>'
    """
    return UNSEEN.sub(_name, text)


def _name(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else f"<U+{code:04X}>"
