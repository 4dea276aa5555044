"""Errors of the command line, reduced to the sentence that matters.

jsonargparse reports every way in which a value could have been understood, and the value itself:
dozens of lines, and only the innermost says what is wrong.
"""

from __future__ import annotations

import re
from typing import NoReturn

from jsonargparse import ArgumentParser

from peaknet_predict.config_files import ConfigurationError

_KEY = re.compile(r'Parser key "([^"]+)":\s*(.*)')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':\s*(.*)")
_ROUND_ABOUT = re.compile(
    r"Does not validate against any of the Union|Subtypes:|Errors:|Given value|"
    r"Expected a <class 'NoneType'>"
)


def innermost(message: str) -> str:
    """Return the innermost sentence of a report of jsonargparse, and where it belongs.

    Parameters
    ----------
    message
        A report as a tree of indented lines, or a sentence, which is returned as it is.
    """
    if not (_KEY.search(message) or _ROUND_ABOUT.search(message)):
        return message
    above: list[tuple[int, str, bool]] = []  # indentation, name, whether it is a key
    deepest: list[str] = []
    place: list[tuple[int, str, bool]] = []
    for line in message.splitlines():
        text = line.lstrip(" -")
        indent = len(line) - len(text)
        while above and above[-1][0] >= indent:
            above.pop()
        for pattern in (_KEY, _CLASS):
            if (match := pattern.match(text)) is not None:
                above.append((indent, match[1], pattern is _KEY))
                indent, text = indent + 1, match[2]
        if not text or _ROUND_ABOUT.match(text):
            continue
        if not deepest or len(above) > len(place):
            place, deepest = list(above), [text]
        elif len(above) == len(place) and text not in deepest:
            deepest.append(text)
    if not deepest:
        return message
    keys = ".".join(name for _, name, is_key in place if is_key)
    owner = f" ({place[-1][1]})" if place and not place[-1][2] else ""
    return (f"{keys}{owner}: " if keys else "") + "; ".join(deepest)


class OneSentence(ArgumentParser):
    """A parser that ends with one sentence and no usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `ConfigurationError` with the innermost sentence.

        Parsers within this one, which try what a value may be, report to it as they always do.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        command = self.prog.replace(" [options]", "")
        raise ConfigurationError(f"{innermost(message)} ({command} --help shows the options)")
