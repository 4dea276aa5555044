"""Configurations are checked before they are parsed: no key may appear twice.

YAML parsers take the last of several equal keys and silently drop the others. A user who sets
``batch_size`` at the top of a long block would not see why it has no effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml


class ConfigurationError(ValueError):
    """A command line or configuration that contradicts itself."""


def refuse_duplicate_keys(words: Sequence[str]) -> None:
    """Look at every configuration on a command line.

    Parameters
    ----------
    words
        The words of a command line. Checked are the YAML and JSON files that they name, as ``-c
        FILE`` or as the value of another option, and mappings written out.

    Raises
    ------
    ConfigurationError
        If a key appears twice in a mapping; names file, key and lines. Invalid YAML is left to the
        parser.
    """
    for word in words:
        value = word.partition("=")[2] if word.startswith("--") and "=" in word else word
        path = Path(value).expanduser()
        if value.lstrip()[:1] in ("{", "["):
            where, text = "the command line", value
        elif path.suffix in (".yaml", ".yml", ".json") and path.is_file():
            where, text = str(path), path.read_text(encoding="utf-8", errors="replace")
        else:
            continue
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            continue
        for key, first, second in _duplicates(node):
            raise ConfigurationError(
                f"{where} has the key {key!r} twice, in lines {first} and {second}: only one of "
                "them would count; remove the other"
            )


def _duplicates(node: yaml.Node | None) -> Iterator[tuple[str, int, int]]:
    """Yield keys that appear twice in a mapping, each with its lines, from 1."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _duplicates(item)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    yield key.value, lines[key.value], line
                lines[key.value] = line
            yield from _duplicates(value)
