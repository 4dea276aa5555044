"""Foreign texts as one line that neither a terminal nor a file takes for anything else."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return a text on one line, with everything escaped that could harm a terminal or a file.

    Escaped are line breaks and other control characters, NUL, and halves of surrogate pairs.
    """
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)
