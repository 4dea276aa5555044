"""Streaming Bragg peak finding with PeakNet."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peaknet_predict.arrays import RefusedEventsError, find_peaks, load_model
    from peaknet_predict.files_data import FilesDataModule

__version__ = "0.2.0"
"""The one place: package metadata, ``--version``, logs, CXI and weight files take it from here."""

__all__ = [
    "FilesDataModule",
    "RefusedEventsError",
    "find_peaks",
    "load_model",
]

# Without the classes that our configurations name: `--print_config` would show them by this path.
_MODULES = {
    "FilesDataModule": "files_data",
    "RefusedEventsError": "arrays",
    "find_peaks": "arrays",
    "load_model": "arrays",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: torch and Ray take seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
