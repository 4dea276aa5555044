"""Tables for the reference: every parameter of a class or function, from the code itself.

The program's constructor signatures are its configuration. So the table of a class is made from its
signature (name, type, default), its docstring (meaning) and the endings of names (unit).
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import docstring_parser
from jsonargparse import ArgumentParser

_UNITS = {
    "s": "seconds",
    "ms": "milliseconds",
    "hz": "1/s",
    "ev": "eV",
    "bytes": "bytes",
    "px": "pixels",
    "um": "micrometres",
    "m": "metres",
    "mm": "millimetres",
    "deg": "degrees",
}

_AS_FOR = re.compile(r"As (?:for|in) `(?:[\w.]*\.)?(\w+)`")


@dataclass(frozen=True)
class Setting:
    """One parameter.

    Attributes
    ----------
    name, kind, default, unit, meaning
        As text; ``default`` is "required" without one, ``unit`` is empty where there is none.
    """

    name: str
    kind: str
    default: str
    unit: str
    meaning: str


def find(path: str) -> Any:
    """Return the class or function of an import path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def settings(path: str) -> list[Setting]:
    """Return the parameters of a class or function.

    Raises
    ------
    LookupError
        If one is not documented.
    """
    target = find(path)
    if "parser" in inspect.signature(target).parameters:
        return _options(target)
    meanings = _meanings(target)
    found = []
    for name, parameter in _parameters(target):
        if name not in meanings:
            raise LookupError(f"{path}: the docstring says nothing about {name}")
        kind = parameter.annotation
        kind = kind if isinstance(kind, str) else inspect.formatannotation(kind)
        required = parameter.default is inspect.Parameter.empty
        ending = name.rpartition("_")[2]
        unit = _UNITS.get(ending, "") if ending != name else ""
        found.append(
            Setting(
                name,
                # Of a path, only the last name: modules are found in the API.
                re.sub(r"[\w.]+\.(\w+)", r"\1", kind),
                "required" if required else _written(parameter.default),
                unit,
                meanings[name],
            )
        )
    return found


def _options(add_to: Any) -> list[Setting]:
    """Return the options that a function adds to a parser."""
    parser = ArgumentParser()
    add_to(parser)
    found = []
    for one in parser._actions:
        name = max(one.option_strings, key=len, default=one.dest)
        if name == "--help":
            continue
        kind = getattr(one.type, "__name__", None) or str(getattr(one, "_typehint", "str"))
        kind = re.sub(r"<class '(.*?)'>|[\w.]+\.(\w+)", r"\1\2", kind)
        default = "required" if one.required else _written(one.default)
        found.append(Setting(name, kind, default, "", str(one.help)))
    return found


def _parameters(target: Any) -> Iterator[tuple[str, inspect.Parameter]]:
    """Yield the parameters, those that go on to the base class behind the class's own."""
    if inspect.isclass(target) and not _is_ours(target.__init__):
        return
    own = inspect.signature(target).parameters
    seen = set()
    for name, parameter in own.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            seen.add(name)
            yield name, parameter
    passes_on = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in own.values())
    if passes_on and inspect.isclass(target):
        for name, parameter in _parameters(target.__base__):
            if name not in seen:
                yield name, parameter


def _is_ours(target: Any) -> bool:
    return str(target.__module__).startswith("peaknet_predict")


def _meanings(target: Any) -> dict[str, str]:
    """Return what the docstrings say of each parameter, those of base classes included."""
    meanings: dict[str, str] = {}
    for one in inspect.getmro(target) if inspect.isclass(target) else (target,):
        if not _is_ours(one):
            continue
        for entry in docstring_parser.parse(inspect.cleandoc(one.__doc__ or "")).params:
            for name in entry.arg_name.split(", "):
                said = " ".join((entry.description or "").split())
                meanings.setdefault(name, _followed(one, name, said))
    return meanings


def _followed(target: Any, name: str, said: str) -> str:
    """Put the description itself in the place of "As for ...", where that is its class."""
    elsewhere = _AS_FOR.match(said)
    if elsewhere is None:
        return said
    module = inspect.getmodule(target)
    other = getattr(module, elsewhere[1], None)
    if other is None:
        path = re.search(r"`(peaknet_predict[\w.]*)`", said)
        other = None if path is None else find(path[1])
    return said if other is None else _meanings(other).get(name, said)


def _written(value: Any) -> str:
    """Return a default as a configuration would have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_written, value)) + "]"
    return str(value)


def table(path: str, prefix: str = "") -> str:
    """Return the table of a class or function, as Markdown."""
    found = settings(path)
    if not found:
        return "It has no settings."
    rows = ["| key | type | default | unit | meaning |", "| --- | --- | --- | --- | --- |"]
    for one in found:
        default = one.default if one.default == "required" else f"`{one.default}`"
        cells = (f"`{prefix}{one.name}`", f"`{one.kind}`", default, one.unit, one.meaning)
        rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    """Return a docstring's text as a cell: double backquotes are reStructuredText's."""
    return text.replace("``", "`").replace("|", "\\|")


def summary(path: str) -> str:
    """Return the first paragraph of a docstring."""
    said = docstring_parser.parse(inspect.cleandoc(find(path).__doc__ or ""))
    return (said.short_description or "").replace("``", "`")
