"""Options of ``predict`` for where results go: ``--output.queue.name``, ``--output.directory``, ...

They are values of callbacks. In a configuration, callbacks are a list, and options reach only into
mappings. So these values have separate options, which override the list.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from typing import TypedDict, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from peaknet_predict.config_files import ConfigurationError
from peaknet_predict.queues import QueueAddress

# The keys of a queue's address, none of them required. Made from its fields, not a copy of them.
_QueueKeys = TypedDict("_QueueKeys", get_type_hints(QueueAddress), total=False)  # type: ignore[misc]

_TAKEN_BY = {
    "queue": "QueueWriter",
    "balance": "QueueWriter",
    "directory": "CxiOutput",
    "min_peaks": "CxiOutput",
}


def add_output_options(parser: ArgumentParser) -> None:
    """Add the options to a parser."""
    parser.add_argument(
        "--output.queue",
        type=_QueueKeys | None,
        default=None,
        help="values of the output queue, as --output.queue.name NAME; of QueueWriter",
    )
    parser.add_argument(
        "--output.balance",
        type=str | None,
        default=None,
        help="file for the record of the run; of QueueWriter",
    )
    parser.add_argument(
        "--output.directory",
        type=str | None,
        default=None,
        help="where CXI files go; of CxiOutput",
    )
    parser.add_argument(
        "--output.min_peaks",
        type=int | None,
        default=None,
        help="events with fewer peaks are counted, not written; of CxiOutput",
    )


def apply_output_options(
    output: Namespace, callbacks: Iterable[Namespace] | Namespace | None
) -> None:
    """Put the options that were given into the callbacks that take them.

    Parameters
    ----------
    output
        The options; None where not given.
    callbacks
        Class paths and arguments of the callbacks, or of the only one, as parsed; changed in place.

    Raises
    ------
    ConfigurationError
        If not exactly one of the callbacks takes an option.
    """
    listed = listed_callbacks(callbacks)
    for option, value in vars(output).items():
        if value is None:
            continue
        takers = [callback for callback in listed if _takes(callback.class_path, option)]
        if len(takers) != 1:
            name = _TAKEN_BY[option]
            raise ConfigurationError(
                f"output.{option} is for one {name}, and trainer.callbacks has {len(takers)}: "
                f"{_names(listed)}. "
                + (
                    "Add one (see `peaknet-predict configs demo`)"
                    if not takers
                    else "Set the values there"
                )
                + (", or run write-cxi, which has this option too" if name == "CxiOutput" else "")
            )
        arguments = takers[0].init_args
        if option == "min_peaks":
            _count_hits_from(value, listed)
        if option == "queue":
            for key, one in value.items():
                arguments.queue[key] = one
        else:
            arguments[option] = value


def _count_hits_from(min_peaks: int, callbacks: Iterable[Namespace]) -> None:
    """Let the log call a hit what is written."""
    for callback in callbacks:
        if "min_hit_peaks" in callback.init_args:
            callback.init_args.min_hit_peaks = min_peaks


def listed_callbacks(callbacks: Iterable[Namespace] | Namespace | None) -> list[Namespace]:
    """Return the callbacks of a configuration, which may be a list, only one, or none."""
    return [callbacks] if isinstance(callbacks, Namespace) else list(callbacks or ())


def _takes(class_path: str, option: str) -> bool:
    module, _, name = class_path.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    if option in ("queue", "balance"):
        return {"queue", "balance"} <= set(parameters)
    return {"directory", "min_peaks"} <= set(parameters)


def _names(callbacks: list[Namespace]) -> str:
    return ", ".join(one.class_path.rpartition(".")[2] for one in callbacks) or "none at all"
