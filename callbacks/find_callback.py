"""How callbacks find each other."""

from __future__ import annotations

from typing import TypeVar

import lightning as L

C = TypeVar("C", bound=L.Callback)


def find_callback(trainer: L.Trainer, kind: type[C]) -> C | None:
    """Return the first callback of a class among the trainer's; None if there is none."""
    callbacks: list[L.Callback] = getattr(trainer, "callbacks", [])
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)
