"""Other people's text, made fit for a terminal that is ours."""

import re
from typing import TextIO
from unicodedata import category

from builder_orch.pipeline.amount import readable

LINE_LIMIT = 4000
"""Characters of one line that somebody else wrote."""

_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"
    r"|\x1b[ -/]*[0-~]"
)
_REORDERING = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def plain(text: str) -> str:
    """Somebody else's text on one line, unable to move the cursor, recolour or reorder anything."""
    # A progress bar draws over itself: what it showed last is what counts.
    text = _ESCAPES.sub("", text).rstrip("\r\n")
    text = text.rpartition("\r")[2]
    if not (text.isascii() and text.isprintable()):
        text = "".join(map(_visible, text))
    return text if len(text) <= LINE_LIMIT else text[: LINE_LIMIT - 3] + "..."


def _visible(char: str) -> str:
    if char == "\t":
        return "    "
    if category(char) in {"Cc", "Cs", "Zl", "Zp"} or char in _REORDERING:
        return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"
    return char


def encodable(text: str, stream: TextIO) -> str:
    """What the stream can take: a terminal without UTF-8 must not end a deploy."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def amount(count: int, unit: str) -> str:
    """`1.5 MB` for octets; other things are counted."""
    return readable(count) if unit == "bytes" else f"{count} {unit}"
